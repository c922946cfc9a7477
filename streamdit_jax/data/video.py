"""Video files: H.264 MP4 that browsers play; any file FFmpeg decodes, at the model's size and frame rate.

Streaming uses this module, so it imports numpy and PyAV only.
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation

from streamdit_jax.errors import DataError

# H.264 quality: 0 is lossless, 23 the encoder's default; 18 is visually lossless, and small pictures need it.
_CRF = "18"
# Codes of ITU-T H.273, of FFmpeg and of PyAV's Colorspace and ColorRange. The others: FCC, BT.601 (625 lines),
# SMPTE 240M.
_BT709, _BT601, _OTHER_MATRICES, _LIMITED_RANGE = 1, 5, (4, 5, 6, 7, 9), 1


class VideoWriter:
    """Context manager that writes an H.264 MP4 (yuv420p, index first, so that a browser starts at once).

    Frames go to a temporary name beside `path`, renamed when the block ends well; after an exception nothing is left.
    `frame_rate`: frames per second; `height`, `width`: pixels, both even (4:2:0 colour has half their resolution).
    ValueError for an odd size or frames of another shape; DataError naming `path` when it cannot be written.
    """

    def __init__(self, path: str | os.PathLike, frame_rate: float, height: int, width: int):
        for field, value in (("height", height), ("width", width)):
            if value < 2 or value % 2:
                raise ValueError(f"{field}: {value}; H.264 with 4:2:0 colour needs an even number of at least 2 pixels")
        if not 0 < frame_rate <= 1000:
            raise ValueError(f"frame_rate: {frame_rate}; it must lie between 0 and 1000 frames per second")
        self.path, self.frames_written = Path(path), 0
        self._shape = (height, width, 3)
        self._partial = self.path.with_name(f".{self.path.name}.incomplete-{os.getpid()}.mp4")
        self._rate = Fraction(frame_rate).limit_denominator(1001)

    def __enter__(self) -> "VideoWriter":
        with self._writing():
            if self.path.exists() and not self.path.is_file():  # a device would be replaced by a file
                raise OSError("it is not a regular file")
            self._container = av.open(str(self._partial), "w", format="mp4", options={"movflags": "+faststart"})
            self._stream = self._container.add_stream("libx264", rate=self._rate)
            self._stream.height, self._stream.width = self._shape[:2]
            self._stream.pix_fmt = "yuv420p"
            self._stream.options = {"crf": _CRF, "preset": "veryfast"}
            # Said and meant: players guess the matrix of unmarked files by their size, and colours shift.
            context = self._stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _LIMITED_RANGE
        return self

    def write(self, frames: np.ndarray):
        """Appends uint8 [H, W, 3] or [F, H, W, 3], RGB."""
        frames = np.asarray(frames)
        if frames.ndim not in (3, 4) or frames.shape[-3:] != self._shape or frames.dtype != np.uint8:
            want = f"uint8 [frames, {', '.join(map(str, self._shape))}]"
            raise ValueError(f"frames: {frames.dtype} {list(frames.shape)} given; {self.path} takes {want}")
        with self._writing():
            for picture in frames.reshape(-1, *self._shape):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame = frame.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED_RANGE)
                frame.pts, frame.time_base = self.frames_written, 1 / self._rate
                self._container.mux(self._stream.encode(frame))
                self.frames_written += 1

    def __exit__(self, kind, error, traceback):
        try:
            if kind is None:
                with self._writing():
                    if not self.frames_written:
                        raise OSError("no frames were given")
                    self._container.mux(self._stream.encode(None))
                    self._container.close()
                    os.replace(self._partial, self.path)
            else:
                with contextlib.suppress(OSError, ValueError):  # the first error is the one to show
                    self._container.close()
        finally:
            self._partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:  # FFmpeg's errors that come from the system are OSErrors, too
            raise DataError(f"{self.path}: could not be written: {_reason(error)}") from error
        except av.FFmpegError as error:
            raise DataError(f"{self.path}: could not be encoded: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def write_video(path: str | os.PathLike, frames: Iterable[np.ndarray], frame_rate: float):
    """Writes an iterable of frames uint8 [H, W, 3], or an array [F, H, W, 3], with a `VideoWriter`; its errors."""
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise DataError(f"{path}: could not be written: no frames were given")
    with VideoWriter(path, frame_rate, *np.shape(first)[-3:-1]) as writer:
        for frame in itertools.chain([first], frames):
            writer.write(frame)


def read_video(path: str | os.PathLike, height: int, width: int, frame_rate: float) -> Iterator[np.ndarray]:
    """Decodes a video file into uint8 [height, width, 3] RGB frames at `frame_rate` frames per second.

    In time, each frame is the one shown nearest to its moment (by time stamps: also right for variable frame
    rates), for as long as the video lasts. In space, the picture is turned upright, scaled until it covers the size
    (area filter when it shrinks, bicubic when it grows; pixels that are not square are made so) and cut at its centre.

    DataError, naming the file: it is missing (at once), is no video, has no frames, or breaks off (while iterating).
    """
    path = Path(path)
    if height < 1 or width < 1 or not frame_rate > 0:
        raise ValueError(f"height, width, frame_rate: {height}, {width}, {frame_rate}; all must be positive")
    if not path.is_file():
        raise DataError(f"{path}: no such video file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    return _resample(path, height, width, frame_rate)


def _resample(path: Path, height: int, width: int, frame_rate: float) -> Iterator[np.ndarray]:
    count, before, end = 0, None, 0.0  # frames given so far: frame k belongs at k / frame_rate
    for start, stop, picture in _decode(path, height, width):
        # The picture before is nearest until half-way to this one.
        while before is not None and count / frame_rate <= (before[0] + start) / 2:
            yield before[1]()
            count += 1
        before, end = (start, picture), stop
    if before is None:
        raise DataError(f"{path}: holds no frame that can be decoded")
    for _ in range(count, max(1, round(end * frame_rate))):
        yield before[1]()


def _decode(path: Path, height: int, width: int) -> Iterator[tuple[float, float, Callable[[], np.ndarray]]]:
    """Yields (start, end, function that gives the picture) in seconds from the first frame, start strictly rising."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video or container.format.name == "tty":  # FFmpeg draws text files, too
                raise DataError(f"{path}: holds no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            usual = 1 / float(stream.average_rate or stream.guessed_rate or 25)
            aspect = float(stream.sample_aspect_ratio or 1)  # width of a pixel over its height
            first, last, end = None, None, 0.0
            for number, frame in enumerate(container.decode(stream)):
                time = frame.time if frame.time is not None else number * usual
                first = time if first is None else first
                if last is not None and time <= last:
                    continue  # a repeated time stamp: shown for no time at all
                last = time
                length = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else usual
                end = time - first + length
                yield time - first, end, functools.cache(functools.partial(_fit, frame, aspect, height, width))
            # FFmpeg takes a file that breaks off for one that ends.
            said = float(stream.duration * stream.time_base) if stream.duration else 0.0
            if end < 0.9 * said:
                raise DataError(f"{path}: breaks off after {end:.2f} of {said:.2f} seconds")
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{path}: cannot be decoded as video: {_reason(error)}") from error


def _fit(frame: av.VideoFrame, aspect: float, height: int, width: int) -> np.ndarray:
    """One upright RGB picture, uint8 [height, width, 3], that covers the size and is cut at its centre."""
    turns = round(frame.rotation / 90) % 4  # quarter turns counter-clockwise that make it upright
    target = (height, width) if turns % 2 == 0 else (width, height)
    square = (frame.height, frame.width * aspect)
    scale = max(t / s for t, s in zip(target, square))
    rows, columns = (max(t, round(s * scale)) for t, s in zip(target, square))
    shrinks = rows < frame.height or columns < frame.width
    picture = frame.reformat(
        width=columns,
        height=rows,
        format="rgb24",
        src_colorspace=_matrix(frame),
        interpolation=Interpolation.AREA if shrinks else Interpolation.BICUBIC,
    ).to_ndarray()
    top, left = (rows - target[0]) // 2, (columns - target[1]) // 2
    picture = picture[top : top + target[0], left : left + target[1]]
    return np.ascontiguousarray(np.rot90(picture, turns))


def _matrix(frame: av.VideoFrame) -> int:
    """The file's YUV matrix; unmarked files are guessed as players do: BT.709 from 720 lines on, else BT.601."""
    if frame.colorspace in (_BT709, *_OTHER_MATRICES):
        return frame.colorspace
    return _BT709 if frame.height >= 720 else _BT601


def cut_clips(frames: Iterable[np.ndarray], clip_frames: int, name: str = "video") -> Iterator[np.ndarray]:
    """Cuts a run of frames [H, W, 3] into clips [clip_frames, H, W, 3]; a remainder shorter than a clip is dropped.

    DataError, starting with `name` (the file), when there are not enough frames for a single clip.
    """
    frames = iter(frames)
    for number in itertools.count():
        clip = list(itertools.islice(frames, clip_frames))
        if len(clip) < clip_frames:
            if number == 0:
                raise DataError(f"{name}: too short: it has {len(clip)} frames and a clip needs {clip_frames}")
            return
        yield np.stack(clip)
