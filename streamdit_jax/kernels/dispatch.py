"""Which backend of an operation serves: those of the device's platform are tried in order.

An operation is a table of backends, functions of one signature, and a table of preferences. A backend that does not
take a case raises NotImplementedError with a short reason, and the next one is tried. Plain definitions ("reference")
specify and test, and are never chosen on their own.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streamdit_jax import sharding

logger = logging.getLogger("streamdit_jax")


@functools.cache
def _log_choice(operation: str, device: str, backend: str, passed_over: tuple[str, ...]) -> None:
    logger.info("%s on %s: %s%s", operation, device, backend, f" ({'; '.join(passed_over)})" if passed_over else "")


def dispatch(
    operation: str,
    backends: Mapping[str, Callable],
    preference: Mapping[str, Sequence[str]],
    backend: str | None = None,
) -> Callable[..., Any]:
    """The operation as a function of what its backends take.

    preference: per platform of the device that one traces for (`sharding.target`), names, the best first; platforms
        that it does not name do as CPUs do.
    backend: a name to use and no other; by default the first that does not raise NotImplementedError serves. The choice
        is logged once for each kind of device.

    Raises ValueError for an unknown backend; the function raises NotImplementedError if none takes the case.
    """
    if backend is not None:
        if backend not in backends:
            raise ValueError(f"backend: {backend!r} is not one of {', '.join(backends)}")
        return backends[backend]

    def first_that_serves(*arguments, **options):
        target, passed_over = sharding.target(), []
        for name in preference.get(target.platform, preference["cpu"]):
            try:
                result = backends[name](*arguments, **options)
            except NotImplementedError as reason:
                passed_over.append(f"{name}: {reason}")
                continue
            _log_choice(operation, target.device_kind, name, tuple(passed_over))
            return result
        raise NotImplementedError(f"no {operation} on {target.device_kind}: {'; '.join(passed_over)}")

    return first_that_serves
