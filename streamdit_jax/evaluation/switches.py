"""`streamdit evaluate switch`: how soon, and how surely, a stream shows what its prompt was changed to.

Each stream's prompt is changed in one factor, each factor in turn. A reading is of the last second of what was shown.
"""

from typing import Any

import numpy as np

from streamdit_jax.data import roadtrip
from streamdit_jax.data.captions import full_caption
from streamdit_jax.evaluation import probes
from streamdit_jax.evaluation.accuracy import JUDGED, chance, require_probe, wanted
from streamdit_jax.evaluation.batched import StreamBatch, groups
from streamdit_jax.pipeline import Pipeline

FACTORS = tuple(roadtrip.FACTORS)


def changed(factors: roadtrip.Factors, name: str, rng: np.random.Generator) -> roadtrip.Factors:
    """The same combination with another value of one factor."""
    others = [value for value in roadtrip.FACTORS[name] if value != getattr(factors, name)]
    return roadtrip.Factors(**{**vars(factors), name: others[rng.integers(len(others))]})


def switches(
    pipeline: Pipeline,
    prompts: int,
    seconds: float,
    seed: int,
    *,
    split: str = "held_out",
    batch: int = 8,
    **sampling: Any,
) -> dict[str, Any]:
    """Streams whose prompt is changed in one factor after `seconds`, followed for 2·N chunks.

    reached: the share of streams in which the changed factor is read as the new prompt says at the end of the 2·N
        chunks. already: the same share just before the change, by mistake or by chance; `chance` is what guessing
        would reach.
    frames_until_reached: median, over the streams that reached it, of the frames from the change to the end of the
        first reading from which on every reading says so; the last 16 of them are what that reading saw.
    unchanged: the share of the other factors of JUDGED that are read right at the end; `unchanged_before` just before
        the change.
    of: the same for each factor that was changed.
    """
    params = require_probe(pipeline)
    scheme = pipeline.scheme(sampling.get("scheme"))
    chunk = scheme.chunk_size * pipeline.config.tae.compression[0]
    follow, lead = 2 * scheme.num_chunks, max(probes.MIN_FRAMES, int(seconds * pipeline.frame_rate))
    rng = np.random.default_rng(seed)
    asked = wanted(split, prompts, seed)
    plan = [
        (factors, changed(factors, FACTORS[index % len(FACTORS)], rng), FACTORS[index % len(FACTORS)])
        for index, (factors, _) in enumerate(asked)
    ]
    outcomes = []
    for first, group, real in groups(plan, batch):
        streams = StreamBatch(
            pipeline,
            [full_caption(before) for before, _, _ in group],
            range(seed + first, seed + first + len(group)),
            **sampling,
        )
        outcomes += _follow(streams, params, group, lead, follow, chunk)[:real]
    return {
        "prompts": prompts,
        "split": split,
        "scheme": str(scheme),
        "guidance": streams.guidance,
        "filling": streams.filling,
        "refill": str(streams.refill),
        "batch": min(batch, prompts),
        "switched_after_seconds": lead / pipeline.frame_rate,
        "followed_chunks": follow,
        "followed_frames": follow * chunk,
        **_summary(outcomes),
        "of": {
            name: _summary(of_factor)
            for name in FACTORS
            if (of_factor := [outcome for outcome in outcomes if outcome["changed"] == name])
        },
        **chance(),
    }


def _follow(streams: StreamBatch, params: dict, group: list, lead: int, follow: int, chunk: int) -> list[dict]:
    """What became of each stream's change."""
    before, after, names = ([item[place] for item in group] for place in range(3))
    made, tail = 0, None

    def advance(tail):
        frames = next(streams)
        joined = frames if tail is None else np.concatenate([tail, frames], axis=1)
        return joined[:, -max(probes.MIN_FRAMES, frames.shape[1]) :], frames.shape[1]

    while made < lead:
        tail, count = advance(tail)
        made += count

    def read(factors):
        return probes.right(params, tail[:, -probes.MIN_FRAMES :], factors)

    old, new = read(before), read(after)
    streams.change([full_caption(factors) for factors in after])
    readings = []
    for _ in range(follow):
        tail, _ = advance(tail)
        readings.append(read(after))

    def outcome(index, name):
        says_so = np.array([reading[name][index] for reading in readings])
        wrong = np.flatnonzero(~says_so)
        others = [factor for factor in JUDGED if factor != name]
        return {
            "changed": name,
            "already": bool(new[name][index]),
            "reached": bool(says_so[-1]),
            "frames": chunk * int(wrong[-1] + 2 if len(wrong) else 1),
            "unchanged": float(np.mean([readings[-1][factor][index] for factor in others])),
            "unchanged_before": float(np.mean([old[factor][index] for factor in others])),
        }

    return [outcome(index, name) for index, name in enumerate(names)]


def _summary(outcomes: list[dict]) -> dict[str, Any]:
    def share(name):
        return round(float(np.mean([outcome[name] for outcome in outcomes])), 4)

    frames = [outcome["frames"] for outcome in outcomes if outcome["reached"]]
    return {
        "streams": len(outcomes),
        "reached": share("reached"),
        "already": share("already"),
        "frames_until_reached": float(np.median(frames)) if frames else None,
        "unchanged": share("unchanged"),
        "unchanged_before": share("unchanged_before"),
    }
