"""Multistep distillation against closed forms, and against the sampler whose steps it merges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamdit_jax import distill, stream
from streamdit_jax.partition import FILLINGS, PartitionScheme

SHAPE = (2, 8, 2, 2, 3)
schemes = st.sampled_from(["N4c2s1", "N8c1s1", "N2c4s2", "K2N3c2s1", "N4c2s4p2", "N1c8s8"]).map(PartitionScheme.parse)


def normal(seed, shape=SHAPE):
    return jax.random.normal(jax.random.key(seed), shape)


def condition(guidance=1.0, text=0.0, null=0.0):
    full = jnp.full((SHAPE[0], 1), 1.0)
    return stream.Condition(text * full, null * full, jnp.full(SHAPE[0], guidance))


def linear(rate):
    """u = (rate + text) · X: Euler steps of it multiply."""
    return lambda latents, text, levels: (rate + text[:, :, None, None, None]) * latents


@settings(max_examples=6, deadline=None)
@given(schemes, st.integers(1, 5), st.floats(0.5, 3))
def test_a_linear_teacher_has_a_closed_form(scheme, steps, guidance):
    start = distill.starts(scheme, steps)
    levels = jnp.asarray(np.stack([start.streaming.levels[0], start.fillings["uniform"].levels[-1]]))
    begin = normal(0)
    target = distill.segment_target(linear(-0.7), begin, levels, condition(guidance, text=0.4, null=-0.2))
    rate = -0.7 + (-0.2 + guidance * (0.4 + 0.2))
    deltas = np.diff(np.asarray(levels, np.float64), axis=1)
    moved = deltas.sum(1)
    factor = np.prod(1 + rate * deltas, axis=1) - 1
    expected = np.where(moved > 0, factor / np.where(moved > 0, moved, 1), 0)[..., None, None, None] * begin
    np.testing.assert_allclose(target, expected, rtol=2e-4, atol=2e-5)


@settings(max_examples=20, deadline=None)
@given(schemes, st.integers(1, 4))
def test_starts_are_the_levels_of_the_sampler(scheme, steps):
    """Every step that the student's stream or its filling takes is one the student was taught; and its first and last
    level are those of the teacher's finer grid.
    """
    start = distill.starts(scheme, steps)
    rows, streaming = stream.streaming_rows(scheme), start.streaming.levels
    np.testing.assert_array_equal(streaming[:, 0], rows.levels[:, 0])
    np.testing.assert_array_equal(streaming[:, -1], rows.levels[:, 1])
    chunks = scheme.chunk_ids() >= 0
    filling = stream.filling_rows(scheme, "uniform").levels
    taken = {tuple(pair[:, -1]) for pair in filling}
    taught = {(levels[0, -1], levels[-1, -1]) for levels in start.fillings["uniform"].levels}
    assert taken <= taught
    assert np.all(np.diff(streaming[..., chunks], axis=1) > 0) and np.all(streaming[..., ~chunks] == 1)
    scored = np.asarray(distill.draw_starts(jax.random.key(0), start, 4, {"uniform": 0.5}).scored)
    np.testing.assert_array_equal(scored, np.broadcast_to(chunks, scored.shape))


def test_one_teacher_step_is_its_guided_velocity():
    scheme = PartitionScheme.parse("N4c2s1")
    levels = jnp.asarray(np.repeat(distill.starts(scheme, 1).streaming.levels, 2, axis=0))
    guided = condition(2.0, text=0.4, null=-0.2)
    velocity = stream.guided_velocity(linear(0.1), normal(0), levels[:, 0], guided, None)
    target = distill.segment_target(linear(0.1), normal(0), levels, guided)
    np.testing.assert_allclose(target, velocity, rtol=1e-4, atol=1e-5)
    same = distill.consistency_target(linear(0.1), linear(9.0), normal(0), levels, jnp.zeros(2, int), guided)
    np.testing.assert_allclose(same, velocity, rtol=1e-4, atol=1e-5)


def test_consistency_of_a_student_that_knows_is_the_segment():
    """Where the student's own velocity already is the average of the rest of the segment, both targets agree."""
    scheme = PartitionScheme.parse("N4c2s1")
    levels = jnp.asarray(np.repeat(distill.starts(scheme, 3).streaming.levels, 2, axis=0))
    rest = levels[:, 1:]

    def student(latents, text, now):
        return distill.segment_target(linear(0.3), latents, rest, condition())

    place = jnp.zeros(2, int)
    ours = distill.consistency_target(linear(0.3), student, normal(0), levels, place, condition())
    np.testing.assert_allclose(
        ours, distill.segment_target(linear(0.3), normal(0), levels, condition()), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("method", ["segment", "consistency"])
def test_no_gradient_reaches_the_teacher_or_the_target(method):
    scheme = PartitionScheme.parse("N4c2s1")
    levels = jnp.asarray(np.repeat(distill.starts(scheme, 2).streaming.levels, 2, axis=0))

    def loss(teacher, student):
        if method == "segment":
            target = distill.segment_target(linear(teacher), normal(0), levels, condition(2.0, 0.4))
        else:
            place = jnp.ones(2, int)
            target = distill.consistency_target(
                linear(teacher), linear(student), normal(0), levels, place, condition(2.0, 0.4)
            )
        return jnp.mean(jnp.square(linear(student)(normal(0), condition().text, None) - target))

    frozen = jax.grad(loss)(0.3, 0.1)
    assert frozen == 0.0
    learns = jax.grad(loss, argnums=1)(0.3, 0.1)
    only_prediction = jax.grad(
        lambda student, target: jnp.mean(jnp.square(linear(student)(normal(0), condition().text, None) - target))
    )
    if method == "segment":
        target = distill.segment_target(linear(0.3), normal(0), levels, condition(2.0, 0.4))
    else:
        target = distill.consistency_target(
            linear(0.3), linear(0.1), normal(0), levels, jnp.ones(2, int), condition(2.0, 0.4)
        )
    np.testing.assert_allclose(learns, only_prediction(0.1, target), rtol=1e-4)
    assert learns != 0


@pytest.mark.parametrize("spelling", ["N4c2s1", "N2c4s2", "K2N3c2s1"])
def test_a_rollout_is_streaming(spelling):
    """After n cycles a rolled-out buffer is the one that `stream.step` holds; the others stop where they should."""
    scheme = PartitionScheme.parse(spelling)
    keys = jax.random.split(jax.random.key(3), 2)
    begin, cycles = normal(1), jnp.array([2, 3])
    rolled = distill.rollout(linear(-0.4), begin, keys, cycles, condition().text, scheme, 4)
    state = stream.initial_state(keys, scheme, SHAPE[2:])
    state = state._replace(buffer=begin, next_chunk=jnp.zeros_like(state.next_chunk))
    rows = stream.streaming_rows(scheme)
    for cycle in range(3):
        for micro in range(scheme.micro_steps):
            state, _ = stream.step(linear(-0.4), state, stream.row_at(rows, micro), condition(), scheme)
        if cycle == 1:
            np.testing.assert_allclose(rolled[0], state.buffer[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rolled[1], state.buffer[1], rtol=1e-5, atol=1e-6)


def test_shares_of_starts():
    start = distill.starts(PartitionScheme.parse("N4c2s2"), 2)
    for shares, bank in (({}, start.streaming), *(({filling: 1}, start.fillings[filling]) for filling in FILLINGS)):
        levels, present, scored = map(np.asarray, distill.draw_starts(jax.random.key(0), start, 256, shares))
        drawn = {levels[i].tobytes() for i in range(256)}
        assert drawn == {walk.tobytes() for walk in bank.levels}  # all of them, and nothing else
        assert present.all() == bank.present.all() == ("ramp" not in shares and "doubling" not in shares)
        assert np.array_equal(scored, present & (levels[:, 0] < levels[:, -1]))
    shares = {"uniform": 0.3, "ramp": 0.5}
    levels, present, _ = map(np.asarray, distill.draw_starts(jax.random.key(0), start, 900, shares))
    assert abs((levels == levels[..., :1]).all((1, 2)).mean() - 0.3) < 0.05
    assert abs((~present.all(1)).mean() - 0.5) < 0.05
    shares = {"uniform": 0.3, "ramp": 0.3, "doubling": 0.2}
    levels, present, _ = map(np.asarray, distill.draw_starts(jax.random.key(0), start, 900, shares))
    assert abs((levels == levels[..., :1]).all((1, 2)).mean() - 0.3) < 0.05
    # Its blocks take 8, 8, 8 and 2 steps; after the first the first frame is clean.
    assert abs((levels[:, 0, 0] == 1).mean() - 0.2 * 18 / 26) < 0.04


@pytest.mark.parametrize("spelling", ["N4c2s2", "K2N3c2s1p2", "N1c8s2"])
@pytest.mark.parametrize("filling", ["ramp", "doubling"])
def test_a_filling_is_taught_as_it_is_taken(spelling, filling):
    """Levels and frames that exist are those of the rows by which a buffer fills."""
    scheme = PartitionScheme.parse(spelling)
    start, rows = distill.starts(scheme, 3), stream.filling_rows(scheme, filling)
    bank, present = start.fillings[filling]
    np.testing.assert_array_equal(present, np.logical_or.accumulate(rows.enter, axis=0))
    np.testing.assert_array_equal(bank[:, 0], rows.levels[:, 0])
    np.testing.assert_array_equal(bank[:, -1], rows.levels[:, 1])
    drawn = distill.draw_starts(jax.random.key(0), start, 3, {filling: 1.0})
    assert np.all(drawn.present) == (scheme.num_chunks == 1)


def test_teacher_steps_below_one_are_refused():
    with pytest.raises(ValueError, match="teacher_steps"):
        distill.starts(PartitionScheme.parse("N4c2s1"), 0)


def test_a_student_of_one_step_runs_one_forward_per_chunk():
    """Counted where it runs, in the compiled step: 1 for the unguided student, against 2·s for its teacher."""
    counted = []

    def velocity(latents, text, levels):
        jax.debug.callback(lambda size: counted.append(int(size)), len(latents))
        return -0.1 * latents

    def forwards(spelling, guidance):
        scheme = PartitionScheme.parse(spelling)
        run = jax.jit(
            lambda state, row, condition: stream.step(velocity, state, row, condition, scheme), donate_argnums=0
        )
        state = stream.initial_state(jax.random.split(jax.random.key(0), 1), scheme, SHAPE[2:])
        rows, counted[:] = stream.streaming_rows(scheme), []
        steer = stream.Condition(jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.full(1, guidance))
        for micro in range(scheme.micro_steps):
            state, _ = run(state, stream.row_at(rows, micro), steer)
        jax.block_until_ready(state)
        jax.effects_barrier()
        return sum(counted)  # a guided forward is one of twice the batch

    assert forwards("N4c2s1", 1.0) == 1
    assert forwards("N4c2s16", 3.0) == 32


def test_what_stands_still_has_no_velocity():
    levels = jnp.ones((2, 4, 8))
    assert not np.any(distill.segment_target(linear(0.3), normal(0), levels, condition()))
