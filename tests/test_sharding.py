"""Meshes, rules and the table; and law 5: sharded equals single-device, and large parameters are really cut."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from streamdit_jax import sharding
from streamdit_jax.errors import ConfigError

HERE = Path(__file__).parent


def mesh(data=1, fsdp=1, window=1, tensor=1):
    """A mesh without devices: enough to decide where things go."""
    return AbstractMesh((data, fsdp, window, tensor), sharding.MESH_AXES)


def spec(name, shape, mesh):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    for part in reversed(name.split("/")):
        leaf = {part: leaf}
    return jax.tree.leaves(sharding.param_shardings(leaf, mesh))[0].spec


def test_one_device_needs_no_configuration():
    one = sharding.make_mesh(devices=jax.devices()[:1])
    assert dict(one.shape) == {"data": 1, "fsdp": 1, "window": 1, "tensor": 1}
    assert spec("dit/blocks/feed_forward/up/kernel", (4, 64, 256), one) == PartitionSpec(None, None, None)


@pytest.mark.parametrize(
    "axes, complaint",
    [
        ({"model": 2}, r"^mesh\.model: unknown axis; use data, fsdp, window, tensor"),
        ({"data": 0}, r"^mesh\.data: 0 is not a size"),
        ({"data": 1.0}, r"^mesh\.data: 1\.0 is not a size"),
        ({"data": -1, "fsdp": -1}, r"^mesh\.fsdp: only one axis may be -1, and mesh\.data is already"),
        ({"data": 2, "fsdp": 4}, r"^mesh: data 2 × fsdp 4 does not fit 1 device\(s\)"),
        ({"data": -1, "fsdp": 4}, r"^mesh: data -1 × fsdp 4 does not fit 1 device\(s\)"),
        ({"data": 1, "slices": 2}, r"^mesh\.slices: 2 slices do not divide a data axis of 1; make it a multiple"),
        ({"slices": 0}, r"^mesh\.slices: 0 is not a count of slices"),
    ],
)
def test_impossible_meshes_are_named(axes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        sharding.make_mesh(axes, devices=jax.devices()[:1])


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("dit/patch_embedding/kernel", (32, 256), (None, "fsdp")),
        ("dit/velocity/kernel", (256, 32), ("fsdp", None)),
        ("dit/time_projection/kernel", (256, 1536), ("fsdp", "tensor")),
        ("dit/blocks/self_attention/qkv/kernel", (6, 256, 768), (None, "fsdp", "tensor")),
        ("dit/blocks/self_attention/out/kernel", (6, 256, 256), (None, "tensor", "fsdp")),
        ("dit/blocks/0/self_attention/out/kernel", (256, 256), ("tensor", "fsdp")),
        ("dit/blocks/cross_attention/key_value/kernel", (6, 256, 512), (None, "fsdp", "tensor")),
        ("dit/blocks/feed_forward/up/kernel", (6, 256, 1024), (None, "fsdp", "tensor")),
        ("dit/blocks/feed_forward/down/kernel", (6, 1024, 256), (None, "tensor", "fsdp")),
        ("dit/blocks/feed_forward/down/bias", (6, 256), (None, None)),
        ("dit/blocks/modulation/table", (6, 6, 256), (None, None, None)),
        ("text/0/block_1/ffn/in/kernel", (64, 128), ("fsdp", "tensor")),
        ("text/0/block_1/ffn/out/kernel", (128, 64), ("tensor", "fsdp")),
        ("text/0/block_1/attention/out/kernel", (64, 64), ("tensor", "fsdp")),
        ("text/0/embedding/embedding", (384, 64), ("tensor", "fsdp")),
        ("tae/encoder/block_0_0/causal/conv/kernel", (3, 3, 512, 256), (None, None, None, ("fsdp", "tensor"))),
        ("tae/latent_mean", (32,), (None,)),
        ("step", (), ()),
    ],
)
def test_where_parameters_go(name, shape, expected):
    cut = mesh(data=2, fsdp=4, window=2, tensor=2)
    assert spec(name, shape, cut) == PartitionSpec(*expected)
    for prefix in ("params", "ema_params", "opt_state/1/0/mu"):  # all that belongs to a parameter lies with it
        assert spec(f"{prefix}/{name}", shape, cut) == PartitionSpec(*expected)


def test_an_axis_of_one_device_cuts_nothing():
    assert spec("dit/up/kernel", (64, 256), mesh(data=8)) == PartitionSpec(None, None)
    assert spec("dit/up/kernel", (64, 256), mesh(fsdp=8)) == PartitionSpec("fsdp", None)


def test_what_does_not_divide_stays_whole_and_large_ones_warn_once():
    cut = mesh(fsdp=7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert spec("dit/small/kernel", (64, 64), cut) == PartitionSpec(None, None)
            assert spec("dit/large/kernel", (1024, 1024), cut) == PartitionSpec(None, None)
            assert spec("dit/large/bias", (2**21,), cut) == PartitionSpec(None)
    assert [str(warning.message) for warning in caught] == [
        "dit/large/kernel [1024, 1024] is whole on every device: fsdp 7 divides none of its axes"
    ]


@pytest.mark.parametrize(
    "size, axes", [(256, ("data", "fsdp")), (64, "fsdp"), (192, "fsdp"), (12, "data"), (2, None), (3, None)]
)
def test_a_batch_is_cut_along_the_axes_that_divide_it(size, axes):
    """A part of the batch, such as a student's rollouts, may have fewer examples than there are devices."""
    assert sharding.partition_spec(("batch",), (size,), mesh(data=4, fsdp=64)) == PartitionSpec(axes)


def test_colliding_axes_raise():
    table = {"embed": ("fsdp",), "mlp": ("tensor", "fsdp")}
    with pytest.raises(ValueError, match=r"^up/kernel: axes 'embed' and 'mlp' collide on mesh axis 'fsdp'"):
        sharding.partition_spec(("embed", "mlp"), (8, 8), mesh(fsdp=2, tensor=2), "up/kernel", table)
    with pytest.raises(ValueError, match="logical axis 'heads' is not in the table"):
        sharding.partition_spec(("heads",), (8,), mesh(), "x", table)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a machine that is not there: enough to arrange a mesh."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "described"


def slices_of(axes, chips):
    """The arranged devices' slices, in the shape of the mesh."""
    *shape, slices = axes
    return np.vectorize(lambda chip: chip.slice_index)(sharding._arrange(tuple(shape), slices, chips))


def test_only_the_outermost_part_of_data_goes_over_slices():
    chips = [Chip(id=n, slice_index=n % 2) for n in range(16)]  # listed as a cluster may list them: in turns
    lie = slices_of((4, 2, 1, 2, 2), chips)
    assert lie.shape == (4, 2, 1, 2) and np.all(lie[:2] == 0) and np.all(lie[2:] == 1)
    unknown = [Chip(id=n, slice_index=0) for n in range(16)]  # no one says where they are: those listed together
    placed = sharding._arrange((4, 2, 1, 2), 2, unknown)
    assert [chip.id for chip in placed[:2].ravel()] == list(range(8))
    with pytest.raises(ConfigError, match=r"^mesh\.slices: 4, but the devices lie in 2 slices"):
        slices_of((4, 2, 1, 2, 4), chips)


def kernels(**sizes):
    return {
        name.replace("__", "/"): {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in sizes.items()
    }


def test_parameters_that_stay_whole_are_refused_by_name():
    model = kernels(dit__up=(4096, 4096), dit__down=(3000, 1000))
    sharding.require_cut(model, mesh(fsdp=8, tensor=4), "mesh")
    sharding.require_cut(model, mesh(data=7), "mesh")  # nothing was to be cut
    with pytest.raises(
        ConfigError,
        match=r"^mesh: fsdp 16 leaves 15% of the parameters whole on every device; the largest: "
        r"dit/down/kernel \[3000, 1000\] \(cut by fsdp = 2 or 4 or 5 or 8 or 10\)$",
    ):
        sharding.require_cut(model, mesh(fsdp=16), "mesh")
    model["dit/position"] = {"table": jax.ShapeDtypeStruct((4096, 512), jnp.float32)}
    with pytest.raises(ConfigError, match=r"the largest: dit/position/table \[4096, 512\] \(cut by no size of these\)"):
        sharding.require_cut(model, mesh(fsdp=8), "mesh")
    sharding.require_cut(kernels(dit__up=(250, 250)), mesh(fsdp=4), "mesh")  # too small to matter


def test_a_function_sees_the_mesh_only_where_it_is_told_to():
    one = sharding.make_mesh(devices=jax.devices()[:1])
    x = jnp.ones((4, 4))

    def lowered():
        return jax.jit(lambda x: sharding.constrain(x, "batch", None) * sharding.parts("tokens")).lower(x).as_text()

    outside = lowered()
    with sharding.on(one):
        assert lowered() == outside and "sharding" not in outside
    assert sharding.map_shards(jnp.sin, (x,), (("batch", None),), ("batch", None)).shape == x.shape


def test_what_was_traced_for_one_device_never_serves_another():
    class Described:
        platform, device_kind, process_index = "tpu", "TPU v5", 0

    described = jax.sharding.Mesh([Described()], ("data",))
    traced_for = []

    @jax.jit
    def counted(x):
        traced_for.append(sharding.target().platform)
        return x + len(traced_for)

    assert sharding.target() == jax.devices()[0]
    here = jax.default_backend()
    assert [float(counted(0.0)) for _ in range(2)] == [1, 1]
    with sharding.on(described):
        assert sharding.target() == described.devices.flat[0]
        assert "dense<2.0" in counted.lower(0.0).as_text()
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(sharding.target()))
        thread.start()
        thread.join()
    assert elsewhere == [jax.devices()[0]]
    assert float(counted(0.0)) == 1 and traced_for == [here, "tpu"]
    with pytest.raises(KeyError), sharding.on(described):
        raise KeyError
    assert sharding.target() == jax.devices()[0]


@pytest.mark.parametrize("config", sorted(path.name for path in (HERE.parent / "configs").glob("*.py")))
def test_every_configuration_is_cut_nearly_evenly(config):
    """No device holds much more than its share; what lies whole are biases, tables and the smallest kernels."""
    from streamdit_jax.config import from_arguments
    from streamdit_jax.parameters import initialise

    model = from_arguments([f"--config={HERE.parent / 'configs' / config}"])
    shapes = jax.eval_shape(lambda key: initialise(model, key), jax.random.key(0))
    cut = mesh(fsdp=16, tensor=4) if config.startswith("streamdit_4b") else mesh(fsdp=2, tensor=2)
    total, held = 0, 0
    for leaf, where in zip(jax.tree.leaves(shapes), jax.tree.leaves(sharding.param_shardings(shapes, cut))):
        total += math.prod(leaf.shape)
        held += math.prod(where.shard_shape(leaf.shape))
    sharding.require_cut(shapes, cut, "mesh")
    devices = math.prod(cut.shape.values())
    assert held * devices < (1.1 if config.startswith("streamdit_4b") else 1.5) * total


ON_EIGHT = """
import importlib.util, json, sys
import jax, jax.numpy as jnp, numpy as np
from streamdit_jax import sharding
from streamdit_jax.training.checkpoint import Checkpoints, checksums
from streamdit_jax.training.optimizer import make_optimizer
from streamdit_jax.training.state import init_state
from streamdit_jax.training.step import make_train_step

toy_path, directory, optimizer = sys.argv[1:]
spec = importlib.util.spec_from_file_location("toy", toy_path)
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)
tx = make_optimizer(toy.optimizer(name=optimizer), 10)


def train(mesh, steps=5):
    objective, key, losses = toy.objective(), jax.random.key(0), []
    like = jax.eval_shape(lambda key, batch: init_state(objective, tx, key, batch), key, toy.batch(0))
    like = sharding.abstract_arrays(like, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, like)
    state = jax.jit(lambda key, batch: init_state(objective, tx, key, batch), out_shardings=shardings)(
        key, sharding.shard_batch(toy.batch(0), mesh)
    )
    step = jax.jit(
        make_train_step(objective, tx, 0.9), donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh))
    )
    for n in range(steps):
        state, metrics = step(state, objective.constants, sharding.shard_batch(toy.batch(n), mesh), key)
        losses.append(float(metrics["loss"]))
    return state, losses, like


def numbers(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


one = sharding.make_mesh({"data": 1}, devices=jax.devices()[:1])
single, single_losses, like_one = train(one)
report = {}
for axes in ({"data": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 4}):
    mesh = sharding.make_mesh(axes)
    state, losses, _ = train(mesh)
    np.testing.assert_allclose(losses, single_losses, rtol=1e-6)
    for part in ("params", "ema_params"):
        for a, b in zip(numbers(getattr(state, part)), numbers(getattr(single, part))):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert [int(x) for x in checksums(state)] == [int(x) for x in checksums(numbers(state))], "depends on devices"
    report[str(mesh.shape)] = {}
    for part in ("params", "ema_params", "opt_state"):
        leaves = jax.tree_util.tree_leaves_with_path(getattr(state, part))
        kernels = [x for path, x in leaves if sharding.path_name(path).endswith("kernel")]
        parts = sorted({x.size // x.addressable_shards[0].data.size for x in kernels})
        report[str(mesh.shape)][part] = parts

checkpoints = Checkpoints(directory)
checkpoints.save(5, state, next_step=5)
checkpoints.wait()
for mesh in (sharding.make_mesh({"data": 1, "fsdp": 4}, devices=jax.devices()[:4]), one):
    like = sharding.abstract_arrays(like_one, mesh)
    restored = checkpoints.restore(like).state
    assert all(np.array_equal(a, b) for a, b in zip(numbers(restored), numbers(state)))
    assert all(x.sharding == y.sharding for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(like)))
checkpoints.close()
print(json.dumps(report))
"""


def on_devices(count, program, *arguments):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
        "PYTHONPATH": str(HERE.parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_sharded_training_equals_one_device(tmp_path, optimizer):
    report = on_devices(8, ON_EIGHT, HERE / "training" / "toy.py", tmp_path / "checkpoints", optimizer)
    assert len(report) == 2
    for (
        parts
    ) in report.values():  # each kernel, its average and its moments lie in as many parts as the mesh has for them
        assert parts["params"] == parts["ema_params"] == parts["opt_state"]
    assert [parts["params"] for parts in report.values()] == [[4], [8]]


REAL_MODEL = """
import json, sys
import jax, numpy as np
from streamdit_jax import sharding
from streamdit_jax.config import from_arguments
from streamdit_jax.models.text import tokenize
from streamdit_jax.training.flow_matching import flow_matching, max_tokens
from streamdit_jax.training.optimizer import make_optimizer
from streamdit_jax.training.state import init_state
from streamdit_jax.training.step import make_train_step

config = from_arguments([f"--config={sys.argv[1]}"])
stage = config.training.flow_matching
objective = flow_matching(config, stage.objective)
tx = make_optimizer(stage.optimizer, stage.steps)
rng = np.random.default_rng(0)
tokens, mask = tokenize("a red car drives past green hills", max_tokens(config.text))
batch = {
    "latents": rng.normal(size=(8, *config.dit.latent)).astype(np.float32),
    "tokens": np.stack([tokens] * 8),
    "text_mask": np.stack([mask] * 8),
}


def train(mesh, steps=3):
    key, losses = jax.random.key(0), []
    placed = sharding.shard_batch(batch, mesh)
    init = lambda key, batch: init_state(objective, tx, key, batch)
    shardings = sharding.param_shardings(jax.eval_shape(init, key, placed), mesh)
    state = jax.jit(init, out_shardings=shardings)(key, placed)
    step = jax.jit(make_train_step(objective, tx, 0.9), out_shardings=(shardings, sharding.replicated(mesh)))
    for _ in range(steps):
        state, metrics = step(state, objective.constants, placed, key)
        losses.append(float(metrics["loss"]))
    return losses


single = train(sharding.make_mesh({"data": 1}, devices=jax.devices()[:1]))
cut = train(sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
print(json.dumps([single, cut]))
"""


@pytest.mark.slow
def test_sharded_transformer_equals_one_device():
    single, cut = on_devices(8, REAL_MODEL, HERE.parent / "configs" / "smoke.py")
    assert cut == pytest.approx(single, rel=1e-5) and single[0] != single[-1]
