"""Where a run's time goes: seconds of each phase, and what share of all of it was training that lasted (goodput).

The clock is one state, the present phase, and knows no nesting. Phases: init (before the first step: data, shapes,
parameters), restore, compile, data (the device waits for a batch), step, checkpoint (the loop waits for a save),
sample.
"""

import itertools
import os
import time
from collections.abc import Callable
from typing import Any

from streamdit_jax.training.metrics import read_goodput

PHASES = ("init", "restore", "compile", "data", "step", "checkpoint", "sample")


class Clock:
    """Counts the seconds of each phase, from its making on."""

    def __init__(self, on_phase: Callable[[str], None] = lambda phase: None):
        """on_phase: is told of each change; the watch wants to know."""
        self._on_phase, self.started = on_phase, time.time()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since = PHASES[0], time.perf_counter()
        on_phase(self._phase)

    def enter(self, phase: str, *, hidden: bool = False) -> float:
        """Begins a phase. hidden: the one that ends now was no loss, because the device computed meanwhile: it counts
        as "step". Returns the seconds of the one that ends.
        """
        now = time.perf_counter()
        seconds = now - self._since
        self._seconds["step" if hidden else self._phase] += seconds
        self._phase, self._since = phase, now
        self._on_phase(phase)
        return seconds

    def seconds(self) -> dict[str, float]:
        """phase → seconds so far."""
        self.enter(self._phase)
        return dict(self._seconds)


def summary(directory: str | os.PathLike) -> dict[str, Any]:
    """What all starts of a stage took together, from its `metrics.jsonl`.

    Returns:
        {"starts", "seconds" (since the first start), each phase's seconds, "lost" (of steps that had to be repeated
        after a crash), "down" (between a start's last line and the next start), "goodput": (step − lost) /
        seconds}; empty without a start. What a crashed start did after its last line is in "down".
    """
    starts: dict[float, dict] = {line["started"]: line for line in read_goodput(directory)}
    if not starts:
        return {}
    lines = [starts[started] for started in sorted(starts)]
    phases = {phase: sum(line["seconds"][phase] for line in lines) for phase in PHASES}
    lost = 0.0
    for before, after in itertools.pairwise(lines):
        repeated = max(before["step"] - after["first_step"], 0)
        lost += before["seconds"]["step"] * repeated / max(before["step"] - before["first_step"], 1)
    total = lines[-1]["started"] + sum(lines[-1]["seconds"].values()) - lines[0]["started"]
    return {
        "starts": len(lines),
        "seconds": total,
        **phases,
        "lost": lost,
        "down": total - sum(phases.values()),
        "goodput": (phases["step"] - lost) / total,
    }
