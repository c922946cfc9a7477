"""The loop's laws: an interrupted run gives the same bits, one compilation, no waiting, nothing lost."""

import itertools
import json
import os
import signal

import jax
import numpy as np
import pytest

from streamdit_jax.errors import CheckpointError, DataError, StreamDiTError
from streamdit_jax.training.checkpoint import Checkpoints
from streamdit_jax.training.metrics import read_metrics


class Stopped(Exception):
    pass


def until(toy, last, do):
    """Batches that call `do` instead of giving batch `last`."""

    def make_batches(first_step):
        for step, batch in zip(itertools.count(first_step), toy.batches(first_step)):
            if step == last:
                do()
            yield batch

    return make_batches


def crash():
    raise Stopped


@pytest.fixture(scope="module")
def straight(toy, tmp_path_factory):
    """(workdir, final state, log lines) of 12 steps in one piece, with a checkpoint every 5."""
    workdir, lines = tmp_path_factory.mktemp("straight"), []
    state = toy.train(workdir, 12, log=lines.append, config_json='{"seed": 3}')
    return workdir, state, lines


def test_resume_is_exact(toy, harness, straight, tmp_path):
    workdir, state, _ = straight
    asked = []

    def make_batches(first_step):
        asked.append(first_step)
        return until(toy, 8, crash if len(asked) == 1 else lambda: None)(first_step)

    with pytest.raises(Stopped):  # at step 8 of 12, with 5 saved and lines of 6 and 7 written
        toy.train(tmp_path, 12, make_batches=make_batches)
    assert 5 < read_metrics(tmp_path)[-1]["step"] <= 8
    again = toy.train(tmp_path, 12, make_batches=make_batches)
    assert asked == [0, 5]
    assert toy.bits(again) == toy.bits(state)
    assert harness.facts(tmp_path) == harness.facts(workdir)
    assert [line["step"] for line in harness.facts(tmp_path)] == list(range(1, 13))


def test_a_run_with_muon_resumes_exactly(toy, tmp_path):
    """Its state is another tree than AdamW's, with holes in it."""
    fields = {"optimizer": toy.optimizer(name="muon")}
    whole = toy.train(tmp_path / "whole", 8, **fields)
    with pytest.raises(Stopped):
        toy.train(tmp_path / "parts", 8, make_batches=until(toy, 6, crash), **fields)
    assert toy.bits(toy.train(tmp_path / "parts", 8, **fields)) == toy.bits(whole)


def test_checkpoints_and_data_position(toy, harness, straight):
    workdir, state, _ = straight
    checkpoints = Checkpoints(workdir / "checkpoints")
    assert checkpoints.steps() == [10, 12]  # of 5, 10 and 12 the newest two
    checkpoints.close()
    restored = harness.stored(workdir, state)
    assert restored.next_step == 12 and restored.config == {"seed": 3}
    assert toy.bits(restored.state) == toy.bits(state)


def test_a_finished_stage_is_given_back_as_it_is(toy, harness, straight):
    workdir, state, _ = straight
    before, lines = harness.facts(workdir), []
    again = toy.train(workdir, 12, make_batches=lambda first: itertools.islice(toy.batches(first), 1), log=lines.append)
    assert toy.bits(again) == toy.bits(state) and harness.facts(workdir) == before
    assert lines[0] == "toy: resumed after step 12 of 12"


def test_metrics_are_complete_and_sound(toy, harness, straight):
    lines = harness.facts(straight[0])
    assert set(lines[0]) == {
        "step", "loss", "grad_norm", "learning_rate", "nonfinite_count", "nonfinite_in_a_row", "mae"
    }  # fmt: skip
    assert [line["learning_rate"] for line in lines[:3]] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    assert lines[-1]["learning_rate"] == pytest.approx(0.001)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["steps_per_second"] > 0 for line in read_metrics(straight[0]))
    assert straight[2][1].startswith("toy: step 1/12 loss ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_preemption_saves_and_leaves(toy, harness, straight, tmp_path, number):
    handler, lines = signal.getsignal(number), []
    with pytest.raises(SystemExit) as stopped:
        toy.train(tmp_path, 12, make_batches=until(toy, 8, lambda: os.kill(os.getpid(), number)), log=lines.append)
    assert stopped.value.code == 128 + number and signal.getsignal(number) is handler
    assert lines[-1] == f"toy: stopped by {number.name} after step 8, which is saved; the same command goes on"
    assert harness.stored(tmp_path, straight[1]).next_step == 8
    assert toy.bits(toy.train(tmp_path, 12)) == toy.bits(straight[1])
    assert harness.facts(tmp_path) == harness.facts(straight[0])


def test_one_compilation_and_no_waiting_for_the_step_just_dispatched(toy, tmp_path):
    events, traces = [], []

    def make_batches(first_step):
        for step, batch in zip(itertools.count(first_step), toy.batches(first_step)):
            events.append(f"batch {step}")
            yield batch

    def log(line):
        if ": step " in line:
            events.append(line.split(": ")[1].split("/")[0])

    def loss(*inputs):
        traces.append(1)
        return toy.loss(*inputs)

    toy.train(tmp_path, 9, make_batches=make_batches, loss=loss, log=log, checkpoint_every=100)
    assert len(traces) == 1
    # Batch n is for step n + 1, fetched after step n was dispatched. Step n's metrics are read after step n + 1 was.
    for step in range(1, 8):
        assert (
            events.index(f"batch {step + 1}")
            < events.index(f"step {step}")
            < events.index(f"batch {step + 2}" if step < 7 else "step 9")
        )
    assert [event for event in events if event.startswith("step")] == [f"step {n}" for n in range(1, 10)]


def test_metrics_leave_the_device_only_when_they_are_due(toy, tmp_path, monkeypatch):
    fetched, device_get = [], jax.device_get

    def counting(tree):
        if isinstance(tree, dict) and "loss" in tree:
            fetched.append(1)
        return device_get(tree)

    monkeypatch.setattr(jax, "device_get", counting)
    toy.train(tmp_path, 12, log_every=4, checkpoint_every=6)
    assert [line["step"] for line in read_metrics(tmp_path)] == [4, 8, 12] and len(fetched) == 3


def poison(toy, *steps):
    def make_batches(first_step):
        for step, batch in zip(itertools.count(first_step), toy.batches(first_step)):
            yield {**batch, "x": batch["x"] * (np.float32("nan") if step in steps else 1)}

    return make_batches


def test_nonfinite_steps_are_skipped_and_counted(toy, tmp_path):
    lines = []
    state = toy.train(tmp_path, 9, make_batches=poison(toy, 2, 3, 6), abort_after_nonfinite=3, log=lines.append)
    assert state.nonfinite_count == 3 and state.step == 9
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
    written = read_metrics(tmp_path)
    assert [line["nonfinite_count"] for line in written] == [0, 0, 1, 2, 2, 2, 3, 3, 3]
    assert written[2]["loss"] is None and lines[-1].endswith(" skipped 3")


def test_too_many_nonfinite_steps_abort(toy, tmp_path):
    with pytest.raises(
        StreamDiTError, match=r"^toy: loss or gradient was not finite in 3 steps in a row, up to step 10;"
    ):
        toy.train(tmp_path, 40, make_batches=poison(toy, *range(7, 40)), abort_after_nonfinite=3, log_every=20)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest() == 5  # the one of step 10 would be of a lost run
    checkpoints.close()
    state = toy.train(tmp_path, 12)  # with sound data it goes on
    assert state.nonfinite_count == 0


def test_samples_see_the_averaged_parameters(toy, straight, tmp_path):
    seen = {}
    state = toy.train(
        tmp_path, 12, sample_fn=lambda step, params: seen.update({step: jax.tree.map(np.array, params)}), sample_every=4
    )
    assert sorted(seen) == [4, 8, 12] and toy.bits(seen[12]) == toy.bits(state.ema_params)
    assert toy.bits(seen[4]) != toy.bits(seen[8])
    assert toy.bits(state) == toy.bits(straight[1])  # looking changes nothing


def test_bad_batches_are_named(toy, tmp_path):
    with pytest.raises(DataError, match=r"the batches end after 7 of 12 steps"):
        toy.train(tmp_path / "a", 12, make_batches=lambda first: itertools.islice(toy.batches(first), 7))
    with pytest.raises(
        DataError, match=r"batch 3 is .*'x': 'float32\[8, 16\]'.*, but the step is compiled for .*\[16, 16\]"
    ):
        toy.train(
            tmp_path / "b", 12, make_batches=lambda _: (toy.batch(n, size=8 if n == 3 else 16) for n in range(99))
        )
    with pytest.raises(DataError, match=r"x holds 8 examples, but batch_size is 16"):
        toy.train(tmp_path / "c", 12, make_batches=lambda _: (toy.batch(n, size=8) for n in range(99)))


def test_bad_fields_are_named(toy, tmp_path):
    # The stage itself refuses it, before there is a loop; `config` adds the path of the stage.
    with pytest.raises(ValueError, match=r"^optimizer\.warmup_steps: 13 is more than the stage's 12 steps"):
        toy.train(tmp_path, 12, optimizer=toy.optimizer(warmup_steps=13))


def test_another_model_in_the_directory_is_an_error(toy, tmp_path, monkeypatch):
    toy.train(tmp_path, 3)
    monkeypatch.setattr(toy, "WIDTH", 32)
    with pytest.raises(
        CheckpointError, match=r"checkpoints/3: written with another configuration: params/toy/blocks/query/bias"
    ):
        toy.train(tmp_path, 4)


def test_a_changed_configuration_is_said(toy, tmp_path):
    def config(rate):
        return json.dumps({"training": {"toy": {"learning_rate": rate, "steps": 4}}})

    toy.train(tmp_path, 3, config_json=config(0.1))
    lines = []
    toy.train(tmp_path, 4, config_json=config(0.2), log=lines.append)
    assert lines[1] == "toy: the configuration has changed since: training.toy.learning_rate: 0.1 → 0.2"
