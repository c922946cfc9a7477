"""Counts what jax compiles, and the seconds it takes."""

import jax
from jax import monitoring

_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILING = ("/jax/core/compile/jaxpr_trace_duration", _LOWERED, "/jax/core/compile/backend_compile_duration")


class Compilations:
    """In a `with`: `count` programs were lowered to be compiled, and tracing, lowering and compiling took `seconds`.

    A program that the cache on disk still has is lowered too, and counts: it was not the compiled step at hand.
    """

    def __init__(self):
        self.count, self.seconds = 0, 0.0

    def _hear(self, event: str, seconds: float, **_) -> None:
        if event in _COMPILING:
            self.seconds += seconds
        if event == _LOWERED:
            self.count += 1

    def __enter__(self) -> "Compilations":
        monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *_) -> None:
        jax.effects_barrier()
        monitoring.unregister_event_duration_listener(self._hear)
