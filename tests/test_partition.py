"""Schemes, levels, segments and mixtures against the formulas of StreamDiT §3.2."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamdit_jax.partition import PartitionScheme, Refill, draw_levels, mixture


@st.composite
def schemes(draw, largest=32):
    references = draw(st.integers(0, 8))
    size = draw(st.integers(1, largest - references))
    chunks = draw(st.integers(1, (largest - references) // size))
    power = draw(st.sampled_from([1.0, 0.5, 2.0, 1.7]))
    return PartitionScheme(references, chunks, size, draw(st.integers(1, 16)), power)


@given(schemes())
def test_step_levels_follow_the_index_arithmetic(scheme):
    K, N, c, s = scheme.num_references, scheme.num_chunks, scheme.chunk_size, scheme.micro_steps
    levels = scheme.step_levels()
    assert levels.shape == (s + 1, scheme.buffer_size) and levels.dtype == np.float32
    for m in range(s + 1):
        for f in range(scheme.buffer_size):
            k = s * N if f < K else (N - 1 - (f - K) // c) * s + m
            assert levels[m, f] == np.float32((k / (s * N)) ** scheme.power)
    # A chunk ends where the one before it began, the first ends clean, the last begins as noise.
    assert np.array_equal(levels[-1, K + c :], levels[0, K : K + (N - 1) * c])
    assert np.all(levels[-1, K : K + c] == 1) and np.all(levels[0, -c:] == 0) and np.all(levels[:, :K] == 1)
    assert np.all(np.diff(levels, axis=1) <= 0) and np.all(np.diff(levels[:, K:], axis=0) > 0)


@given(schemes())
def test_training_supports_every_level_the_sampler_visits(scheme):
    low, high = scheme.segment_bounds().T
    visited = scheme.step_levels()
    assert np.all((low <= visited) & (visited <= high))
    segments = scheme.segment_bounds()[scheme.num_references :: scheme.chunk_size]
    assert np.array_equal(segments[1:, 1], segments[:-1, 0]) and segments[0, 1] == 1 and segments[-1, 0] == 0


@given(schemes())
def test_spelling_round_trips(scheme):
    assert PartitionScheme.parse(str(scheme)) == scheme


def test_spelling():
    assert str(PartitionScheme(0, 8, 2, 16)) == "N8c2s16" and str(PartitionScheme(2, 7, 2, 16)) == "K2N7c2s16"
    assert PartitionScheme.parse("N4c4s1p2.5").power == 2.5


@pytest.mark.parametrize(
    "spelling", ["", "N8c2", "N0c2s1", "N8c0s1", "N8c2s0", "n8c2s1", "K-1N8c2s1", "N8c2s1 ", "N8c2s1p0", None, 8]
)
def test_bad_spellings_raise(spelling):
    with pytest.raises(ValueError):
        PartitionScheme.parse(spelling)


@pytest.mark.parametrize(
    "fields", [(-1, 8, 2, 1), (0, 0, 2, 1), (0, 8, 0, 1), (0, 8, 2, 0), (0, 8, 2, 1.5), (0, 8, 2, True)]
)
def test_impossible_schemes_name_the_field(fields):
    with pytest.raises(ValueError, match=r"num_references|num_chunks|chunk_size|micro_steps"):
        PartitionScheme(*fields)


@given(schemes(), st.integers(1, 8))
def test_ramp_levels_end_as_the_full_buffer(scheme, present):
    assert np.array_equal(scheme.ramp_levels(scheme.num_chunks), scheme.step_levels())
    present = min(present, scheme.num_chunks)
    levels, ids = scheme.ramp_levels(present), scheme.chunk_ids()
    assert np.all(levels[0, ids == present - 1] == 0), "the youngest chunk starts from noise"
    if present < scheme.num_chunks:
        after = scheme.ramp_levels(present + 1)
        there = (ids >= 0) & (ids < present)
        assert np.array_equal(levels[-1, there], after[0, there]), "the next stage goes on where this one ended"


@settings(max_examples=25, deadline=None)
@given(schemes(16), st.integers(0, 2**31 - 1), st.booleans())
def test_drawn_levels_stay_in_their_segments(scheme, seed, shared):
    table = mixture([(scheme, 1.0)], shared_offset=float(shared))
    drawn = jax.tree.map(np.asarray, draw_levels(jax.random.key(seed), table, 32))
    low, high = scheme.segment_bounds().T
    assert np.all(drawn.levels >= low - 1e-6) and np.all(drawn.levels <= high + 1e-6)
    assert (
        np.array_equal(drawn.scored, np.broadcast_to(scheme.chunk_ids() >= 0, drawn.scored.shape))
        and drawn.present.all()
    )
    of_frames = drawn.levels[:, scheme.num_references :].reshape(32, scheme.num_chunks, scheme.chunk_size)
    assert np.all(of_frames == of_frames[:, :, :1]), "the frames of a chunk share their level"
    u = of_frames[:, :, 0] ** (1 / scheme.power) * scheme.num_chunks
    offsets = u - np.arange(scheme.num_chunks)[::-1]
    if scheme.num_chunks > 1:
        assert (np.ptp(offsets, axis=1).max() < 1e-2) == shared, "one offset for all chunks, or one for each"


def test_a_mixture_draws_by_weight_and_compiles_once():
    eight, four, ordinary = (PartitionScheme.parse(x) for x in ("N8c2s1", "N4c4s1", "N1c16s1"))
    before = draw_levels._cache_size()
    table = mixture([(eight, 3), (four, 1)], uniform_share=0.2)
    levels = np.asarray(draw_levels(jax.random.key(0), table, 4096).levels)
    distinct = np.array([len(np.unique(row)) for row in levels])
    for count, share in ((8, 0.6), (4, 0.2), (1, 0.2)):
        assert abs(np.mean(distinct == count) - share) < 0.03
    # Other schemes, weights and shares are other data to the same compiled function.
    draw_levels(
        jax.random.key(1), mixture([(ordinary, 1), (four, 5)], uniform_share=0.5, shared_offset=1.0, ramp=0.3), 4096
    )
    assert draw_levels._cache_size() == before + 1
    # Once for the batch: every example has the same scheme, each with offsets of its own.
    levels = np.asarray(draw_levels(jax.random.key(3), table, 64, per_example=False).levels)
    assert len({len(np.unique(row)) for row in levels}) == 1 and len(np.unique(levels[:, 0])) == 64


def test_rows_do_not_depend_on_the_size_of_the_batch():
    table = mixture([(PartitionScheme.parse("N8c2s1"), 1)], uniform_share=0.3, shared_offset=0.5)
    whole = draw_levels(jax.random.key(5), table, 8)
    part = draw_levels(jax.random.key(5), table, 3)
    assert np.array_equal(whole.levels[:3], part.levels)


def test_ramping_examples_hide_the_tail_and_visit_ramp_levels():
    scheme = PartitionScheme.parse("K1N5c3s1")
    drawn = jax.tree.map(np.asarray, draw_levels(jax.random.key(0), mixture([(scheme, 1)], ramp=1.0), 256))
    ids = scheme.chunk_ids()
    for levels, scored, present in zip(*drawn):
        r = len(np.unique(ids[present & (ids >= 0)]))
        assert np.array_equal(scored, (ids >= 0) & (ids < r))
        assert np.array_equal(present, scored | ((ids < 0) & (r == 5)))
        for j in range(r):
            assert (r - 1 - j) / 5 - 1e-6 <= levels[ids == j][0] <= (r - j) / 5 + 1e-6


@pytest.mark.parametrize(
    "entries, options, message",
    [
        ([], {}, "entries"),
        ([("N8c2s1", 1), ("N8c1s1", 1)], {}, "tile the same buffer"),
        ([("N8c2s1", -1)], {}, "weights"),
        ([("N8c2s1", 0)], {}, "weights"),
        ([("N8c2s1", 1)], {"uniform_share": 1.5}, "uniform_share"),
        ([("N8c2s1", 1)], {"shared_offset": -0.1}, "shared_offset"),
    ],
)
def test_bad_mixtures_name_the_mistake(entries, options, message):
    with pytest.raises(ValueError, match=message):
        mixture([(PartitionScheme.parse(spelling), weight) for spelling, weight in entries], **options)


def test_plain_text_to_video_draws_logit_normal_levels_and_no_other_scheme_does():
    """Movie Gen §3.1.2: the logit of t is a standard normal. Same keys: other schemes draw the same bits."""
    plain, extension, chunks = (PartitionScheme.parse(x) for x in ("N1c16s1", "K8N1c8s1", "N8c2s1"))
    key, entries = jax.random.key(0), [(plain, 1), (extension, 1), (chunks, 1)]
    before, after = (draw_levels(key, mixture(entries, logit_normal=flag), 6000) for flag in (False, True))
    assert np.array_equal(before.scored, after.scored)
    of_plain = np.array([len(np.unique(row)) == 1 for row in np.asarray(before.levels)])
    assert 1800 < of_plain.sum() < 2200 and np.array_equal(before.levels[~of_plain], after.levels[~of_plain])

    uniform, drawn = (np.sort(np.asarray(x.levels)[of_plain, 0]) for x in (before, after))
    logits = np.log(drawn / (1 - drawn))
    # Quantiles of N(0, 1); five standard errors of the middle ones, of 2000 draws, are 0.16.
    for share, quantile in ((0.1, -1.2816), (0.25, -0.6745), (0.5, 0.0), (0.75, 0.6745), (0.9, 1.2816)):
        assert abs(np.quantile(logits, share) - quantile) < 0.2
        assert abs(np.quantile(uniform, share) - share) < 0.06
    shares = mixture([(chunks, 1)], uniform_share=1.0, logit_normal=True)
    drawn = np.asarray(draw_levels(key, shares, 4000).levels)
    assert np.array_equal(drawn[:, 0], drawn[:, 15]) and abs(np.mean((drawn > 0.25) & (drawn < 0.75)) - 0.728) < 0.04


def test_a_refill_is_spelled_and_read():
    for spelling, chunks, strength in (("0", 0, 0.0), ("4", 4, 0.0), ("2:0.875", 2, 0.875), ("1:1", 1, 1.0)):
        assert Refill.parse(spelling) == Refill(chunks, strength) and str(Refill(chunks, strength)) == spelling
    for spelling in ("", "2:", "a", "-1", "2:-1", "1.5", "2:2", "20000", None):
        with pytest.raises(ValueError, match="refill: "):
            Refill.parse(spelling)
