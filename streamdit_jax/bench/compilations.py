"""Counts what jax compiles, and the seconds it takes."""

import time

import jax
from jax import monitoring

_TRACED = "/jax/core/compile/jaxpr_trace_duration"
_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """In a `with`: `count` programs were lowered to be compiled; tracing and lowering took `lowering` seconds, and
    `compiling` took those, or reading what the cache on disk has. `seconds` is both.

    A program that the cache on disk still has is lowered too, and counts: it was not the compiled step at hand.
    """

    def __init__(self):
        self.count = 0
        self._spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}

    @property
    def lowering(self) -> float:
        return sum(end - begin for begin, end in self._spans[False])

    @property
    def compiling(self) -> float:
        return sum(end - begin for begin, end in self._spans[True])

    @property
    def seconds(self) -> float:
        return self.lowering + self.compiling

    def _hear(self, event: str, seconds: float, **_) -> None:
        if event in (_TRACED, _LOWERED, _COMPILED):
            now, spans = time.perf_counter(), self._spans[event == _COMPILED]
            while spans and spans[-1][0] >= now - seconds:
                spans.pop()  # a function that was traced within another is part of it
            spans.append((now - seconds, now))
        if event == _LOWERED:
            self.count += 1

    def __enter__(self) -> "Compilations":
        monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *_) -> None:
        jax.effects_barrier()
        monitoring.unregister_event_duration_listener(self._hear)
