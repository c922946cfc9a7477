"""Pictures on their way to a viewer and back: H.264 and JPEG by PyAV, and the last minute as a file.

One encoder per viewer, one picture in, one message out: nothing is held back (x264's zerolatency).
"""

import contextlib
import io
import threading
from collections import deque
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace

from streamdit_jax.errors import StreamDiTError

_KEY_SECONDS = 2  # so that a bounded past always holds a place to start from
_SMALL = 256  # pixels
_JPEG_QUALITY = "2"  # FFmpeg's scale: 2 is best, 31 worst
# As in files (data/video.py): said and meant, so that no player has to guess.
_BT709, _LIMITED_RANGE = Colorspace.ITU709, ColorRange.MPEG


class Picture(NamedTuple):
    """An encoded picture. key: decoding may start here."""

    data: bytes
    key: bool


class H264Encoder:
    """RGB pictures → H.264 access units in Annex B, constrained baseline, BT.709; each key frame carries its headers.

    `height`, `width`: pixels. `frame_rate`: frames per second. H.264 that every browser decodes has a quarter of the
    colours of its pixels (4:2:0), which shows in small pictures; those are sent with each pixel as 2 × 2.
    ValueError where H.264 cannot be encoded here: an odd size of a large picture, or an FFmpeg without x264.
    """

    name = "h264"

    def __init__(self, height: int, width: int, frame_rate: float):
        self._repeat = 2 if max(height, width) <= _SMALL else 1
        height, width = self._repeat * height, self._repeat * width
        if height % 2 or width % 2:
            raise ValueError(f"height, width: {height}, {width}; H.264 with 4:2:0 colour needs even ones")
        try:
            context = av.CodecContext.create("libx264", "w")
        except (av.FFmpegError, ValueError) as mistake:
            raise ValueError(f"this build of FFmpeg has no libx264 ({mistake})") from None
        context.height, context.width, context.pix_fmt = height, width, "yuv420p"
        context.framerate = Fraction(frame_rate).limit_denominator(1001)
        context.time_base = 1 / context.framerate
        context.colorspace = context.color_primaries = context.color_trc = int(_BT709)
        context.color_range = int(_LIMITED_RANGE)
        context.gop_size = max(1, round(_KEY_SECONDS * frame_rate))
        context.thread_count = 1
        context.options = {
            "preset": "veryfast",
            "tune": "zerolatency",
            "profile": "baseline",
            "crf": "18",
            "forced-idr": "1",
        }
        self._context, self._count = context, 0

    def encode(self, picture: np.ndarray, key: bool = False) -> Picture:
        """picture: uint8 [height, width, 3]. key: make it a key frame."""
        if self._repeat > 1:
            picture = picture.repeat(self._repeat, 0).repeat(self._repeat, 1)
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED_RANGE)
        frame.pts, frame.time_base = self._count, self._context.time_base
        frame.pict_type = PictureType.I if key else PictureType.NONE
        self._count += 1
        packets = self._context.encode(frame)
        return Picture(b"".join(bytes(packet) for packet in packets), any(packet.is_keyframe for packet in packets))


class JPEGEncoder:
    """RGB pictures → JPEG with full colour resolution, for browsers without WebCodecs. Parameters as above."""

    name = "jpeg"

    def __init__(self, height: int, width: int, frame_rate: float):
        context = av.CodecContext.create("mjpeg", "w")
        context.height, context.width, context.pix_fmt = height, width, "yuvj444p"
        context.framerate = Fraction(frame_rate).limit_denominator(1001)
        context.time_base = 1 / context.framerate
        context.thread_count = 1
        context.options = {"qmin": _JPEG_QUALITY, "qmax": _JPEG_QUALITY}
        self._context, self._count = context, 0

    def encode(self, picture: np.ndarray, key: bool = False) -> Picture:
        """picture: uint8 [height, width, 3]. Every JPEG is a key frame."""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(format="yuvj444p")
        frame.pts, frame.time_base = self._count, self._context.time_base
        self._count += 1
        return Picture(b"".join(bytes(packet) for packet in self._context.encode(frame)), True)


ENCODERS = {encoder.name: encoder for encoder in (H264Encoder, JPEGEncoder)}


def codec_string(height: int, width: int, frame_rate: float) -> str | None:
    """What WebCodecs calls the H.264 that `H264Encoder` makes, such as "avc1.42c00a"; None where it makes none."""
    try:
        stream = H264Encoder(height, width, frame_rate).encode(np.zeros((height, width, 3), np.uint8), key=True).data
    except (ValueError, av.FFmpegError):
        return None
    start = 0
    while (start := stream.find(b"\0\0\1", start)) >= 0:
        start += 3
        if stream[start] & 0x1F == 7:  # sequence parameter set: profile, constraints, level
            return "avc1." + stream[start + 1 : start + 4].hex()
    return None


class Recent:
    """The last encoded pictures, at most `frames` of them and at most `size` bytes; it starts at a key frame."""

    def __init__(self, frames: int, size: int):
        self._frames, self._size = frames, size
        self._pictures: deque[Picture] = deque()
        self._bytes, self._lock = 0, threading.Lock()

    def append(self, picture: Picture) -> None:
        """Adds one and forgets what is too old."""
        with self._lock:
            self._pictures.append(picture)
            self._bytes += len(picture.data)
            while len(self._pictures) > self._frames or self._bytes > self._size:
                self._forget()
            while self._pictures and not self._pictures[0].key:
                self._forget()

    def _forget(self) -> None:
        self._bytes -= len(self._pictures.popleft().data)

    def __len__(self) -> int:
        return len(self._pictures)

    def pictures(self) -> list[Picture]:
        """A copy, oldest first."""
        with self._lock:
            return list(self._pictures)


def to_mp4(pictures: list[Picture], codec: str, frame_rate: float) -> bytes:
    """Encoded pictures → an MP4 file that browsers play: H.264 is repacked as it is, JPEG is encoded anew.

    StreamDiTError where there are none.
    """
    if not pictures:
        raise StreamDiTError("download: there is no picture yet")
    rate = Fraction(frame_rate).limit_denominator(1001)
    joined = io.BytesIO(b"".join(picture.data for picture in pictures))
    out = io.BytesIO()
    with (
        av.open(joined, format="h264" if codec == "h264" else "mjpeg") as source,
        av.open(out, "w", format="mp4") as target,
    ):
        _repack(source, target, rate) if codec == "h264" else _encode_anew(source, target, rate)
    return out.getvalue()


def _repack(source, target, rate: Fraction) -> None:
    stream = target.add_stream_from_template(source.streams.video[0])
    stream.time_base = 1 / (rate * 1000)
    number = 0
    for packet in source.demux(video=0):
        if not packet.size:
            continue  # the demuxer's way to say that it has ended
        packet.stream, packet.time_base = stream, 1 / rate
        packet.pts = packet.dts = number
        packet.duration = 1
        target.mux(packet)
        number += 1


def _encode_anew(source, target, rate: Fraction) -> None:
    stream = None
    for number, frame in enumerate(source.decode(video=0)):
        if stream is None:
            stream = target.add_stream("libx264", rate=rate)
            stream.height, stream.width, stream.pix_fmt = frame.height, frame.width, "yuv420p"
            stream.options = {"crf": "18", "preset": "veryfast"}
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = int(_BT709)
            context.color_range = int(_LIMITED_RANGE)
        frame = frame.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED_RANGE)
        frame.pts, frame.time_base = number, 1 / rate
        target.mux(stream.encode(frame))
    target.mux(stream.encode(None))


def decode_jpeg(data: bytes, height: int, width: int) -> np.ndarray:
    """A viewer's JPEG → uint8 [height, width, 3]. StreamDiTError where it is damaged or of another size: nobody but the
    model chooses shapes, and a picture that claims to be huge is refused before it is unpacked.
    """
    context = av.CodecContext.create("mjpeg", "r")
    context.thread_count = 1
    # FFmpeg counts what it allocates, edges included; the size itself is compared below.
    context.options = {"max_pixels": str((height + 128) * (width + 128)), "err_detect": "explode"}
    with contextlib.suppress(av.FFmpegError, ValueError):
        for frame in (*context.decode(av.Packet(data)), *context.decode(None)):
            if (frame.height, frame.width) == (height, width):
                return frame.to_ndarray(format="rgb24")
    raise StreamDiTError(f"picture: is no JPEG of {width}×{height} pixels")
