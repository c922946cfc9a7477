"""The roadtrip world: deterministic, endless, and showing what its factors say."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from streamdit_jax.data.roadtrip import (
    FACTORS,
    SPEED,
    SPLITS,
    Factors,
    clip_factors,
    combinations,
    held_out,
    render,
)
from streamdit_jax.data.roadtrip_canvas import Canvas, hash_int, uniform
from streamdit_jax.data.roadtrip_palette import look
from streamdit_jax.data.roadtrip_scene import LAYERS, SPANS

PLAIN = Factors("car", "red", "hills", "day", "clear", "right", "slow")
VARIED = [clip_factors(index, 5, "train") for index in range(8)]


@pytest.mark.parametrize("factors, seed", VARIED)
def test_a_frame_depends_on_its_number_only(factors, seed):
    whole = render(factors, seed, 80)  # more than one block
    assert whole.shape == (80, 64, 64, 3) and whole.dtype == np.uint8
    np.testing.assert_array_equal(whole, render(factors, seed, 80))
    np.testing.assert_array_equal(whole[37:], render(factors, seed, 43, start=37))
    np.testing.assert_array_equal(whole[63:64], render(factors, seed, 1, start=63))
    assert np.abs(whole.astype(int) - render(factors, seed + 1, 80)).mean() > 1  # another seed, another drive


def test_frames_after_a_week_can_be_rendered():
    start = 7 * 24 * 3600 * 16
    late = render(PLAIN, 3, 5, start=start)
    np.testing.assert_array_equal(late[2:], render(PLAIN, 3, 3, start=start + 2))


def test_smaller_sizes_are_the_same_picture():
    big, small = render(PLAIN, 1, 4), render(PLAIN, 1, 4, size=32)
    folded = big.reshape(4, 32, 2, 32, 2, 3).mean((2, 4))
    assert small.shape == (4, 32, 32, 3) and np.abs(small - folded).max() <= 1.0


@pytest.mark.parametrize("scenery", FACTORS["scenery"])
def test_the_landscape_never_repeats(scenery):
    """Over 5,000 pixels of road (4,000 fast frames) no two 160-pixel stretches of roadside look the same."""
    canvas = Canvas(0, 4 * 5003, SPANS[2][0], 64 - SPANS[2][0])
    LAYERS[scenery][2](canvas, 11, look("day", "clear"))
    roadside = canvas.filtered()[::4, :36].reshape(-1, 4, 9, 4).mean(2).reshape(-1, 16)
    edges = np.diff(roadside, axis=0)
    stretches = np.lib.stride_tricks.sliding_window_view(edges, 160, axis=0).reshape(-1, 16 * 160)
    stretches = stretches / np.linalg.norm(stretches, axis=1, keepdims=True)
    likeness = stretches[::50] @ stretches.T
    apart = np.abs(np.arange(len(stretches))[::50, None] - np.arange(len(stretches)))
    assert likeness[apart == 0].min() > 0.999
    assert likeness[apart > 8].max() < 0.97


def test_frames_far_apart_differ():
    fast = replace(PLAIN, speed="fast")
    first = render(fast, 4, 32)[:, 24:44].astype(int)
    for start in (1024, 2048, 4096 - 32):
        later = render(fast, 4, 32, start=start)[:, 24:44].astype(int)
        assert np.abs(first[:, None] - later[None]).mean((2, 3, 4)).min() > 4


def shift_per_frame(video: np.ndarray, rows: slice, step: int) -> float:
    """Pixels a frame by which a band moves to the right, by phase correlation of frames `step` apart."""
    band = video[:, rows].astype(np.float64).mean(-1)
    band = (band - band.mean(0)) * np.hanning(64)  # what stands still is no evidence of motion
    spectrum = np.fft.fft(band, axis=2)
    cross = spectrum[step:] * np.conj(spectrum[:-step])
    power = np.fft.ifft((cross / (np.abs(cross) + 1e-6)).sum((0, 1))).real
    peak = int(np.argmax(power))
    return ((peak + 32) % 64 - 32) / step


@pytest.mark.parametrize("scenery", FACTORS["scenery"])
@pytest.mark.parametrize("direction", FACTORS["direction"])
@pytest.mark.parametrize("speed", FACTORS["speed"])
def test_the_road_passes_the_other_way_at_the_right_rate(scenery, direction, speed):
    """The optical shift of the lane dashes has the sign of the direction and the magnitude of the speed."""
    factors = replace(PLAIN, scenery=scenery, direction=direction, speed=speed)
    measured = shift_per_frame(render(factors, 9, 33), slice(57, 59), step=4)
    expected = SPEED[speed] * (-1 if direction == "right" else 1)
    assert abs(measured - expected) <= 0.25, measured


@pytest.mark.parametrize("scenery", FACTORS["scenery"])
def test_far_layers_pass_more_slowly(scenery):
    """What is drawn once into each layer moves by parallax: the upper picture changes less from frame to frame."""
    video = render(replace(PLAIN, scenery=scenery, speed="fast"), 2, 48).astype(int)
    change = np.abs(np.diff(video, axis=0)).mean((0, 2, 3))
    assert change[:18].mean() < 0.5 * change[36:60].mean()


def test_left_mirrors_right():
    left = render(replace(PLAIN, direction="left"), 6, 8)
    np.testing.assert_array_equal(left, render(PLAIN, 6, 8)[:, :, ::-1])


def test_a_tenth_of_the_combinations_is_held_out():
    sizes = {split: len(combinations(split)) for split in SPLITS}
    assert sum(sizes.values()) == np.prod([len(values) for values in FACTORS.values()]) == 3240
    assert 0.08 < sizes["held_out"] / 3240 < 0.12
    assert not set(combinations("train")) & set(combinations("held_out"))
    # a fixed choice: other machines, other Python versions and PYTHONHASHSEED make no difference
    assert held_out(combinations("held_out")[0]) and sizes["held_out"] == 329
    for name, values in FACTORS.items():
        for split in SPLITS:
            counts = Counter(getattr(factors, name) for factors in combinations(split))
            share = {value: counts[value] / sizes[split] * len(values) for value in values}
            assert min(share.values()) > (0.95 if split == "train" else 0.6), (split, share)


def test_clips_of_a_split_are_its_own_and_vary():
    for split in SPLITS:
        clips = [clip_factors(index, 0, split) for index in range(500)]
        assert all(held_out(factors) == (split == "held_out") for factors, _ in clips)
        assert len({seed for _, seed in clips}) == 500
        assert clips[3] == clip_factors(3, 0, split) != clip_factors(3, 1, split)
    assert len({factors for factors, _ in [clip_factors(index, 0, "train") for index in range(500)]}) > 400


@pytest.mark.parametrize("time", FACTORS["time"])
@pytest.mark.parametrize("weather", FACTORS["weather"])
def test_six_colours_can_be_told_apart(time, weather):
    """The bodies' colours lie at least 45 (of 255, Euclidean) apart, at every hour and in every weather."""
    for vehicle in FACTORS["vehicle"]:
        patches = []
        for colour in FACTORS["colour"]:
            video = render(Factors(vehicle, colour, "forest", time, weather, "right", "slow"), 8, 4)
            box = {"car": (47, 50, 24, 40), "bus": (46, 49, 18, 44), "truck": (38, 45, 16, 36)}[vehicle]
            patches.append(np.median(video[:, box[0] : box[1], box[2] : box[3]].reshape(-1, 3), axis=0))
        gaps = [np.linalg.norm(a - b) for i, a in enumerate(patches) for b in patches[:i]]
        assert min(gaps) > 45, (vehicle, min(gaps))


def test_weather_and_time_show():
    def mean(**change):
        return render(replace(PLAIN, **change), 12, 4).mean()

    day, sunset, night = (mean(time=time) for time in FACTORS["time"])
    assert day > sunset + 20 and sunset > night + 20
    clear = render(PLAIN, 12, 4).astype(float)
    rain, snow = (render(replace(PLAIN, weather=weather), 12, 4).astype(float) for weather in ("rain", "snow"))
    assert np.ptp(rain[:, :16], axis=-1).mean() < 0.5 * np.ptp(clear[:, :16], axis=-1).mean()  # a grey sky
    assert snow[:, 40:46].mean() > clear[:, 40:46].mean() + 40  # a white ground


def test_wheels_turn():
    car = render(replace(PLAIN, speed="fast"), 12, 16)[:, 49:55, 20:44].astype(int)
    assert np.abs(np.diff(car, axis=0)).max(axis=(1, 2, 3)).min() > 20


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="colour: unknown value 'pink'; it is one of red"):
        Factors("car", "pink", "hills", "day", "clear", "right", "slow")
    with pytest.raises(ValueError, match="size: the world is drawn at 16, 32 or 64 pixels, not 48"):
        render(PLAIN, 0, 1, size=48)
    with pytest.raises(ValueError, match="at least 1 frame"):
        render(PLAIN, 0, 0)
    with pytest.raises(ValueError, match="split: unknown split 'test'"):
        combinations("test")


def test_a_stretch_of_landscape_does_not_depend_on_where_drawing_began():
    light = look("night", "snow")
    for layers in LAYERS.values():
        for draw, (top, bottom) in zip(layers, SPANS):
            whole, part = Canvas(-900, 2000, top, bottom - top), Canvas(117, 300, top, bottom - top)
            draw(whole, 21, light)
            draw(part, 21, light)
            np.testing.assert_allclose(whole.rgba[1017:1317], part.rgba, atol=2e-4)


def test_hashes_are_uniform_and_fixed():
    numbers = uniform(5, 6, np.arange(-2000, 2000), 4)
    assert numbers.min() >= 0 and numbers.max() < 1
    np.testing.assert_allclose(numbers.mean(0), 0.5, atol=0.03)
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.06
    assert len({hash_int(a, b) for a in range(40) for b in range(40)}) == 1600
    assert hash_int(1, 2, 3) == hash_int(1, 2, 3) != hash_int(3, 2, 1)
