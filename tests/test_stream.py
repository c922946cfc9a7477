"""The moving buffer: emission, shift, refill, filling; against closed forms and simple bookkeeping (StreamDiT §3.1,
§8).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamdit_jax import flow, stream
from streamdit_jax.partition import FILLINGS, PartitionScheme

FRAME = (1, 2, 3)
SCHEMES = ["N8c2s3", "N4c4s1", "N16c1s1", "N1c16s4", "K2N7c2s2", "K3N4c2s5p2", "K4N1c4s6", "K1N3c1s2", "K9N2c3s1"]


def condition(guidance=1.0, batch=1):
    text = jnp.zeros((batch, 1))
    return stream.Condition(text=text + 1, null_text=text, guidance=jnp.full((batch,), guidance))


def towards(target):
    """The velocity of the straight path from the present point to `target`: exact flow matching for a single data
    point.
    """

    def velocity(latents, text, levels, present=None):
        remaining = jnp.maximum(1 - levels, 1e-3)[..., None, None, None]
        return (target - latents) / remaining

    return velocity


def linear(latents, text, levels, present=None):
    """dX/dt = a·X + b·P: a stream under it is a product of (1 + a·Δt) a frame at a time."""
    return -0.7 * latents + 0.3 * text[:, :, None, None, None]


def closed_form(noise, levels):
    """Euler steps of `linear` for one frame through its levels, in float64."""
    x = noise.astype(np.float64)
    for now, then in zip(levels[:-1].astype(np.float64), levels[1:].astype(np.float64)):
        x = x + (then - now) * (-0.7 * x + 0.3)
    return x


@pytest.mark.parametrize("spelling", SCHEMES)
@pytest.mark.parametrize("filling", FILLINGS)
def test_stream_of_a_linear_field_equals_the_closed_form(spelling, filling):
    scheme, chunks = PartitionScheme.parse(spelling), 5
    keys = jax.random.split(jax.random.key(3), 2)
    out = np.asarray(stream.sample(linear, keys, condition(batch=2), scheme, FRAME, chunks, filling=filling))
    K, c = scheme.num_references, scheme.chunk_size
    expected = [stream.chunk_noise(keys, jnp.uint32(i), (c, *FRAME)) for i in range(chunks)]
    if filling != "ramp":
        expected.insert(0, stream.chunk_noise(keys, stream.REFERENCE_NOISE, (K, *FRAME)))
    expected = closed_form(np.concatenate(expected, axis=1), scheme.grid())
    assert out.shape == expected.shape
    np.testing.assert_allclose(out, expected, atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1.0, 2.0]))
def test_any_scheme_streams_the_closed_form(K, N, c, s, power):
    scheme = PartitionScheme(K, N, c, s, power)
    keys = jax.random.split(jax.random.key(0), 1)
    out = np.asarray(stream.sample(linear, keys, condition(), scheme, (1, 1, 1), 3))
    noise = np.concatenate(
        [stream.chunk_noise(keys, stream.REFERENCE_NOISE, (K, 1, 1, 1))]
        + [stream.chunk_noise(keys, jnp.uint32(i), (c, 1, 1, 1)) for i in range(3)],
        axis=1,
    )
    np.testing.assert_allclose(out, closed_form(noise, scheme.grid()), atol=1e-5)


def test_emission_order_and_count_over_a_thousand_chunks():
    """Every chunk leaves once, in order, as what its own noise becomes."""
    scheme = PartitionScheme.parse("K2N7c2s2")
    keys = jax.random.split(jax.random.key(1), 1)
    out = np.asarray(stream.sample(linear, keys, condition(), scheme, (1, 1, 1), 1000))
    noise = np.concatenate([stream.chunk_noise(keys, jnp.uint32(i), (2, 1, 1, 1)) for i in range(1000)], axis=1)
    assert out.shape[1] == 2 + 2000
    np.testing.assert_allclose(out[:, 2:], closed_form(noise, scheme.grid()), atol=1e-5)


@pytest.mark.parametrize("spelling", SCHEMES)
def test_stepping_equals_the_scan(spelling):
    """Rows applied one by one, as a live stream does, give what one scan gives, bit for bit in order of operations."""
    scheme, chunks = PartitionScheme.parse(spelling), 3
    keys = jax.random.split(jax.random.key(2), 1)
    whole = stream.sample(linear, keys, condition(), scheme, FRAME, chunks)
    step = jax.jit(functools.partial(stream.step, linear, scheme=scheme))
    state = stream.initial_state(keys, scheme, FRAME)
    pieces = []
    fill = stream.filling_rows(scheme)
    for index in range(len(fill.adopt)):
        state, _ = step(state, stream.row_at(fill, index), condition())
    pieces.append(state.buffer[:, : scheme.num_references])
    rows = stream.streaming_rows(scheme)
    for _ in range(chunks):
        for index in range(scheme.micro_steps):
            state, front = step(state, stream.row_at(rows, index), condition())
        pieces.append(front)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=1e-6)
    assert step._cache_size() == 1, "filling and streaming, any row, are one compiled step"


def test_guidance_levels_prompt_and_seed_never_recompile():
    step = jax.jit(functools.partial(stream.step, linear, scheme=PartitionScheme.parse("N4c2s1")))
    for seed, guidance, spelling in ((0, 1.0, "N4c2s1"), (1, 3.0, "N4c2s7"), (2, 0.0, "N4c2s2p3")):
        scheme = PartitionScheme.parse(spelling)
        state = stream.initial_state(jax.random.split(jax.random.key(seed), 1), scheme, FRAME)
        for row in (stream.filling_rows(scheme), stream.streaming_rows(scheme)):
            step(
                state,
                stream.row_at(row, 0),
                condition(guidance)._replace(text=jnp.full((1, 1), float(seed))),
            )
    assert step._cache_size() == 1


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 2.5])
def test_guidance_extrapolates_from_the_empty_prompt(guidance):
    """`linear` is b·P with P = 1 for the prompt and 0 for the empty one: guidance w must act as P = w."""
    scheme = PartitionScheme.parse("N3c1s2")
    keys = jax.random.split(jax.random.key(4), 1)
    guided = stream.sample(linear, keys, condition(guidance), scheme, FRAME, 2)
    plain = condition()._replace(text=jnp.full((1, 1), guidance))
    np.testing.assert_allclose(guided, stream.sample(linear, keys, plain, scheme, FRAME, 2), atol=1e-5)


def test_references_never_change_within_a_chunk_and_are_the_last_emitted():
    scheme = PartitionScheme.parse("K3N3c2s4")
    keys = jax.random.split(jax.random.key(5), 1)
    step = jax.jit(
        functools.partial(
            stream.step, lambda x, text, levels: jnp.full_like(x, jnp.nan).at[:, 3:].set(1.0), scheme=scheme
        )
    )
    state = stream.initial_state(keys, scheme, FRAME)._replace(
        buffer=jax.random.normal(jax.random.key(6), (1, 9, *FRAME))
    )
    rows, emitted = stream.streaming_rows(scheme), [state.buffer[:, :3]]
    for _ in range(4):
        references = state.buffer[:, :3]
        for index in range(4):
            assert np.array_equal(state.buffer[:, :3], references), "not even a NaN velocity touches a reference"
            state, front = step(state, stream.row_at(rows, index), condition())
        emitted.append(front)
        history = np.concatenate(emitted, axis=1)
        assert np.array_equal(state.buffer[:, :3], history[:, -3:])


def test_filling_takes_each_place_from_the_uniform_run(monkeypatch):
    """queue[K + j·c + r] = Z[(N−1−j)·s][K + j·c + r], references = Z[T][0:K] (§8, fig. 13)."""
    scheme = PartitionScheme.parse("K2N3c2s4")
    keys = jax.random.split(jax.random.key(7), 1)
    velocity = towards(0.5)
    state, snapshots = stream.initial_state(keys, scheme, FRAME), []
    fill = stream.filling_rows(scheme)
    x, grid = state.buffer, scheme.grid()
    snapshots.append(x)
    for k in range(scheme.total_steps):
        x = x + (grid[k + 1] - grid[k]) * velocity(x, None, jnp.full((1, 8), grid[k]))
        snapshots.append(x)
    for index in range(len(fill.adopt)):
        state, _ = stream.step(velocity, state, stream.row_at(fill, index), condition(), scheme)
    for j in range(3):
        place = slice(2 + 2 * j, 4 + 2 * j)
        np.testing.assert_allclose(state.buffer[:, place], snapshots[(2 - j) * 4][:, place], atol=1e-5)
    np.testing.assert_allclose(state.buffer[:, :2], snapshots[-1][:, :2], atol=1e-5)


def test_ramp_shows_the_model_only_frames_that_exist():
    scheme, seen = PartitionScheme.parse("K2N3c2s2"), []

    def velocity(latents, text, levels, present):
        jax.debug.callback(lambda p: seen.append(np.asarray(p[0])), present, ordered=True)
        return jnp.zeros_like(latents)

    stream.sample(velocity, jax.random.split(jax.random.key(0), 1), condition(), scheme, FRAME, 3, filling="ramp")
    jax.effects_barrier()
    chunks = [row[2:].reshape(3, 2).all(axis=1).tolist() for row in seen]
    assert chunks[:5] == [[True, False, False]] * 2 + [[True, True, False]] * 2 + [[True] * 3]
    assert not any(row[:2].any() for row in seen[:6]) and seen[6].all(), "references exist once chunks have left"


@pytest.mark.parametrize("spelling", ["N8c2s3", "K2N7c2s2p2", "N4c1s2", "K3N1c5s1"])
def test_doubling_makes_each_block_after_clean_ones(spelling):
    """Blocks of 1, 1, 2, 4, 8, … frames: while one is denoised, those before it are clean, those after it do not exist,
    and each place keeps the snapshot at its level.
    """
    scheme, seen = PartitionScheme.parse(spelling), []
    T, blocks = scheme.total_steps, [0, 1, 2, 2, 3, 3, 3, 3, *[4] * 8][: scheme.buffer_size]
    places = np.round(scheme.step_levels()[0] ** (1 / scheme.power) * T).astype(int)

    def velocity(latents, text, levels, present):
        jax.debug.callback(lambda p: seen.append(int(p[0].sum())), present, ordered=True)
        return coupled(latents, text, levels)

    keys, fill = jax.random.split(jax.random.key(7), 1), stream.filling_rows(scheme, "doubling")
    state = stream.initial_state(keys, scheme, FRAME, "doubling")
    x, expected, grid, lengths = state.buffer, np.array(state.buffer), scheme.grid(), []
    for block in range(max(blocks) + 1):
        inside = np.equal(blocks, block)
        for k in range(T if np.any(places[np.greater(blocks, block)]) else max(places[inside])):
            levels = jnp.where(inside, grid[k], np.less(blocks, block))[None]
            moved = (grid[k + 1] - grid[k]) * coupled(x, condition().text, levels)
            x = jnp.where(inside[:, None, None, None], x + moved, x)
            expected = np.where((inside & (places == k + 1))[:, None, None, None], x, expected)
            lengths.append(sum(np.less_equal(blocks, block)))
    for index in range(len(fill.adopt)):
        state, _ = stream.step(velocity, state, stream.row_at(fill, index), condition(), scheme, masked=True)
    jax.effects_barrier()
    np.testing.assert_allclose(state.buffer, expected, atol=1e-5)
    assert seen == lengths


@pytest.mark.parametrize("spelling", ["N8c2s3", "N4c1s2p2", "N1c8s2"])
def test_filling_anew_keeps_one_frame(spelling):
    """The first frame of what would have left is kept; the others are made after it of the noise that they were, and
    the stream goes on as if the buffer had always been so.
    """
    scheme, keys = PartitionScheme.parse(spelling), jax.random.split(jax.random.key(7), 2)
    c, s, T = scheme.chunk_size, scheme.micro_steps, scheme.total_steps
    rows = program(scheme, "doubling", 2)
    rows[-1] = rows[-1]._replace(advance=np.bool_(False))
    state = stream.initial_state(keys, scheme, FRAME, "doubling")
    noise = np.concatenate([stream.chunk_noise(keys, i, (c, *FRAME)) for i in range(1, scheme.num_chunks + 1)], axis=1)
    for row in rows:
        state, _ = stream.step(coupled, state, row, condition(batch=2), scheme)
    half = scheme.grid()[T // 2]
    mixed = flow.interpolate(state.buffer[:, :1], noise[:, :1], np.full((2, 1), half))
    np.testing.assert_allclose(stream.renew(state, scheme, half).buffer[:, :1], mixed, atol=1e-6)
    kept = np.asarray(state.buffer[:, :1])
    state = stream.renew(state, scheme)
    np.testing.assert_array_equal(state.buffer, np.concatenate([kept, noise[:, 1:]], axis=1))
    seen = []

    def velocity(latents, text, levels, present):
        jax.debug.callback(lambda *x: seen.append([np.asarray(y[0]) for y in x]), levels, present, ordered=True)
        return coupled(latents, text, levels)

    anew = stream.refilling_rows(scheme)
    for index in range(len(anew.adopt)):
        state, front = stream.step(velocity, state, stream.row_at(anew, index), condition(batch=2), scheme, masked=True)
    jax.effects_barrier()
    blocks = [0, 1, 2, 2, 3, 3, 3, 3, *[4] * 8][: scheme.buffer_size]
    for levels, present in seen:
        block = max(np.asarray(blocks)[present])
        assert np.array_equal(present, np.less_equal(blocks, block)) and np.all(levels[np.less(blocks, block)] == 1)
    np.testing.assert_array_equal(front[:, :1], kept)
    assert front.shape[1] == c and state.present.all() and np.all(state.next_chunk == scheme.num_chunks + 2)
    # What is left stands at the levels of streaming: a field that knows only the noise says how far each frame came.
    state = stream.renew(state._replace(buffer=jnp.zeros_like(state.buffer)), scheme)
    begun = np.asarray(state.buffer)
    for index in range(len(anew.adopt)):
        row = stream.row_at(anew, index)._replace(advance=np.bool_(False))
        state, _ = stream.step(lambda x, *_: jnp.ones_like(x), state, row, condition(batch=2), scheme)
    came = (np.asarray(state.buffer) - begun)[0, 1:, 0, 0, 0]
    steps = (scheme.num_chunks - scheme.chunk_ids()[1:]) * s
    np.testing.assert_allclose(came, scheme.grid()[np.minimum(steps, T)], atol=1e-5)


def test_a_frame_may_take_some_of_its_steps_again():
    """Filling anew at strength 0 begins after the first frame; beyond that, with the last of that frame's steps."""
    scheme = PartitionScheme.parse("N4c2s2p2")
    plain = stream.refilling_rows(scheme)
    for strength, steps in ((0.25, 2), (0.5, 4), (1.0, 8)):
        rows = stream.refilling_rows(scheme, strength)
        assert len(rows.adopt) == steps + len(plain.adopt)
        np.testing.assert_array_equal(rows.levels[:steps, :, 0].ravel()[::2], scheme.grid()[8 - steps : 8])
        for values, expected in zip(rows, plain):
            np.testing.assert_array_equal(values[steps:], expected)


def test_unknown_filling():
    with pytest.raises(ValueError, match="filling"):
        stream.filling_rows(PartitionScheme.parse("N2c1s1"), "magic")


# ---- independent streams in one batch ----


def program(scheme, filling, chunks):
    """The rows of a stream from its beginning, one by one."""
    fill, flow = stream.filling_rows(scheme, filling), stream.streaming_rows(scheme)
    rows = [stream.row_at(fill, index) for index in range(len(fill.adopt))]
    return rows + [stream.row_at(flow, index) for _ in range(chunks) for index in range(scheme.micro_steps)]


def same(before, after, index):
    """Whether a stream of a batch is bit for bit what it was."""
    pairs = zip(before._replace(keys=()), after._replace(keys=()))
    return all(np.array_equal(old[index], new[index]) for old, new in pairs if len(old))


def coupled(latents, text, levels, present=None):
    """A field in which every frame of a buffer feels the others, and none of another stream."""
    mean = jnp.mean(latents, axis=1, keepdims=True)
    return -0.7 * latents + 0.5 * jnp.tanh(mean) + (0.3 * text + levels)[:, :, None, None, None]


@pytest.mark.parametrize("spelling", ["N4c2s2", "K2N3c1s3p2"])
def test_streams_of_a_batch_join_leave_and_keep_their_own_phase(spelling):
    """Three streams join one by one and pause at will; each one's frames are those it has alone."""
    scheme, chunks = PartitionScheme.parse(spelling), 3
    keys, prompts = jax.random.split(jax.random.key(8), 3), jnp.array([[1.0], [2.0], [-1.0]])
    rows = program(scheme, "uniform", chunks)
    step = jax.jit(functools.partial(stream.step, coupled, scheme=scheme))

    def steered(prompts):
        return stream.Condition(prompts, jnp.zeros_like(prompts), jnp.full(len(prompts), 1.5))

    def alone(index):
        state, out = stream.initial_state(keys[index : index + 1], scheme, FRAME), []
        for row in rows:
            state, front = step(state, row, steered(prompts[index : index + 1]))
            out += [state.buffer[:, : scheme.num_references]] if row.adopt else [front] if row.advance else []
        return np.concatenate(out, axis=1)[0]

    state = stream.initial_state(keys, scheme, FRAME)
    done, outs, rng = [0, 0, 0], [[], [], []], np.random.default_rng(0)
    together, now = jax.jit(functools.partial(stream.step, coupled, scheme=scheme)), 0
    while min(done) < len(rows):
        turn = [now >= 2 * i and done[i] < len(rows) and (rng.uniform() < 0.6 or i == 0) for i in range(3)]
        mine = [rows[done[i]] if turn[i] else stream.idle_row(scheme) for i in range(3)]
        before, (state, front) = state, together(state, stream.stack_rows(mine), steered(prompts))
        for i in range(3):
            if turn[i]:
                row, done[i] = rows[done[i]], done[i] + 1
                kept = state.buffer[i, : scheme.num_references] if row.adopt else front[i] if row.advance else None
                outs[i] += [] if kept is None else [kept]
            else:
                assert same(before, state, i)
        now += 1
    assert together._cache_size() == 1
    for i in range(3):
        np.testing.assert_allclose(np.concatenate(outs[i]), alone(i), atol=1e-5)


def test_an_idle_row_ignores_even_nan():
    scheme = PartitionScheme.parse("K1N3c2s2")
    state = stream.initial_state(jax.random.split(jax.random.key(0), 2), scheme, FRAME)
    rows = stream.stack_rows([stream.idle_row(scheme), stream.row_at(stream.streaming_rows(scheme), 1)])
    after, _ = stream.step(lambda x, *_: jnp.full_like(x, jnp.nan), state, rows, condition(batch=2), scheme)
    assert same(state, after, 0) and not same(state, after, 1)
    assert after.next_chunk.tolist() == [3, 4] and np.isnan(after.buffer[1, 1]).any()


# ---- video to video ----


@pytest.mark.parametrize(
    "spelling, strength", [("N4c2s3", 0.0), ("N4c2s3", 0.4), ("K2N3c1s4p2", 0.75), ("N1c4s4", 0.5), ("N4c2s3", 1.0)]
)
def test_held_frames_are_on_their_path_and_then_run_free(spelling, strength):
    """Below 1 − strength a frame is at t·x_in + (1 − (1 − σ)·t)·ε; above it, Euler steps of the model's velocity."""
    scheme = PartitionScheme.parse(spelling)
    K, c, N = scheme.num_references, scheme.chunk_size, scheme.num_chunks
    hold, grid = np.float32(1 - strength), scheme.grid()
    keys = jax.random.split(jax.random.key(9), 1)
    video = jax.random.normal(jax.random.key(10), (1, scheme.buffer_size + 2 * c, *FRAME))
    entering = video[:, scheme.buffer_size :]

    def source(latents):
        return stream.Source(latents, jnp.full(latents.shape[:2], hold))

    state = stream.initial_state(keys, scheme, FRAME, source=source(video[:, : scheme.buffer_size]))
    noise = np.concatenate(
        [state.buffer] + [stream.chunk_noise(keys, jnp.uint32(N + i), (c, *FRAME)) for i in range(2)], axis=1
    )
    step, out, entered = jax.jit(functools.partial(stream.step, linear, scheme=scheme)), [], 0
    levels = np.zeros(scheme.buffer_size, np.float32)
    for row in program(scheme, "uniform", 2):
        own = source(entering[:, min(entered, 1) * c :][:, :c])
        state, front = step(state, row, condition(), source=own)
        if row.adopt:
            out.append(state.buffer[:, :K])
        if row.advance:
            out.append(front)
            entered += 1
        else:  # what is still held lies exactly where it should
            levels = scheme.step_levels()[0] if row.adopt else row.levels[1]
            offset = entered * c
            t = levels[:, None, None, None]
            expected = t * video[0, offset:][: scheme.buffer_size] + (1 - (1 - 1e-5) * t) * noise[0, offset:][: len(t)]
            held = (levels <= hold) & (levels > 0)
            np.testing.assert_allclose(state.buffer[0][held], expected[held], atol=2e-5)
    out = np.concatenate(out, axis=1)
    held_steps = int(np.sum(grid[:-1] < hold))
    start = grid[held_steps]
    on_path = start * video + (1 - (1 - 1e-5) * start) * noise
    expected = closed_form(np.asarray(on_path), grid[held_steps:])[:, : out.shape[1]]
    np.testing.assert_allclose(out, expected, atol=3e-5)
    if strength == 0:
        np.testing.assert_allclose(out, video[:, : out.shape[1]], atol=3e-5)


@pytest.mark.parametrize("filling", FILLINGS)
@pytest.mark.parametrize("spelling", ["K2N3c2s2", "K2N1c3s2"])
def test_given_references_are_clean_from_the_first_step(spelling, filling):
    """They never change, nobody makes them, and the chunks that follow are those of the closed form."""
    scheme = PartitionScheme.parse(spelling)
    keys = jax.random.split(jax.random.key(11), 1)
    still = jax.random.normal(jax.random.key(12), (1, 2, *FRAME))
    seen = []

    def velocity(latents, text, levels, present=None):
        assert (present is None) == (filling == "uniform") == (not stream.is_masked(filling))
        jax.debug.callback(lambda *x: seen.append([np.asarray(y[0, :2]) for y in x]), latents, levels, ordered=True)
        return linear(latents, text, levels)

    state = stream.initial_state(keys, scheme, FRAME, filling, references=still)
    fill = stream.filling_rows(scheme, filling, given_references=True)
    steps = (scheme.num_chunks - 1) * scheme.micro_steps
    # Doubling: frames 2 and 3 to the end, then 4 to 7 as far as the first of them must be.
    assert len(fill.adopt) == (steps if filling != "doubling" else 8 if scheme.num_chunks > 1 else 0)
    rows = [stream.row_at(fill, i) for i in range(len(fill.adopt))] + program(scheme, filling, 1)[-scheme.micro_steps :]
    for row in rows:
        assert state.present[:, :2].all()
        state, front = stream.step(velocity, state, row, condition(), scheme, masked=stream.is_masked(filling))
    jax.effects_barrier()
    assert all(np.array_equal(latents, still[0]) and (levels == 1).all() for latents, levels in seen)
    expected = closed_form(np.asarray(stream.chunk_noise(keys, 0, (scheme.chunk_size, *FRAME))), scheme.grid())
    np.testing.assert_allclose(front, expected, atol=1e-5)
