"""Pictures encoded one by one are the pictures that come out again."""

import io

import av
import numpy as np
import pytest

from streamdit_jax.errors import StreamDiTError
from streamdit_jax.serving.video import (
    H264Encoder,
    JPEGEncoder,
    Picture,
    Recent,
    codec_string,
    decode_jpeg,
    to_mp4,
)


def pictures(count, size=48):
    """A bright square that moves over a slope of colours."""
    y, x = np.mgrid[:size, :size] * 4
    for number in range(count):
        picture = np.stack([x, y, (x + y) // 2], -1).astype(np.uint8)
        picture[8:24, 2 * number % 24 : 2 * number % 24 + 16] = (230, 40, 40)
        yield picture


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def test_h264_gives_one_access_unit_a_picture_and_a_key_frame_on_demand():
    encoder = H264Encoder(48, 48, 16.0)
    for number, picture in enumerate(pictures(40)):
        encoded = encoder.encode(picture, key=number == 5)
        units = [unit[0] & 31 for unit in encoded.data.split(b"\0\0\1")[1:]]
        assert sum(unit in (1, 5) for unit in units) == 1, "one slice: one in, one out"
        assert ({7, 8, 5} <= set(units)) == encoded.key, "a key frame is an IDR picture with its parameter sets"
        assert encoded.key or number not in (0, 5, 37), "the first, the one asked for, and two seconds later"
    assert codec_string(48, 48, 16.0).startswith("avc1.42c0"), "constrained baseline"


def test_decoding_may_start_at_a_key_frame():
    encoder, wanted = H264Encoder(48, 48, 16.0), list(pictures(12))
    encoded = [encoder.encode(picture, key=number == 7) for number, picture in enumerate(wanted)]
    decoder = av.CodecContext.create("h264", "r")
    frames = [frame for picture in encoded[7:] for frame in decoder.decode(av.Packet(picture.data))]
    frames += decoder.decode(None)
    assert len(frames) == 5
    for frame, picture in zip(frames, wanted[7:]):
        rgb = frame.reformat(format="rgb24", src_colorspace=1, src_color_range=1).to_ndarray()
        assert np.abs(rgb.astype(int).mean((0, 1)) - picture.mean((0, 1))).max() < 3, "colours stay"
        assert rgb.shape == (96, 96, 3), "each pixel as 2 × 2"
        assert psnr(rgb[::2, ::2], picture) > 33, "sharp colour edges too, because 4:2:0 then drops nothing"


def test_h264_of_odd_sizes_is_refused():
    with pytest.raises(ValueError, match="even"):
        H264Encoder(512, 511, 16.0)
    assert codec_string(511, 512, 16.0) is None and codec_string(47, 48, 16.0) is not None


def test_jpeg_keeps_full_colour():
    encoder = JPEGEncoder(48, 48, 16.0)
    for picture in pictures(3):
        assert psnr(decode_jpeg(encoder.encode(picture).data, 48, 48), picture) > 35


@pytest.mark.parametrize("damage", ["cut", "noise", "empty header", "other size", "claims to be huge"])
def test_a_picture_that_is_none_is_refused(damage):
    whole = JPEGEncoder(48, 48, 16.0).encode(next(pictures(1))).data
    data = {
        "cut": whole[:200],
        "noise": np.random.default_rng(0).bytes(500),
        "empty header": b"\xff\xd8\xff\xd9",
        "other size": JPEGEncoder(96, 48, 16.0).encode(np.zeros((96, 48, 3), np.uint8)).data,
        "claims to be huge": whole.replace(b"\x00\x30\x00\x30", b"\xff\xf0\xff\xf0"),
    }[damage]
    with pytest.raises(StreamDiTError, match="48×48"):
        decode_jpeg(data, 48, 48)


def test_the_past_is_bounded_and_starts_at_a_key_frame():
    recent = Recent(frames=10, size=10_000)
    for number in range(100):
        recent.append(Picture(bytes([number]) * 100, number % 4 == 0))
        kept = recent.pictures()
        assert len(kept) == len(recent) <= 10 and kept[0].key and kept[-1].data[0] == number
    for _ in range(3):
        recent.append(Picture(bytes(4000), True))
    assert sum(len(picture.data) for picture in recent.pictures()) <= 10_000
    recent.append(Picture(bytes(20_000), True))
    assert len(recent) == 0, "a picture larger than the bound is not kept"


@pytest.mark.parametrize("encoder", [H264Encoder, JPEGEncoder])
def test_the_last_minute_is_a_video_file(encoder):
    encoder, recent, wanted = encoder(48, 48, 16.0), Recent(40, 1 << 20), list(pictures(50))
    for picture in wanted:
        recent.append(encoder.encode(picture))
    kept = len(recent)
    with av.open(io.BytesIO(to_mp4(recent.pictures(), encoder.name, 16.0))) as container:
        assert container.format.name.startswith("mov") and container.streams.video[0].codec_context.name == "h264"
        frames = list(container.decode(video=0))
    assert len(frames) == kept <= 40
    times = [float(frame.time) for frame in frames]
    np.testing.assert_allclose(np.diff(times), 1 / 16, atol=1e-4)
    rgb = frames[-1].reformat(format="rgb24").to_ndarray()
    assert np.abs(rgb.astype(int).mean((0, 1)) - wanted[-1].mean((0, 1))).max() < 4
    with pytest.raises(StreamDiTError, match="no picture yet"):
        to_mp4([], encoder.name, 16.0)
