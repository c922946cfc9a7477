"""The one training loop: every stage of every model runs through `run_stage`; they differ by their objective (law 4).

Order of one turn: step n is dispatched; the batch of n + 1 is fetched and sent while the device works; only then are
the metrics of n − 1 read, if they are to be logged. The host never waits for the step it has just dispatched, except to
save.
"""

import contextlib
import dataclasses
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from streamdit_jax import sharding
from streamdit_jax.errors import DataError, StreamDiTError
from streamdit_jax.machine import versions
from streamdit_jax.training.agreement import differences, require_same
from streamdit_jax.training.checkpoint import Checkpoints
from streamdit_jax.training.goodput import Clock
from streamdit_jax.training.metrics import MetricsWriter
from streamdit_jax.training.objective import Batch, Objective
from streamdit_jax.training.profiling import Profile
from streamdit_jax.training.program import make_key, make_program, shapes_of
from streamdit_jax.training.report import Report
from streamdit_jax.training.state import TrainState
from streamdit_jax.training.watch import Watch

# Steps that may be under way at once. Two keep the device busy; more would only hold more batches in its memory.
IN_FLIGHT = 2


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
    watch: Watch | None = None,
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
        workdir: gets `checkpoints/`, `metrics.jsonl`, `tensorboard/`, and `traces/` on demand; one for each stage.
        seed: of the initialisation and of each step's randomness.
        mesh: from `sharding.make_mesh`; batch and parameters are cut along it.
        batches: a global batch, or its `jax.ShapeDtypeStruct`s, of every shape that make_batches gives, each of which
            has a step compiled for it before the first one runs; without, all have the shapes of the first.
        config_json: the whole configuration, as JSON text or as what `json.loads` gives; stored in each checkpoint.
        sample_fn: called with the steps done and the averaged parameters every `sample_every` steps. They are given
            away with the next step: it must not keep them.
        watch: over the whole run, where there are more stages than this one.
        log: takes the lines for a person; called by the first process only.

    Returns:
        the state after `stage.steps` steps.
    Raises:
        ConfigError: the batch size does not suit the mesh, an optimizer's field is impossible, or processes were given
            different configurations.
        DataError: the batches end too early, or have a shape that is not expected.
        CheckpointError: a checkpoint is there but cannot be used, or one cannot be saved.
        StreamDiTError: `abort_after_nonfinite` steps in a row had a loss or a gradient that was not finite.
        Interrupted: a SystemExit, after saving, on SIGTERM or Ctrl-C.
    """
    first_process = jax.process_index() == 0
    say = log if first_process else lambda _: None
    config = json.loads(config_json if isinstance(config_json, str) else json.dumps(config_json))
    workdir = Path(workdir)
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(Watch()) if watch is None else watch
        watch.begin(stage.hang_seconds, workdir / "profile")
        clock = Clock(watch.enter)
        require_same(_settings(objective, stage, seed, mesh, config))
        program = make_program(objective, stage, mesh)
        checkpoints = Checkpoints(workdir / "checkpoints", keep=stage.keep_checkpoints, say=say)
        stack.callback(checkpoints.close)
        start = checkpoints.latest() or 0

        abstract = [program.abstract_batch(batch) for batch in batches]
        source = _Batches(make_batches, start, stage, mesh, abstract)
        key = make_key(seed, mesh)
        first_batch = source.ahead if objective.first_batch is None else objective.first_batch
        like = program.abstract_state(key, first_batch)
        if start:
            clock.enter("restore")
            newest, (start, state, position, saved_config) = start, checkpoints.restore(like)
            clock.enter("init")
            if position != newest:  # an older checkpoint than it seemed: the newest was damaged
                source = _Batches(make_batches, position, stage, mesh, abstract, position + stage.steps - start)
            say(f"{objective.name}: resumed after step {start} of {stage.steps}")
            for field, then, now in differences(saved_config, config):
                change = f"{field}: {json.dumps(then)} → {json.dumps(now)}"
                say(f"{objective.name}: the configuration has changed since: {change}")
        else:
            position, state = 0, program.first_state(key, first_batch, like)
        if start >= stage.steps:
            watch.settle()
            return state

        constants = sharding.place(objective.constants, mesh)
        clock.enter("compile")
        step = program.compile_steps(like, constants, abstract or [source.ahead], key)
        seconds = clock.enter("init")
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        shapes = f" for {len(step)} shapes of batch" if len(step) > 1 else ""
        say(
            f"{objective.name}: {parameters:,} parameters on {mesh.size} device(s), compiled{shapes} in {seconds:.1f} s"
        )

        writer = stack.enter_context(MetricsWriter(workdir, step=start)) if first_process else None
        profile = Profile(workdir / "traces", say)
        stack.callback(profile.close)
        report = Report(objective.name, stage, start, clock, watch, writer, say)
        in_flight: deque = deque()
        clock.enter("step")
        for done in range(start + 1, stage.steps + 1):
            state, metrics = step(state, constants, source.ahead, key)
            report.sent(source.examples, objective.flops(source.ahead) if objective.flops else 0)
            clock.enter("data")
            source.fetch()
            # What the batch took was lost only if the device has done its step meanwhile, and waits.
            clock.enter("step", hidden=not metrics["loss"].is_ready())
            if in_flight:
                report.read(*in_flight[-1])
            in_flight.append((done, metrics))
            if len(in_flight) > IN_FLIGHT:
                _stop_if_lost(objective, stage, *in_flight.popleft())
            checkpoints.check()
            profile.boundary(done, watch.take_profile(), lambda: jax.block_until_ready(metrics))  # noqa: B023

            last, stopped = done == stage.steps, watch.reached(done)
            if last or stopped or done % stage.checkpoint_every == 0:
                # These steps' lines are in the file before the checkpoint is; and a run that is lost saves nothing.
                report.read(done, metrics)
                while in_flight:
                    _stop_if_lost(objective, stage, *in_flight.popleft())
                clock.enter("checkpoint")
                checkpoints.save(done, state, next_step=position + done - start, config=config)
                clock.enter("step")
            if stopped:
                break
            if sample_fn is not None and stage.sample_every and done % stage.sample_every == 0:
                clock.enter("sample")
                sample_fn(done, state.ema_params)
                clock.enter("step")
        clock.enter("checkpoint")
        checkpoints.wait()
        clock.enter("init")
        report.goodput(done)
        if stopped:
            say(
                f"{objective.name}: stopped by {watch.signal_name()} after step {done}, which is saved; "
                "the same command goes on"
            )
        watch.settle()
        return state


def _settings(objective: Objective, stage, seed: int, mesh: jax.sharding.Mesh, config: Any) -> dict[str, Any]:
    """What all processes must have alike, by the names that a configuration has for it."""
    given = config if isinstance(config, dict) else {}
    stages = {**(given.get("training") or {}), objective.name: dataclasses.asdict(stage)}
    return {**given, "training": stages, "seed": seed, "mesh": dict(mesh.shape), "versions": versions()}


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


def _stop_if_lost(objective: Objective, stage, done: int, metrics: dict) -> None:
    """Raises when too many steps in a row were not finite. Waits for the step, so it is asked of one that is done."""
    in_a_row = int(metrics["nonfinite_in_a_row"])
    if in_a_row >= stage.abort_after_nonfinite:
        raise StreamDiTError(
            f"{objective.name}: loss or gradient was not finite in {in_a_row} steps in a row, up to step {done}; they "
            "were skipped, so checkpoints are sound; lower optimizer.learning_rate, or look for the fault in the data"
        )
