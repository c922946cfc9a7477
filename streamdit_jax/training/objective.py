"""What the training loop knows of a task: how its parameters begin and what its loss is.

Pretraining, fine-tuning and distillation differ by an `Objective` and by nothing else (law 4): the loop, the optimizer,
the checkpoints and the shardings are the same for all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

Params = Any  # a tree of arrays; by habit a dict from module name to that module's parameters, {"text": …, "dit": …}
Batch = dict[str, Any]  # named arrays; the first axis of each counts the examples of the global batch
Loss = tuple[jax.Array, dict[str, jax.Array]]


@dataclass(frozen=True)
class Objective:
    """An objective is a loss function.

    Attributes:
        name: what log lines and files call it, e.g. "flow_matching".
        init: (key, batch) → params, float leaves. Pure and traceable: it runs under `jit`, so that no device need hold
            the whole of a large model, and under `jax.eval_shape`.
        loss: (params, constants, batch, key) → (scalar loss, named scalars to be logged beside it). Differentiated in
            params only. The means it takes are over the whole global batch: under a mesh the arrays are global and XLA
            inserts the reductions.
        constants: arrays that the loss reads and never changes: a scheme's tables, a frozen autoencoder, a teacher.
            They enter the compiled step as an argument, so that other values of the same shapes do not compile it again
            (law 1).
        flops: batch → FLOPs of one step on a batch of these shapes (arrays or `jax.ShapeDtypeStruct`s), counted from
            the configuration: what the devices must at least compute, whatever is rematerialised. None where nobody
            counted.
        first_batch: what init reads instead of the stage's first batch, where it takes more (or other) examples to
            begin well; a data-dependent initialisation does.
    """

    name: str
    init: Callable[[jax.Array, Batch], Params]
    loss: Callable[[Params, Any, Batch, jax.Array], Loss]
    constants: Any = ()
    first_batch: Batch | None = None
    flops: Callable[[Batch], int] | None = None
