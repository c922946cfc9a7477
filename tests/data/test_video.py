"""Video files: what is written plays and reads back; time and space are resampled rightly; every bad file is named."""

import struct
import subprocess
import sys
import textwrap
from fractions import Fraction

import av
import numpy as np
import pytest

from streamdit_jax.data.video import VideoWriter, cut_clips, read_video, write_video
from streamdit_jax.errors import DataError


def number(frame):
    return round((float(frame.mean()) - 20) / 4)


def rates(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        coding = stream.codec_context.name, stream.pix_fmt
        return *coding, stream.average_rate, stream.frames, stream.width, stream.height


def test_a_written_file_is_h264_for_browsers_and_reads_back(tmp_path, numbered):
    path = tmp_path / "a.mp4"
    write_video(path, numbered(20), 16.0)
    assert rates(path) == ("h264", "yuv420p", 16, 20, 48, 32)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # the index comes first: playing starts before all is loaded
    assert b"colrnclx" + bytes([0, 1, 0, 1, 0, 1]) in data  # marked as BT.709
    frames = list(read_video(path, 32, 48, 16.0))
    assert [number(f) for f in frames] == list(range(20))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 30), (255, 255, 255), (0, 0, 0)])
def test_colours_survive_writing_and_reading(tmp_path, colour):
    write_video(tmp_path / "a.mp4", np.broadcast_to(np.uint8(colour), (3, 16, 16, 3)), 16.0)
    for frame in read_video(tmp_path / "a.mp4", 16, 16, 16.0):
        np.testing.assert_allclose(frame.astype(int), np.broadcast_to(colour, (16, 16, 3)), atol=3)


def test_a_natural_picture_is_close_after_coding(tmp_path):
    y, x = np.mgrid[:64, :64] / 64
    video = [np.stack([x, y, np.sin(6 * x + t / 5) / 2 + 0.5], -1) * 255 for t in range(8)]
    write_video(tmp_path / "a.mp4", np.uint8(video), 16.0)
    back = np.stack(list(read_video(tmp_path / "a.mp4", 64, 64, 16.0))).astype(float)
    assert 10 * np.log10(255**2 / np.mean((back - np.uint8(video)) ** 2)) > 35


@pytest.mark.parametrize(("source", "target"), [(16, 16), (25, 16), (16, 25), (8, 16), (Fraction(30000, 1001), 16)])
def test_time_is_resampled_to_the_nearest_frame(tmp_path, source, target, numbered):
    write_video(tmp_path / "a.mp4", numbered(40, 16, 16), float(source))
    shown = [number(f) for f in read_video(tmp_path / "a.mp4", 16, 16, target)]
    assert len(shown) == round(40 / float(source) * target)
    for k, frame in enumerate(shown):
        moment = k / target * float(source)  # in source frames
        assert abs(min(moment, 39) - frame) <= 0.5 + 1e-6


def test_variable_frame_rates_follow_the_time_stamps(tmp_path, numbered):
    times = [0, 1, 2, 10, 11, 20]  # in sixteenths of a second
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 16)
        for time, picture in zip(times, numbered(6, 16, 16)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    shown = [number(f) for f in read_video(tmp_path / "a.mkv", 16, 16, 16.0)]
    assert len(shown) == 21
    for k, frame in enumerate(shown):
        assert abs(times[frame] - k) == min(abs(t - k) for t in times)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48), (64, 40), (21, 35)])
def test_space_is_covered_and_cut_at_the_centre(tmp_path, height, width):
    # Red left third, green middle, blue right third of a 96 × 32 picture.
    picture = np.zeros((32, 96, 3), np.uint8)
    for third in range(3):
        picture[:, 32 * third : 32 * third + 32, third] = 255
    write_video(tmp_path / "a.mp4", [picture] * 2, 16.0)
    frame = next(read_video(tmp_path / "a.mp4", height, width, 16.0))
    assert frame.shape == (height, width, 3) and frame.flags.c_contiguous
    scale = max(height / 32, width / 96)
    for column in range(width):
        place = 48 + (column + 0.5 - width / 2) / scale  # in the source
        if min(abs(place - 32), abs(place - 64)) > 4:
            assert frame[height // 2, column].argmax() == int(place // 32)


def test_shrinking_averages_and_does_not_alias(tmp_path):
    board = np.uint8(255 * (np.indices((128, 128)).sum(0) % 2))
    write_video(tmp_path / "a.mp4", [np.repeat(board[..., None], 3, -1)] * 2, 16.0)
    frame = next(read_video(tmp_path / "a.mp4", 16, 16, 16.0))
    assert abs(float(frame.mean()) - 127.5) < 12 and frame.std() < 12


def patch_matrix(path, numbers):
    """Writes a rotation into the track header's display matrix, as phones do."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    data[place : place + 36] = struct.pack(">9i", *numbers)
    path.write_bytes(data)


def test_phone_video_is_turned_upright(tmp_path):
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, :16] = 255  # the stored picture's left edge is white
    path = tmp_path / "a.mp4"
    write_video(path, [picture] * 2, 16.0)
    one = 1 << 16
    patch_matrix(path, (0, one, 0, -one, 0, 0, 32 * one, 0, 1 << 30))  # shown turned clockwise by 90 degrees
    frame = next(read_video(path, 64, 32, 16.0)).mean(-1)
    assert frame[:14].min() > 200 and frame[18:].max() < 50  # the left edge is now the top edge


def test_pixels_that_are_not_square_are_made_so(tmp_path, real_clips):
    clip = real_clips["carphone_pristine"]  # 176 × 144 with pixels of 128:117, shown as 192.5 × 144
    frames = np.stack(list(read_video(clip, 144, 192, 30000 / 1001)))
    assert frames.shape == (120, 144, 192, 3)
    with av.open(str(clip)) as container:
        plain = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(float)
    wide = frames[0].astype(float)
    # The picture's left and right edges are inside: a cut at 176 columns would have lost them.
    assert np.abs(wide[:, :4].mean((0, 1)) - plain[:, :4].mean((0, 1))).max() < 8
    assert np.abs(wide[:, -4:].mean((0, 1)) - plain[:, -4:].mean((0, 1))).max() < 8


def test_real_clips_have_the_length_their_rates_say(real_clips):
    for name, seconds in (("bigbuckbunny", 132 / 25), ("bikes", 250 / 25), ("carphone_pristine", 120 * 1001 / 30000)):
        frames = np.stack(list(read_video(real_clips[name], 64, 64, 16.0)))
        assert frames.shape == (round(seconds * 16), 64, 64, 3)
        assert frames.std() > 20 and np.abs(np.diff(frames.astype(int), axis=0)).mean() > 0.2  # pictures that move


@pytest.mark.parametrize("name", ["missing.mp4", "empty.mp4", "text.mp4", "text.txt"])
def test_files_that_are_no_video_are_named(tmp_path, name):
    data = {"empty": b"", "text": b"hello" * 999}.get(name[:-4])
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=name):
        list(read_video(tmp_path / name, 16, 16, 16.0))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_files_that_break_off_are_named(tmp_path, share):
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    path = tmp_path / "broken.mp4"
    write_video(path, noise, 16.0)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DataError, match=r"broken\.mp4: (breaks off after|cannot be decoded)"):
        list(read_video(path, 16, 16, 16.0))


def test_sound_without_pictures_is_named(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(DataError, match=r"a\.wav: holds no video"):
        list(read_video(tmp_path / "a.wav", 16, 16, 16.0))


@pytest.mark.parametrize(
    ("height", "width", "field"), [(33, 32, "height: 33"), (32, 31, "width: 31"), (0, 2, "height: 0")]
)
def test_odd_sizes_are_refused_with_the_field_and_the_rule(tmp_path, height, width, field):
    with pytest.raises(ValueError, match=f"{field}.*even"):
        VideoWriter(tmp_path / "a.mp4", 16.0, height, width)


def test_frames_of_another_shape_or_type_are_refused(tmp_path):
    for frames in (np.zeros((2, 32, 30, 3), np.uint8), np.zeros((2, 32, 32, 3)), np.zeros((32, 32), np.uint8)):
        with pytest.raises(ValueError, match="frames:"), VideoWriter(tmp_path / "a.mp4", 16.0, 32, 32) as writer:
            writer.write(frames)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, numbered):
    path = tmp_path / "a.mp4"
    write_video(path, numbered(3), 16.0)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="stop"), VideoWriter(path, 16.0, 32, 48) as writer:
        writer.write(numbered(2))
        raise RuntimeError("stop")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(DataError, match=r"a\.mp4.*no frames"), VideoWriter(path, 16.0, 32, 48):
        pass
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_be_written_are_named(tmp_path, numbered):
    with pytest.raises(DataError, match=r"nowhere/a\.mp4: could not be written: No such file"):
        write_video(tmp_path / "nowhere" / "a.mp4", numbered(2), 16.0)
    with pytest.raises(DataError, match="is not a regular file"):
        write_video(tmp_path, numbered(2), 16.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", ["1000", "size // 2", "size - 100"])  # when opening, when writing, when closing
def test_a_full_disk_is_one_data_error_and_leaves_nothing(tmp_path, limit):
    script = f"""
        import os, resource, sys
        sys.path[:0] = {sys.path!r}
        import numpy as np
        from streamdit_jax.data.video import write_video
        from streamdit_jax.errors import DataError
        noise = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
        write_video({str(tmp_path / "a.mp4")!r}, noise, 16.0)
        size = os.path.getsize({str(tmp_path / "a.mp4")!r})
        os.remove({str(tmp_path / "a.mp4")!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))  # a longer file fails as on a full disk
        try:
            write_video({str(tmp_path / "a.mp4")!r}, noise, 16.0)
        except DataError as error:
            print("DataError", error)
        print([m for m in ("grain", "tensorflow_datasets", "array_record", "jax", "tensorflow") if m in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    first, second = done.stdout.strip().splitlines()
    assert first.startswith(f"DataError {tmp_path / 'a.mp4'}: could not be written"), done.stderr
    assert second == "[]"  # streaming loads neither grain nor tfds
    assert list(tmp_path.iterdir()) == []


def test_cut_clips_drops_the_remainder_unless_nothing_else(numbered):
    frames = numbered(11, 2, 2)
    clips = list(cut_clips(iter(frames), 4))
    np.testing.assert_array_equal(np.concatenate(clips), frames[:8])
    assert [c.shape for c in clips] == [(4, 2, 2, 3)] * 2
    with pytest.raises(DataError, match=r"a\.mp4: too short: it has 11 frames and a clip needs 12"):
        list(cut_clips(frames, 12, "a.mp4"))
    with pytest.raises(DataError, match="has 0 frames"):
        list(cut_clips([], 1))
