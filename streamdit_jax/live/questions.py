"""Work that a thread does for those who ask: the text encoder's, beside the denoiser's (StreamDiT §8, fig. 11)."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax


class Questions:
    """A bounded queue of questions, answered one by one in the thread that runs `run`.

    changed: the lock, notified of every change. check: raises where nothing more can be asked. ready: whether an answer
    is given when the device has made it. Otherwise it may still be under way there, behind the forwards that were sent
    before it, and whoever uses it on the device need not wait for them.
    """

    def __init__(self, changed: threading.Condition, bound: int, check: Callable[[], None], *, ready: bool):
        self._changed, self._bound, self._check, self._ready = changed, bound, check, ready
        self._waiting: deque[tuple[Callable[[], Any], Future]] = deque()
        self._stopped = False

    def ask(self, question: Callable[[], Any]) -> Any:
        """The question's result, or its error."""
        answer: Future = Future()
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < self._bound or self._stopped)
            self._check()
            self._waiting.append((question, answer))
            self._changed.notify_all()
        return answer.result()

    def stop(self, reason: Exception) -> None:
        """Ends `run` after the question under way; others who wait are told the reason. The lock is held."""
        self._stopped = True
        while self._waiting:
            self._waiting.popleft()[1].set_exception(reason)
        self._changed.notify_all()

    def run(self) -> None:
        """Answers until it is stopped."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if self._stopped:
                    return
                question, answer = self._waiting.popleft()
                self._changed.notify_all()
            try:
                result = question()
                answer.set_result(jax.block_until_ready(result) if self._ready else result)
            except BaseException as error:  # whoever asked is told, and the next is answered
                answer.set_exception(error)
