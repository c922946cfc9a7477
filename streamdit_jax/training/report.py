"""What a stage tells while it runs: metrics when they are due, rates, the share of the hardware's peak, and goodput."""

from collections import deque
from collections.abc import Callable, Mapping

import jax

from streamdit_jax.machine import peak_flops_per_second
from streamdit_jax.training.goodput import Clock
from streamdit_jax.training.metrics import MetricsWriter
from streamdit_jax.training.watch import Watch


class Report:
    """Reads metrics when they are due, and tells them to the file and to a person."""

    def __init__(
        self,
        name: str,
        stage,
        start: int,
        clock: Clock,
        watch: Watch,
        writer: MetricsWriter | None,
        say: Callable[[str], None],
    ):
        """start: steps done. writer: on the first process only."""
        self._name, self._stage, self._clock, self._watch, self._writer, self._say = (
            name,
            stage,
            clock,
            watch,
            writer,
            say,
        )
        self._start = self._since = start
        self._before = clock.seconds()
        self._sent: deque[tuple[int, int]] = deque()
        self._peak = peak_flops_per_second(jax.devices()[0].device_kind)

    def sent(self, examples: int, flops: int) -> None:
        """Counts the next step's examples and FLOPs; buckets have batches of different sizes."""
        self._sent.append((examples, flops))

    def read(self, done: int, metrics: Mapping[str, jax.Array]) -> None:
        """Of step `done`, if it is to be logged; else nothing leaves the device."""
        if done % self._stage.log_every and done != self._stage.steps:
            return
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        now = self._clock.seconds()
        seconds = max(sum(now[phase] - self._before[phase] for phase in ("data", "step", "checkpoint")), 1e-9)
        steps = done - self._since
        examples, flops = map(sum, zip(*(self._sent.popleft() for _ in range(steps))))
        self._since, self._before = done, now
        values |= {"steps_per_second": steps / seconds, "examples_per_second": examples / seconds}
        if (
            self._peak and flops
        ):  # the devices' peak in bfloat16, whatever the arithmetic (Chowdhery et al. 2022, App. B)
            values["mfu"] = flops / seconds / (self._peak * jax.device_count())
        if self._writer is not None:
            self._writer.write(done, values)
        self.goodput(done, seconds / steps)
        skipped = f" skipped {values['nonfinite_count']:.0f}" if values["nonfinite_count"] else ""
        mfu = f" mfu {values['mfu']:.1%}" if "mfu" in values else ""
        self._say(
            f"{self._name}: step {done}/{self._stage.steps} loss {values['loss']:.5g} "
            f"grad_norm {values['grad_norm']:.3g} lr {values['learning_rate']:.3g} "
            f"{values['steps_per_second']:.3g} steps/s {values['examples_per_second']:.4g} examples/s{mfu}{skipped}"
        )

    def goodput(self, done: int, seconds_per_step: float | None = None) -> None:
        """Where the time of this start went, up to step `done`, and how fast each process is."""
        line = {
            "step": done,
            "started": self._clock.started,
            "first_step": self._start,
            "seconds": {phase: round(seconds, 4) for phase, seconds in self._clock.seconds().items()},
        }
        if seconds_per_step is not None:
            paces = self._watch.share_pace(seconds_per_step)
            line["step_seconds"] = [round(paces[process], 6) for process in sorted(paces)]
        if self._writer is not None:
            self._writer.write_goodput(line)
