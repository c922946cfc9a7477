"""When a prompt reaches the picture: receipts, transitions and the log, against brute force (StreamDiT §8)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamdit_jax import stream as streaming
from streamdit_jax.errors import ConfigError
from streamdit_jax.partition import FILLINGS, PartitionScheme, Refill
from streamdit_jax.steering import Steering, mix
from streamdit_jax.timetable import Timetable

FRAME = (1, 1, 1)
LATENT_FRAMES = 4
SCHEMES = ["N4c2s3", "N3c1s1", "K2N3c2s2", "K3N2c2s1p2", "K2N1c3s4", "N1c4s2"]


def encode(prompt):
    """A text of one token that says a number."""
    return ((jnp.full((1, 1, 1), float(prompt)), jnp.ones((1, 1), bool)),)


def said(latents, text, levels, present=None):
    """A field that does what it is told: over its steps, a frame adds up what it was told, weighted by flow time."""
    [(sequence, mask)] = text
    told = jnp.sum(sequence[..., 0][:, None] * (mask if mask.ndim == 3 else mask[:, None]), axis=-1)
    return jnp.broadcast_to(told[..., None, None, None], latents.shape)


@functools.cache
def compiled(scheme, masked):
    return jax.jit(functools.partial(streaming.step, said, scheme=scheme, masked=masked))


def run(table, steering, changes, steps):
    """The share of 1 against 0 that each frame shown has heard. changes: {step: (prompt, over)}; receipts in order; and
    how many latent frames had been shown when the new prompt was first among the keys.
    """
    scheme = PartitionScheme(table.scheme.num_references, table.scheme.num_chunks, table.scheme.chunk_size, 1)
    step, K = compiled(scheme, streaming.is_masked(table.filling)), scheme.num_references
    given = jnp.zeros((1, K, *FRAME)) if table.given_references else None
    state = streaming.initial_state(
        jax.random.split(jax.random.key(0), 1), scheme, FRAME, table.filling, references=given
    )
    shown, receipts, touched = [np.zeros(K)] if table.given_references else [], [], None
    noise = {"chunks": [], "references": streaming.chunk_noise(state.keys, streaming.REFERENCE_NOISE, (K, *FRAME))}
    for now in range(steps):
        if now in changes:
            receipts.append(steering.change(now, *changes[now]))
        assert table.frames_shown(now) == LATENT_FRAMES * sum(map(len, shown))
        if touched is None and receipts and np.any(np.asarray(steering.text(now)[0][1])[..., -1]):
            touched = sum(map(len, shown))
        if table.renews(now):
            state = streaming.renew(state, scheme, table.renewal_level)
        row = table.row(now)
        condition = streaming.Condition(steering.text(now), steering.text(now), np.ones(1, np.float32))
        state, front = step(state, row, condition)
        if table.shows_references(now):
            shown.append(np.ravel(state.buffer[0, :K] - noise["references"][0]))
        if row.advance:
            number = len(noise["chunks"])
            noise["chunks"].append(streaming.chunk_noise(state.keys, number, front.shape[1:]))
            shown.append(np.ravel(front - noise["chunks"][-1]))
    return np.concatenate(shown), receipts, touched


@pytest.mark.parametrize("per_chunk", [False, True])
@pytest.mark.parametrize(
    "spelling, filling",
    [(s, f) for s in SCHEMES for f in (*FILLINGS, "given", "given doubling") if "given" not in f or s.startswith("K")],
)
def test_receipts_tell_when_a_prompt_is_seen(spelling, filling, per_chunk):
    """Every step of the filling and of two chunks, hard switches and interpolations: what the receipt says is what
    the frames have heard.
    """
    scheme = PartitionScheme.parse(spelling)
    kind = {"given": "uniform", "given doubling": "doubling"}.get(filling, filling)
    table = Timetable(scheme, kind, LATENT_FRAMES, given_references="given" in filling)
    fixed = scheme.num_references if table.given_references else 0
    last = table.fill_steps + 2 * scheme.micro_steps
    for at in sorted({0, 1, scheme.micro_steps, table.fill_steps, last - scheme.micro_steps, last - 1}):
        for over in [0] if per_chunk else [0, 2]:
            steering = Steering(table, encode, prompt="0", guidance=1, strength=0, per_chunk_prompts=per_chunk)
            steps = at + (over + scheme.num_chunks + 3) * scheme.micro_steps + table.fill_steps
            heard, [receipt], touched = run(table, steering, {at: ("1", over)}, steps)
            heard = heard[fixed:]
            if not per_chunk:  # in a batch of prompts per chunk others hear of it by way of the chunks that have it
                touched = int(np.argmax(heard > 1e-4)) + fixed
            complete = int(np.argmax(np.minimum.accumulate((heard > 1 - 1e-4)[::-1])[::-1])) + fixed
            assert receipt == (at, LATENT_FRAMES * touched, LATENT_FRAMES * complete), (at, over)
            if per_chunk:
                assert np.all((heard < 1e-4) | (heard > 1 - 1e-4)), "no frame hears two prompts"


@pytest.mark.parametrize("spelling", ["N4c2s3", "N3c1s1", "N1c4s2", "N2c3s2"])
@pytest.mark.parametrize("refill", ["1", "2:0.4", "1:1"])
def test_receipts_of_streams_that_are_filled_anew(spelling, refill):
    """Changes before, within and after the filling, alone and while the buffer is filled anew for another one."""
    scheme = PartitionScheme.parse(spelling)
    fill, s = Timetable(scheme, "doubling", 1).fill_steps, scheme.micro_steps
    chunks, anew = (
        Refill.parse(refill).chunks,
        len(streaming.refilling_rows(scheme, Refill.parse(refill).strength).adopt),
    )
    first = fill + s
    begin = first + (chunks + 1) * s  # of the renewal that the first change brings
    alone = [({at: ("1", over)}, over) for at in (0, 1, fill, first, first + s - 1) for over in (0, 2)]
    after = [begin - 1, begin, begin + 1, begin + anew // 2, begin + anew - 1, begin + anew, begin + anew + s]
    second = [({first: ("0.0", 0), at: ("1", over)}, over) for at in sorted(set(after)) for over in (0, 1)]
    for changes, over in alone + second:
        table = Timetable(scheme, "doubling", LATENT_FRAMES, refill=refill)
        steering = Steering(table, encode, prompt="0", guidance=1, strength=0)
        at = max(changes)
        steps = at + (over + chunks + scheme.num_chunks + 3) * s + fill + 2 * anew
        heard, receipts, _ = run(table, steering, changes, steps)
        touched = int(np.argmax(heard > 1e-4))
        complete = int(np.argmax(np.minimum.accumulate((heard > 1 - 1e-4)[::-1])[::-1]))
        assert receipts[-1] == (at, LATENT_FRAMES * touched, LATENT_FRAMES * complete), changes


def test_a_change_that_comes_early_takes_the_place_of_a_renewal():
    """A renewal that has not begun gives way to the next change's; one that has begun is brought to its end."""
    table = Timetable(PartitionScheme.parse("N4c2s2"), "doubling", 1, refill="2")
    at = table.fill_steps + 1
    table.follow(at, 0)
    [begin] = [step for step in range(at, at + 60) if table.renews(step)]
    assert begin == table.fill_steps + 6 and not table.row(begin - 1).advance and table.row(begin).enter.any()
    table.follow(begin - 1, 0)
    assert not table.renews(begin) and table.renews(begin + 4)
    table.follow(begin + 5, 0)
    length = len(streaming.refilling_rows(table.scheme).adopt)
    assert table.renews(begin + 4) and table.renews(begin + 4 + length + 4)
    steps = range(begin + 4, begin + 4 + length)
    assert [table.row(step).advance for step in steps] == [False] * (length - 1) + [True]
    assert [table.steps_until_frames(step) for step in steps] == list(range(length, 0, -1))


def test_a_receipt_after_a_year_is_as_soon_made():
    """A stream has no end, and what it is asked must not grow with its length."""
    table = Timetable(PartitionScheme.parse("N4c2s1"), "doubling", 1)
    at = table.fill_steps + 10**10
    assert table.receipt(at, 0) == (at, 2 * 10**10, 2 * 10**10 + 6)
    table = Timetable(PartitionScheme.parse("N4c2s1"), "doubling", 1, refill="1:0.5")
    for change in range(100):
        table.follow(at + 1000 * change, 0)
    assert len(table._renewals) <= 2


def test_an_interpolation_moves_by_micro_step_and_may_be_interrupted():
    table = Timetable(PartitionScheme.parse("N2c1s2"), "uniform", 1)
    steering = Steering(table, encode, prompt="0", guidance=1, strength=0)
    steering.change(10, "8", over=2)

    def told(step):
        return float(steering.text(step)[0][0].ravel()[0])

    assert [told(step) for step in range(10, 15)] == [2, 4, 6, 8, 8]
    steering = Steering(table, encode, prompt="0", guidance=1, strength=0)
    steering.change(10, "8", over=2)
    assert told(11) == 4
    steering.change(12, "12", over=1)
    assert [told(step) for step in range(12, 15)] == [8, 12, 12], "from where it was: half-way from 4 to 12"
    steering.change(15, "20", over=1)
    assert [told(step) for step in range(15, 17)] == [16, 20]
    steering.change(17, "1")
    assert told(17) == 1 and steering.prompt == "1"


def test_a_mixture_sees_the_tokens_of_both():
    """Padding counts as zero, whatever the encoder makes of it."""
    old = ((jnp.array([[[2.0], [4.0], [99.0]]]), jnp.array([[True, True, False]])),)
    new = ((jnp.array([[[6.0], [99.0], [99.0]]]), jnp.array([[True, False, False]])),)
    [(sequence, mask)] = mix(old, new, np.float32(0.25))
    assert sequence.ravel().tolist() == [3, 3, 0] and mask.tolist() == [[True, True, False]]


def test_with_prompts_per_chunk_a_third_prompt_takes_over_from_the_first():
    table = Timetable(PartitionScheme.parse("N4c1s1"), "uniform", 1)
    steering = Steering(table, encode, prompt="1", guidance=1, strength=0, per_chunk_prompts=True)

    def told(step):
        [(sequence, mask)] = steering.text(step)
        assert sequence.shape == (1, 2, 1) and mask.shape == (1, 4, 2) and (mask.sum(-1) == 1).all()
        return (sequence[..., 0][:, None] * mask).sum(-1)[0].tolist()

    fill = table.fill_steps
    assert told(fill) == [1, 1, 1, 1]
    steering.change(fill + 1, "2")
    assert [told(fill + 1), told(fill + 2)] == [[1, 1, 1, 2], [1, 1, 2, 2]]
    steering.change(fill + 3, "3")
    steering.change(fill + 3, "4")
    assert told(fill + 3) == [2, 2, 2, 4] and told(fill + 6) == [4, 4, 4, 4]
    with pytest.raises(ConfigError, match="over: must be 0"):
        steering.change(fill + 7, "5", over=1)


def test_a_log_keeps_what_counted_and_brings_another_steering_to_the_same_place():
    table = Timetable(PartitionScheme.parse("N2c1s2"), "uniform", 1)
    steering = Steering(table, encode, prompt="0", guidance=1, strength=0.5)
    for number in range(5):
        steering.set_guidance(3, number)
        steering.change(3, str(number), over=1)
        steering.set_strength(3, 0.1 * number)
    steering.change(4, "7", over=3)
    steering.change(6, "5")
    steering.change(6, "9", over=2)
    assert steering.events[0] == {"step": 3, "guidance": 4.0} and steering.events[2] == {"step": 3, "strength": 0.4}
    assert [event["prompt"] for event in steering.events if "prompt" in event] == ["4", "7", "5", "9"]
    calls = []
    other = Steering(table, lambda prompt: calls.append(prompt) or encode(prompt), prompt="0", guidance=1, strength=0.5)
    other.recall(steering.events)
    assert (other.guidance, other.strength, other.prompt) == (steering.guidance, steering.strength, "9")
    for step in (6, 7, 9, 10):
        assert jax.tree.map(np.array_equal, other.text(step), steering.text(step)) == ((True, True),)
    assert calls == ["0", "5", "9"], "what is no longer heard is not encoded again"


@pytest.mark.parametrize(
    "spelling, filling, refill, message",
    [
        ("N4c2s1", "uniform", "1", "refill: is done by doubling, and the filling is uniform"),
        ("K2N3c2s1", "doubling", "1", "refill: K2N3c2s1 has references"),
        ("N4c2s1", "doubling", "-1", "refill: CHUNKS"),
        ("N4c2s1", "doubling", 1.5, "refill: CHUNKS"),
        ("N4c2s1", "doubling", "2:1.5", "refill: from 0 to 10000 chunks and a strength from 0 to 1, not 2:1.5"),
    ],
)
def test_what_cannot_be_filled_anew(spelling, filling, refill, message):
    with pytest.raises(ValueError, match=message):
        Timetable(PartitionScheme.parse(spelling), filling, 1, refill=refill)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.set_guidance(0, float("nan")), "guidance: "),
        (lambda s: s.set_guidance(0, "much"), "guidance: "),
        (lambda s: s.set_strength(0, 1.5), "strength: "),
        (lambda s: s.set_strength(0, None), "strength: "),
        (lambda s: s.change(0, "1", over=-1), "over: "),
        (lambda s: s.change(0, "1", over=1.5), "over: "),
    ],
)
def test_impossible_changes_change_nothing(change, message):
    table = Timetable(PartitionScheme.parse("N2c1s2"), "uniform", 1)
    steering = Steering(table, encode, prompt="0", guidance=1, strength=0.5)
    with pytest.raises(ConfigError, match=message):
        change(steering)
    assert (steering.prompt, steering.guidance, steering.strength, steering.events) == ("0", 1, 0.5, [])
