"""How the processes of a run keep watch over each other: a thread in each shows a beat every second on a `Board` and
reads what the others show. `training.watch` tells what follows from it.

Process 0 judges, so that a beat costs each process a few short messages whatever their number; process 0 itself is
judged by all.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

import jax

from streamdit_jax.errors import StreamDiTError
from streamdit_jax.training.agreement import Board

FREE = ("init", "restore", "compile")  # phases in which nothing is there to be saved, and whose length nobody knows
RESTART = os.EX_TEMPFAIL
BEAT_SECONDS, SHORT_BEAT_SECONDS = 1.0, 0.1
SILENT_SECONDS = 80.0  # below the 100 s after which JAX's own service aborts everyone, without saying where
LEAVE_SECONDS = 5.0  # process 0 carries the coordination service, so it ends last; it waits this long for the others
SAVING_SECONDS = 30.0  # how long a save that was under way may still take once all others may end
FATES = "it died, was stopped, or lost its network"


@dataclasses.dataclass
class Progress:
    """What the threads of a process know of its main thread, and it of them. Guarded by `changed` where it matters."""

    hang_seconds: float
    phase: str = FREE[0]
    done: int = 0  # the last step boundary that was passed
    moved: float = dataclasses.field(default_factory=time.monotonic)
    asked: int | None = None  # the signal that asks this process to stop
    deciding: bool = False  # the main thread passes no boundary until `stop_after` is known
    stop_after: int | None = None
    signal: int | None = None  # why the run stops, once it is known when
    profile_asked: bool = False
    profile_due: bool = False
    pace: str = ""  # a few words for process 0, shown with the beat
    paces: dict[int, str] = dataclasses.field(default_factory=dict)  # at process 0: everyone's
    changed: threading.Condition = dataclasses.field(default_factory=threading.Condition)


class Messenger:
    """One process's thread that speaks with the others of its run."""

    def __init__(self, progress: Progress, end: Callable[..., None]):
        """end(code, line, stacks=False) ends this process, from any thread."""
        self._progress, self._end = progress, end
        self._me = jax.process_index()
        self._others = set(range(jax.process_count())) - {self._me}
        self._board = Board()
        self._thread = threading.Thread(target=self._run, name="messenger", daemon=True)
        self._beats, self._profiles = 0, 0
        self._answered = time.monotonic()  # when the board last answered
        self._seen: dict[tuple[str, int], tuple[str, float]] = {}  # (what, process) → its text, and since when
        self._quiet: set[int] = set()  # processes from which nothing more is expected
        self._posted = self._closing = False
        self._wake, self._finished = threading.Event(), threading.Event()

    def start(self) -> None:
        """Begins to beat."""
        self._thread.start()

    def hurry(self) -> None:
        """The next beat is due."""
        self._wake.set()

    def close(self, error: BaseException | None) -> None:
        """The main thread is done: waits until all are, or, after an error, tells the others that it ends alone."""
        if error is None:
            self._board.put(f"closed/{self._me}", "")
            self._closing = True
            self.hurry()
            self._finished.wait()
            self._thread.join()
            return
        if isinstance(error, jax.errors.JaxRuntimeError):
            self._wait_for_the_cause(error)
        code = 2 if isinstance(error, StreamDiTError) else 1
        self._finished.set()
        with contextlib.suppress(Exception):
            self._board.put(f"gone/{self._me}", f"{code} {type(error).__name__}: {error}".splitlines()[0])
        # Python's own end waits for all processes, some of which may be waiting for this one.
        if self._me == 0:
            self._wait_for_the_others(2 * LEAVE_SECONDS)
        end_after(LEAVE_SECONDS * (1.0 if self._me == 0 else 0.6), code)

    def leave(self) -> None:
        """Before this process ends. 0 does so last: with it goes the coordination service, and JAX then aborts who is
        still connected.
        """
        if self._me == 0:
            self._wait_for_the_others(LEAVE_SECONDS)
        elif self._answers():
            with contextlib.suppress(Exception):
                self._board.put(f"left/{self._me}", "")

    def look_at_the_clock(self) -> None:
        """By another thread: this one may wait for an answer of process 0 for ever."""
        if not self._answers():
            self._end(RESTART, f"process 0 has been silent for {self._silence():.0f} s: {FATES}", stacks=True)

    def _answers(self) -> bool:
        return self._finished.is_set() or time.monotonic() - self._answered < self._silence()

    def _silence(self) -> float:
        return min(SILENT_SECONDS, self._progress.hang_seconds)

    def _run(self) -> None:
        while not self._finished.is_set():
            try:
                self._beat()
            except Exception as error:  # the service is gone, and process 0 with it; JAX is about to abort this process
                if not self._finished.is_set():
                    self._end(
                        RESTART, f"process 0 does not answer: {FATES} ({str(error).splitlines()[0]})", stacks=True
                    )
            self._wake.wait(SHORT_BEAT_SECONDS if self._posted or self._closing else BEAT_SECONDS)
            self._wake.clear()

    def _beat(self) -> None:
        progress, board = self._progress, self._board
        self._beats += 1
        beat = f"{self._beats} {progress.phase} {progress.done} {progress.pace}"
        board.put(f"beat/{self._me}", beat)
        if self._me == 0:
            self._judge(board.read("beat"))
            board.put("notice/leader", beat)
        if progress.profile_asked:
            progress.profile_asked = False
            board.put("notice/profile", str(self._profiles + 1))
        notices = board.read("notice")
        self._answered = time.monotonic()
        if "verdict" in notices:
            self._end(RESTART, notices["verdict"], stacks=True)
        if self._me and self._age("leader", 0, notices.get("leader", "")) > self._silence():
            self._end(RESTART, f"process 0 has been silent for {self._silence():.0f} s: {FATES}", stacks=True)
        if int(notices.get("profile", 0)) > self._profiles:
            self._profiles, progress.profile_due = int(notices["profile"]), True
        self._look_for_the_gone(board.read("gone"))
        if progress.asked and "stop" not in notices:
            notices["stop"] = f"{progress.asked} {self._me}"
            board.put("notice/stop", notices["stop"])
        if "stop" in notices:
            self._agree_to_stop(*map(int, notices["stop"].split()))
        closed = board.read("closed")
        self._quiet |= {int(process) for process in closed}
        if len(closed) == len(self._others) + 1:
            self._finished.set()

    def _age(self, what: str, process: int, text: str) -> float:
        """Seconds since this text was first seen unchanged, by this process's own clock."""
        now = time.monotonic()
        before, since = self._seen.get((what, process), (None, now))
        if text != before:
            self._seen[what, process] = text, now
            return 0.0
        return now - since

    def _judge(self, beats: dict[str, str]) -> None:
        """By process 0: who is silent, and who keeps the others waiting."""
        silence, hang = self._silence(), self._progress.hang_seconds
        where, stuck = {}, []
        for process, beat in sorted((int(name), beat.split(" ", 3)) for name, beat in beats.items()):
            number, phase, done, self._progress.paces[process] = beat
            where[process] = phase, int(done)
            if self._age("beat", process, number) > silence and process not in self._quiet:
                self._condemn(f"process {process} has been silent for {silence:.0f} s, {_place(phase, done)}: {FATES}")
            if self._age("work", process, f"{phase} {done}") > hang:
                stuck.append(process)
        if not stuck or any(phase in FREE for phase, _ in where.values()):
            return
        last = min(done for _, done in where.values())
        behind = [process for process, (_, done) in where.items() if done == last]
        # Who waits for the others is in its step; who keeps them waiting may be somewhere else.
        behind = [process for process in behind if where[process][0] != "step"] or behind
        named = ", ".join(f"process {process} ({_place(*where[process])})" for process in behind)
        self._condemn(f"no progress for {hang:.0f} s: waiting for {named}")

    def _condemn(self, verdict: str) -> None:
        self._board.put("notice/verdict", verdict)

    def _look_for_the_gone(self, gone: dict[str, str]) -> None:
        """Another process ended by an error of its own. This one may be about to raise the same."""
        for name, text in gone.items():
            self._quiet.add(int(name))
            if self._age("gone", int(name), text) > LEAVE_SECONDS and not self._finished.is_set():
                code, message = text.split(" ", 1)
                self._end(int(code), f"process {name} ended: {message}")

    def _agree_to_stop(self, number: int, asked: int) -> None:
        progress = self._progress
        if not self._posted:
            with progress.changed:
                progress.deciding = progress.phase not in FREE
                mine = str(progress.done) if progress.deciding else "free"
            self._board.put(f"stop/{self._me}", mine)
            self._posted = True
        shown = self._board.read("stop")
        if len(shown) <= len(self._others) or progress.stop_after is not None:
            return
        if "free" not in shown.values():
            with progress.changed:
                progress.signal, progress.stop_after = number, max(int(done) for done in shown.values()) + 1
                progress.changed.notify_all()
        # A step needs all processes, so that none was done since the free one was last about to save.
        elif progress.phase != "checkpoint" or self._age("saving", self._me, "waits") > SAVING_SECONDS:
            name = signal.Signals(number).name
            self._end(128 + number, f"stopped by {name} to process {asked}; nothing was there to be saved")

    def _wait_for_the_cause(self, error: BaseException) -> None:
        """A computation failed: by itself, as on all processes, or because another process is no longer there. Then it
        is soon found silent or gone, and this thread does not return.
        """
        traceback.print_exception(error, file=sys.__stderr__)
        with contextlib.suppress(Exception):
            self._board.put(f"fault/{self._me}", "")
            deadline = time.monotonic() + self._silence() + 2 * LEAVE_SECONDS
            while time.monotonic() < deadline and len(self._board.read("fault")) <= len(self._others):
                time.sleep(SHORT_BEAT_SECONDS)

    def _wait_for_the_others(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with contextlib.suppress(Exception):
            away: set[str] = set()
            while time.monotonic() < deadline and not {str(process) for process in self._others} <= away:
                time.sleep(SHORT_BEAT_SECONDS)
                away = {process for folder in ("left", "gone", "closed") for process in self._board.read(folder)}
            time.sleep(SHORT_BEAT_SECONDS)  # between a process's word and its end


def _place(phase: str, done: int | str) -> str:
    return f"in {phase} after step {done}"


def end_after(seconds: float, code: int) -> None:
    """Ends this process in so many seconds, unless it ends by itself: Python's own end waits for other processes."""
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()
