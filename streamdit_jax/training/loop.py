"""The one training loop: every stage of every model runs through `run_stage`; they differ by their objective (law 4).

Order of one turn: step n is dispatched; the batch of n + 1 is fetched and sent while the device works; only then are
the metrics of n − 1 read, if they are to be logged. The host never waits for the step it has just dispatched, except to
save.
"""

import contextlib
import json
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from streamdit_jax import sharding
from streamdit_jax.errors import DataError, StreamDiTError
from streamdit_jax.training.checkpoint import Checkpoints
from streamdit_jax.training.metrics import MetricsWriter
from streamdit_jax.training.objective import Batch, Objective
from streamdit_jax.training.program import make_key, make_program, shapes_of
from streamdit_jax.training.state import TrainState

# Steps that may be under way at once. Two keep the device busy; more would only hold more batches in its memory.
IN_FLIGHT = 2


class Interrupted(SystemExit):
    """SIGTERM or Ctrl-C came; the state was saved. Exits with 128 + the signal's number, the usual sign that the work
    is not done, so that a scheduler starts the same command again."""


def run_stage(
    objective: Objective,
    stage,
    make_batches: Callable[[int], Iterator[dict]],
    workdir,
    *,
    seed: int,
    mesh: jax.sharding.Mesh,
    batches: Sequence[Batch] = (),
    config_json: Any = None,
    sample_fn: Callable[[int, Any], None] | None = None,
    log: Callable[[str], None] = print,
) -> TrainState:
    """Trains one stage to its end, from its newest checkpoint if there is one; an interrupted run gives the same bits
    as one in a piece.

    Args:
        objective: what is trained.
        stage: a `StageConfig`: steps, batch_size, optimizer, ema_decay, log_every, checkpoint_every, sample_every,
            keep_checkpoints, abort_after_nonfinite.
        make_batches: first step → an iterator over the batches of that step and the following ones. Each is a dict of
            numpy arrays whose first axis is this process's share of the global batch.
        workdir: gets `checkpoints/`, `metrics.jsonl` and `tensorboard/`. One directory for each stage.
        seed: of the initialisation and of each step's randomness.
        mesh: from `sharding.make_mesh`; batch and parameters are cut along it.
        batches: a global batch, or its `jax.ShapeDtypeStruct`s, of every shape that make_batches gives, each of which
            has a step compiled for it before the first one runs; without, all have the shapes of the first.
        config_json: the whole configuration, as JSON text or as what `json.loads` gives; stored in each checkpoint.
        sample_fn: called with the steps done and the averaged parameters every `sample_every` steps. They are given
            away with the next step: it must not keep them.
        log: takes the lines for a person; called by the first process only.

    Returns:
        the state after `stage.steps` steps.
    Raises:
        ConfigError: the batch size does not suit the mesh, or an optimizer's field is impossible.
        DataError: the batches end too early, or have a shape that is not expected.
        CheckpointError: a checkpoint is there but cannot be used, or one cannot be saved.
        StreamDiTError: `abort_after_nonfinite` steps in a row had a loss or a gradient that was not finite.
        Interrupted: a SystemExit, after saving, on SIGTERM or Ctrl-C.
    """
    first_process = jax.process_index() == 0
    say = log if first_process else lambda _: None
    config = json.loads(config_json if isinstance(config_json, str) else json.dumps(config_json))
    program = make_program(objective, stage, mesh)
    workdir = Path(workdir)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_StopRequest())
        checkpoints = Checkpoints(workdir / "checkpoints", keep=stage.keep_checkpoints)
        stack.callback(checkpoints.close)
        start = checkpoints.latest() or 0

        abstract = [program.abstract_batch(batch) for batch in batches]
        source = _Batches(make_batches, start, stage, mesh, abstract)
        key = make_key(seed, mesh)
        first_batch = source.ahead if objective.first_batch is None else objective.first_batch
        like = program.abstract_state(key, first_batch)
        if start:
            state, position, saved_config = checkpoints.restore(like, start)
            if position != start:  # not so while a step reads one batch; the checkpoint's word counts
                source = _Batches(make_batches, position, stage, mesh, abstract, position + stage.steps - start)
            say(f"{objective.name}: resumed after step {start} of {stage.steps}")
            for line in _differences(saved_config, config):
                say(f"{objective.name}: the configuration has changed since: {line}")
        else:
            position, state = 0, program.first_state(key, first_batch, like)
        if start >= stage.steps:
            return state

        constants = sharding.place(objective.constants, mesh)
        began = time.perf_counter()
        step = program.compile_steps(like, constants, abstract or [source.ahead], key)
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        seconds = time.perf_counter() - began
        shapes = f" for {len(step)} shapes of batch" if len(step) > 1 else ""
        say(
            f"{objective.name}: {parameters:,} parameters on {mesh.size} device(s), compiled{shapes} in {seconds:.1f} s"
        )

        writer = stack.enter_context(MetricsWriter(workdir, step=start)) if first_process else None
        report = _Report(objective.name, stage, start, writer, say)
        in_flight: deque = deque()
        for done in range(start + 1, stage.steps + 1):
            state, metrics = step(state, constants, source.ahead, key)
            report.sent(source.examples)
            source.fetch()
            if in_flight:
                report.read(*in_flight[-1])
            in_flight.append((done, metrics))
            if len(in_flight) > IN_FLIGHT:
                _stop_if_lost(objective, stage, *in_flight.popleft())

            last, stopped = done == stage.steps, stop.reached(checkpoints, done)
            if last or stopped or done % stage.checkpoint_every == 0:
                # These steps' lines are in the file before the checkpoint is; and a run that is lost saves nothing.
                report.read(done, metrics)
                while in_flight:
                    _stop_if_lost(objective, stage, *in_flight.popleft())
                checkpoints.save(done, state, next_step=position + done - start, config=config)
            elif done % stage.log_every == 0:
                checkpoints.check()
            if stopped:
                checkpoints.wait()
                name = signal.Signals(stop.signal).name
                say(f"{objective.name}: stopped by {name} after step {done}, which is saved; the same command goes on")
                return state  # into Interrupted, see _StopRequest
            if sample_fn is not None and stage.sample_every and done % stage.sample_every == 0:
                began = time.perf_counter()
                sample_fn(done, state.ema_params)
                report.without(time.perf_counter() - began)
        checkpoints.wait()
        return state


class _Batches:
    """Batches on their way to the devices, one ahead of the step that reads it."""

    def __init__(self, make_batches, start: int, stage, mesh, expected: Sequence[Batch] = (), end: int | None = None):
        self._iterator, self._mesh = iter(make_batches(start)), mesh
        # A stage that is done reads one batch, for its shapes.
        self._position, self._end = start, max(stage.steps if end is None else end, start + 1)
        self._expected = {shapes_of(batch) for batch in expected}
        self.examples = 0
        self.fetch()
        for path, leaf in [] if expected else jax.tree_util.tree_leaves_with_path(self.ahead):
            if leaf.ndim and len(leaf) != stage.batch_size:
                name = sharding.path_name(path)
                raise DataError(f"data: {name} holds {len(leaf)} examples, but batch_size is {stage.batch_size}")

    def fetch(self) -> None:
        """Begins to send the next batch, if a step will read it."""
        self.ahead = None
        if self._position == self._end:
            return
        try:
            batch = next(self._iterator)
        except StopIteration:
            raise DataError(
                f"data: the batches end after {self._position} of {self._end} steps; they must go on"
            ) from None
        self._position += 1
        self.ahead = sharding.shard_batch(batch, self._mesh)
        shapes = shapes_of(self.ahead)
        self._expected = self._expected or {shapes}
        if shapes not in self._expected:
            one, others = dict(shapes), " or ".join(str(dict(expected)) for expected in sorted(self._expected))
            raise DataError(f"data: batch {self._position - 1} is {one}, but the step is compiled for {others}")
        self.examples = max((len(x) for x in jax.tree.leaves(self.ahead) if x.ndim), default=0)


class _Report:
    """Reads metrics when they are due, and tells them to the file and to a person."""

    def __init__(self, name: str, stage, start: int, writer: MetricsWriter | None, say: Callable[[str], None]):
        self._name, self._stage, self._writer, self._say = name, stage, writer, say
        self._since, self._time = start, time.perf_counter()
        self._sent: deque[int] = deque()

    def sent(self, examples: int) -> None:
        """Counts the examples of the next step; buckets have batches of different sizes."""
        self._sent.append(examples)

    def without(self, seconds: float) -> None:
        """Takes time that was not training (sampling) out of the rate."""
        self._time += seconds

    def read(self, done: int, metrics: dict) -> None:
        """Of step `done`, if it is to be logged; else nothing leaves the device."""
        if done % self._stage.log_every and done != self._stage.steps:
            return
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, steps = max(now - self._time, 1e-9), done - self._since
        examples = sum(self._sent.popleft() for _ in range(steps))
        rate = steps / seconds
        self._since, self._time = done, now
        values |= {"steps_per_second": rate, "examples_per_second": examples / seconds}
        if self._writer is not None:
            self._writer.write(done, values)
        skipped = f" skipped {values['nonfinite_count']:.0f}" if values["nonfinite_count"] else ""
        self._say(
            f"{self._name}: step {done}/{self._stage.steps} loss {values['loss']:.5g} "
            f"grad_norm {values['grad_norm']:.3g} lr {values['learning_rate']:.3g} {rate:.3g} steps/s "
            f"{values['examples_per_second']:.4g} examples/s{skipped}"
        )


class _StopRequest:
    """Whether someone asked the run to stop: SIGTERM (preemption) or Ctrl-C. A second signal is not held back.

    Leaving the block raises Interrupted if so, even where the stage is complete: no stage after it must begin.
    """

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_StopRequest":
        # Several processes: JAX's own preemption service catches SIGTERM, and stops all of them at the same step.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind, *_) -> None:
        self._release()
        if self.signal is not None and kind is None:
            raise Interrupted(128 + self.signal)

    def _note(self, number: int, _) -> None:
        self.signal = number
        self._release()

    def _release(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def reached(self, checkpoints: Checkpoints, done: int) -> bool:
        """At a step boundary; the same answer on every process."""
        if jax.process_count() > 1 and checkpoints.preempted(done):
            self.signal = signal.SIGTERM
        return self.signal is not None


def _stop_if_lost(objective: Objective, stage, done: int, metrics: dict) -> None:
    """Raises when too many steps in a row were not finite. Waits for the step, so it is asked of one that is done."""
    in_a_row = int(metrics["nonfinite_in_a_row"])
    if in_a_row >= stage.abort_after_nonfinite:
        raise StreamDiTError(
            f"{objective.name}: loss or gradient was not finite in {in_a_row} steps in a row, up to step {done}; they "
            "were skipped, so checkpoints are sound; lower optimizer.learning_rate, or look for the fault in the data"
        )


def _differences(saved: Any, now: Any, path: str = "") -> list[str]:
    """What differs between two configurations, as "field: then → now"."""
    if isinstance(saved, dict) and isinstance(now, dict):
        fields = sorted(saved.keys() | now.keys(), key=str)
        return [
            line for f in fields for line in _differences(saved.get(f), now.get(f), f"{path}.{f}" if path else str(f))
        ]
    return [] if saved == now else [f"{path or 'all of it'}: {json.dumps(saved)} → {json.dumps(now)}"]
