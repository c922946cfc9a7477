"""Watches over a run from threads of its own: who asks it to stop, and who of its processes died or hangs.

Two threads. The guard waits for signals, also while the main thread compiles, and looks at the clock; it talks to
nobody, so nobody can hold it up. With several processes there is a `training.messenger`, too.

**Stopping.** SIGTERM (preemption) or Ctrl-C on any process. While nothing is there to be saved (before the first step,
between stages), all processes end at once. Otherwise each shows the last step boundary that it passed, and waits at the
next until all have shown theirs; all stop after the step that follows the furthest: the same step everywhere.

**Dying and hanging.** A process without a beat is dead, stopped, or cut off. One that makes no progress for
`hang_seconds` hangs; all others then wait for it, so it is the one that is furthest behind. All processes name it, show
where each of their own threads is, and end with 75 (EX_TEMPFAIL), upon which a launcher starts the run again.
"""

import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax

from streamdit_jax.training.messenger import BEAT_SECONDS, FREE, RESTART, Messenger, Progress, end_after

EXIT_SECONDS = 60.0  # how long Python may take to end once all is saved
STOPS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(SystemExit):
    """SIGTERM or Ctrl-C came; the state was saved. Exits with 128 + the signal's number, the usual sign that the work
    is not done, so that a scheduler starts the same command again."""


class Watch:
    """A context manager around a run, or around one stage of it. Every process of a run makes its own."""

    def __init__(self, *, hang_seconds: float = 1800.0):
        """hang_seconds: how long a step, a save or sampling may take before it counts as hanging."""
        self.profile_file: Path | None = None  # asks for a profile by its appearance, as SIGUSR1 does; it is removed
        self._progress = Progress(hang_seconds)
        self._closed, self._ending = threading.Event(), threading.Lock()
        self._previous: dict[int, Any] = {}
        self._messenger = Messenger(self._progress, self._end) if jax.process_count() > 1 else None

    def begin(self, hang_seconds: float, profile_file: Path) -> None:
        """A stage begins; its own `hang_seconds`, and its own file that asks for a profile."""
        self._progress.hang_seconds, self.profile_file = hang_seconds, profile_file

    def enter(self, phase: str) -> None:
        """What the main thread does from now on; counts as progress."""
        with self._progress.changed:
            self._progress.phase, self._progress.moved = phase, time.monotonic()

    def reached(self, done: int) -> bool:
        """At the boundary after step `done`: whether to save and stop here. The same answer on every process."""
        progress = self._progress
        with progress.changed:
            progress.done, progress.moved = done, time.monotonic()
            progress.changed.wait_for(self._decided)
            return progress.signal is not None and done >= (progress.stop_after or 0)

    def settle(self) -> None:
        """At the end of a stage. Raises Interrupted if the run was asked to stop: no stage after it must begin."""
        with self._progress.changed:
            self._progress.changed.wait_for(self._decided)
            if self._progress.signal is not None:
                raise Interrupted(128 + self._progress.signal)

    def signal_name(self) -> str:
        """Of the signal that stops the run."""
        return signal.Signals(self._progress.signal).name

    def take_profile(self) -> bool:
        """Whether someone asked for a profile since the last call."""
        due, self._progress.profile_due = self._progress.profile_due, False
        return due

    def share_pace(self, seconds: float) -> dict[int, float]:
        """Shows the others this process's seconds per step; returns, on process 0, what all last showed of theirs."""
        self._progress.pace = f"{seconds:.6g}"
        shown = {process: float(text) for process, text in self._progress.paces.items() if text}
        return {**shown, jax.process_index(): seconds}

    def __enter__(self) -> "Watch":
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        if threading.current_thread() is threading.main_thread():
            for number in (*STOPS, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._note)
            # Python calls a handler between two lines of Python, and a compilation of minutes is one line. A byte in
            # the pipe is written at once.
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._guard = threading.Thread(target=self._stand_guard, name="watch", daemon=True)
        self._guard.start()
        if self._messenger is not None:
            self._messenger.start()
        return self

    def __exit__(self, kind, error, _) -> None:
        self.enter(FREE[0])
        if self._messenger is not None:
            stopped = isinstance(error, Interrupted)  # as all processes are
            self._messenger.close(None if stopped else error)
            if stopped:
                end_after(EXIT_SECONDS, error.code)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._wakeup)
            self._release(*STOPS, signal.SIGUSR1)
        self._closed.set()
        os.write(self._pipe[1], b"\0")
        self._guard.join()
        for end in self._pipe:
            os.close(end)

    def _decided(self) -> bool:
        return not self._progress.deciding or self._progress.stop_after is not None

    def _note(self, number: int, _) -> None:
        """In the main thread, between two lines of Python."""
        if number in STOPS:
            self._release(*STOPS)  # a second one is not held back
            if self._messenger is None:
                self._progress.signal = number

    def _release(self, *numbers: int) -> None:
        for number in numbers:
            if number in self._previous:
                signal.signal(number, self._previous.pop(number))

    def _stand_guard(self) -> None:
        while not self._closed.is_set():
            ready, _, _ = select.select([self._pipe[0]], [], [], BEAT_SECONDS)
            for number in os.read(self._pipe[0], 64) if ready else b"":
                if number == signal.SIGUSR1:
                    self._progress.profile_asked = True
                elif number in STOPS:
                    self._ask_to_stop(number)
            self._look_for_the_profile_file()
            if self._messenger is not None:
                self._messenger.look_at_the_clock()
            else:
                self._look_alone()

    def _look_for_the_profile_file(self) -> None:
        if jax.process_index() == 0 and self.profile_file is not None and self.profile_file.is_file():
            with contextlib.suppress(OSError):
                self.profile_file.unlink()
                self._progress.profile_asked = True

    def _look_alone(self) -> None:
        progress = self._progress
        if progress.profile_asked:
            progress.profile_asked, progress.profile_due = False, True
        with progress.changed:
            since, phase, done = time.monotonic() - progress.moved, progress.phase, progress.done
        if phase not in FREE and since > progress.hang_seconds:
            self._end(RESTART, f"no progress for {since:.0f} s, in {phase} after step {done}", stacks=True)

    def _ask_to_stop(self, number: int) -> None:
        progress = self._progress
        if self._messenger is not None:
            progress.asked = progress.asked or number
            self._messenger.hurry()
            return
        with progress.changed:
            if progress.phase in FREE:
                self._end(128 + number, f"stopped by {signal.Signals(number).name}; nothing was there to be saved")

    def _end(self, code: int, line: str, *, stacks: bool = False) -> None:
        """Ends this process from a thread, whatever the main thread does: nothing can be lost any more, or won."""
        if not self._ending.acquire(blocking=False):
            return
        who = f"process {jax.process_index()}: " if self._messenger is not None else ""
        print(f"{who}{line}", file=sys.__stderr__, flush=True)
        if stacks:
            faulthandler.dump_traceback(file=sys.__stderr__)
        if self._messenger is not None:
            self._messenger.leave()
        os._exit(code)
