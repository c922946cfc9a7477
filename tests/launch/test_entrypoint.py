"""launch/entrypoint.sh: which codes start training again, and who gets a SIGTERM."""

import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

ENTRYPOINT = Path(__file__).parents[2] / "launch" / "entrypoint.sh"


@pytest.fixture
def trainer(tmp_path, start):
    """Starts the entrypoint around a program that stands for streamdit: it notes its arguments and ends with the next
    of the codes; at "wait" it waits for SIGTERM, and then ends with 143.
    """
    program = tmp_path / "streamdit.py"
    program.write_text(
        textwrap.dedent("""
            import pathlib, signal, sys, time
            notes = pathlib.Path(__file__).with_name("notes")
            tries = len(notes.read_text().splitlines()) if notes.exists() else 0
            code = sys.argv[1].split(",")[tries]
            def stop(number, frame):
                time.sleep(0.3)  # as if it saved
                sys.exit(143)
            signal.signal(signal.SIGTERM, stop)
            with notes.open("a") as file:
                file.write(" ".join(sys.argv[2:]) + "\\n")
            if code == "wait":
                time.sleep(120)
            sys.exit(int(code))
        """)
    )

    def run(codes, *arguments, **environment):
        command = f"{sys.executable} {program} {codes}"
        settings = {"STREAMDIT_RESTART_PAUSE": "0", **environment}
        return start("bash", ENTRYPOINT, *arguments, STREAMDIT_COMMAND=command, **settings)

    run.notes = tmp_path / "notes"
    return run


def tries(trainer):
    return trainer.notes.read_text().splitlines()


@pytest.mark.parametrize(
    ("codes", "code", "count"),
    [
        ("0", 0, 1),
        ("143,75,134,137,0", 0, 5),
        ("143,2", 2, 2),
        ("1", 1, 1),
        ("130", 130, 1),
        ("75,75,75,75,75,75", 75, 6),
    ],
)
def test_codes_that_a_restart_mends_start_it_again(trainer, tmp_path, codes, code, count):
    process = trainer(codes, "--config=a b.py", STREAMDIT_RESTARTS="5", STREAMDIT_FINAL=str(tmp_path / "final"))
    _, error = process.communicate(timeout=120)
    assert process.returncode == code
    assert tries(trainer) == ["train --config=a b.py"] * count
    assert error.count("starting again") == count - 1
    final = tmp_path / "final"
    assert (int(final.read_text()) if final.exists() else 0) == (code if code in (1, 2, 130) else 0)


def test_a_scheduler_that_restarts_gets_the_code(trainer):
    process = trainer("143,0", STREAMDIT_RESTARTS="0")
    process.communicate(timeout=120)
    assert process.returncode == 143 and len(tries(trainer)) == 1


def test_sigterm_reaches_training_and_ends_it_for_good(trainer):
    process = trainer("wait,0")
    end = time.monotonic() + 60
    while not trainer.notes.exists() and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143 and len(tries(trainer)) == 1


def test_the_code_survives_a_second_signal_as_the_program_ends(start, tmp_path):
    """As `srun --kill-on-bad-exit` sends it; bash's own `wait` loses a code in twelve then."""
    program = tmp_path / "program.sh"
    program.write_text("trap 'exit 7' TERM; echo up; sleep 60 >/dev/null & wait\n")
    script = f"source {ENTRYPOINT.with_name('forward.sh')}; forwarding bash {program}; exit $code"
    started = [start("bash", "-euc", script) for _ in range(80)]
    for process in started:
        assert process.stdout.readline() == "up\n"
    pauses = np.random.default_rng(0).uniform(0, 0.004, size=20)
    for group, pause in zip(np.reshape(started, (20, 4)), pauses):
        for process in group:
            process.terminate()
        time.sleep(pause)
        for process in group:
            if process.poll() is None:
                process.terminate()
    assert [process.wait(timeout=60) for process in started] == [7] * 80


def test_sigterm_in_the_pause_ends_it(trainer):
    process = trainer("75,0", STREAMDIT_RESTART_PAUSE="120")
    while "starting again" not in process.stderr.readline():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75 and len(tries(trainer)) == 1


def test_a_command_that_is_not_there_is_said(start):
    process = start("bash", ENTRYPOINT, STREAMDIT_COMMAND="no-such-streamdit")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 127 and "no-such-streamdit" in error
