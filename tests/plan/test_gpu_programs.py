"""Programs that are kept (`streamdit_jax.programs`) for a GPU that is not there: what is kept compiles to what the
direct path compiles to, kernels and all. In the environment of `streamdit plan`.
"""

import collections
import dataclasses
import importlib.util
import re

import jax
import pytest
from jax import export

from streamdit_jax import sharding
from streamdit_jax.compiled import streaming_step
from streamdit_jax.config import from_arguments
from streamdit_jax.partition import PartitionScheme
from streamdit_jax.plan.programs import streaming_program
from streamdit_jax.plan.topology import describe, only_describe
from streamdit_jax.programs import ANY_CALL
from streamdit_jax.stream import is_masked

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs JAX's CUDA plugin"),
]


def test_a_kept_step_of_the_4b_model_compiles_for_an_h200_as_the_direct_one_does():
    only_describe("h200:1")
    config = from_arguments(["--config=configs/streamdit_4b_distill.py", "--config.dit.num_layers=2"])
    config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, dtype="bfloat16"))
    mesh = sharding.make_mesh(dataclasses.replace(config.mesh, data=1, fsdp=1), devices=describe("h200:1").devices)
    direct = streaming_program(config, mesh)
    scheme = PartitionScheme.parse(config.sampling.scheme)
    shape = PartitionScheme(scheme.num_references, scheme.num_chunks, scheme.chunk_size, 1)
    step = streaming_step(config.dit, shape, is_masked(config.sampling.filling))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), direct.arguments)
    with sharding.on(mesh):
        data = export.export(step, platforms=["cuda"], disabled_checks=[ANY_CALL])(*abstract).serialize()
    kept = jax.jit(export.deserialize(data).call, donate_argnums=1).lower(*direct.arguments)

    def described(lowered):
        compiled = lowered.compile()
        text, memory = compiled.as_text(), compiled.memory_analysis()
        calls = collections.Counter(re.findall(r'custom_call_target="([^"]+)"', text))
        return calls, text.count(" fusion("), memory.temp_size_in_bytes, memory.alias_size_in_bytes

    calls, fusions, temporary, donated = described(kept)
    assert (calls, fusions, temporary, donated) == described(direct.lowered)
    assert calls["mosaic_gpu_v2"] > 0 and donated > 0
