"""A small transformer on host devices, against one device: `python sharded_dit.py NAME …`, with eight of them.

Prints a JSON object: per case the collectives of its compiled forward and training step, and where they lie. What is
not equal to one device is an AssertionError.
"""

import dataclasses
import functools
import json
import re
import sys
from collections import Counter

import jax
import numpy as np

from streamdit_jax import flow, sharding, stream
from streamdit_jax.compiled import streaming_step
from streamdit_jax.kernels.window_parallel import layer_exchange
from streamdit_jax.models.dit import DiT, DiTConfig, unstack
from streamdit_jax.partition import PartitionScheme
from streamdit_jax.stages import OptimizerConfig, StageConfig
from streamdit_jax.training.objective import Objective
from streamdit_jax.training.program import make_program
from streamdit_jax.training.state import init_state

BATCH, TEXT_WIDTH, TEXT_TOKENS = 8, 16, 6
# 2 × 2 × 2 windows, shifted in every second layer, which do not wrap along time.
PLAIN = DiTConfig(
    latent=(8, 8, 8, 4),
    patch=(1, 2, 2),
    width=32,
    num_layers=4,
    num_heads=4,
    ffn_width=64,
    windows=((4, 2, 2),),
    wrap=(False, True, True),
    time_frequencies=8,
    remat="none",
    dtype="float32",
)
UNSHIFTED = dataclasses.replace(PLAIN, shifted=(False,), num_layers=2)
WRAPPED = dataclasses.replace(PLAIN, wrap=(True, True, True), remat="full")
SIX_WINDOWS = dataclasses.replace(PLAIN, latent=(8, 4, 12, 4), num_layers=2)
# Everything that the other branch of each choice does, and windows of two forms: 8 and 4 of them.
WAN = dataclasses.replace(
    PLAIN,
    windows=((4, 2, 2), (4, 4, 2)),
    norm="rms",
    ffn="swiglu",
    adaln="per_block",
    position="rope",
    qk_norm="width",
    text_projection="mlp",
    pooled_text=True,
    num_layers=2,
)
CASES = {
    "data": (PLAIN, {"data": 8}),
    "fsdp": (PLAIN, {"fsdp": 8}),
    "tensor": (PLAIN, {"tensor": 4}),
    "window": (PLAIN, {"window": 8}),
    "window of two": (WRAPPED, {"window": 2}),
    "window of four": (WRAPPED, {"window": 4}),
    "window of three": (SIX_WINDOWS, {"window": 3}),
    "unshifted": (UNSHIFTED, {"window": 8}),
    "data, window, tensor": (PLAIN, {"data": 2, "window": 2, "tensor": 2}),
    "fsdp, window": (WRAPPED, {"fsdp": 4, "window": 2}),
    "fsdp, window, tensor": (WAN, {"fsdp": 2, "window": 2, "tensor": 2}),
    "heads that tensor does not divide": (dataclasses.replace(PLAIN, num_heads=2, num_layers=2), {"tensor": 4}),
}
STAGE = StageConfig(
    steps=10, batch_size=BATCH, num_frames=8, optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=0)
)


def collectives(text):
    """Of optimised HLO: the collectives by kind; those within loops; and the sizes of the arrays that are gathered."""
    kinds = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
    bodies = set(re.findall(r"\bbody=%?([\w.\-]+)", text))
    total, inside, gathered, computation = Counter(), Counter(), [], None
    for line in text.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            computation = opened[1]
        found = re.search(rf" = (.*?) ({kinds})(?:-start)?\(", line)
        if found is None:
            continue
        total[found[2]] += 1
        inside[found[2]] += computation in bodies
        if found[2] == "all-gather":
            shapes = re.findall(r"\[([\d,]+)\]", found[1])
            gathered.append(max(int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes))
    return {"count": dict(total), "in_loops": dict(+inside), "gathered": sorted(gathered)}


def filled(shapes):
    """Parameters without the zeros of a fresh model."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes)


def drawn(config, batch=BATCH):
    """A batch: latents, noise, levels, one encoder's text, and frames of which the last do not exist."""
    rng = np.random.default_rng(1)
    present = np.ones((batch, config.latent[0]), bool)
    present[::2, -3:] = False
    return {
        "latents": rng.normal(size=(batch, *config.latent)).astype(np.float32),
        "noise": rng.normal(size=(batch, *config.latent)).astype(np.float32),
        "levels": rng.uniform(size=(batch, config.latent[0])).astype(np.float32),
        "text": rng.normal(size=(batch, TEXT_TOKENS, TEXT_WIDTH)).astype(np.float32),
        "text_mask": np.arange(TEXT_TOKENS) < rng.integers(1, TEXT_TOKENS, size=(batch, 1)),
        "present": present,
    }


def forward(config, params, batch):
    text = ((batch["text"], batch["text_mask"]),)
    return DiT(config).apply({"params": params}, batch["latents"], batch["levels"], text, batch["present"])


def objective(config):
    def init(key, batch):
        text = ((batch["text"], batch["text_mask"]),)
        shapes = jax.eval_shape(DiT(config).init, key, batch["latents"], batch["levels"], text)["params"]
        return {"dit": filled(shapes)}

    def loss(params, constants, batch, key):
        noised = flow.interpolate(batch["latents"], batch["noise"], batch["levels"])
        target = flow.velocity_target(batch["latents"], batch["noise"])
        predicted = forward(config, params["dit"], {**batch, "latents": noised})
        return flow.loss(predicted, target, batch["present"]), {}

    return Objective("toy", init, loss)


def run(config, axes, with_forward):
    """(forward's output or None, state after one step, metrics, their collectives) on the mesh of these axes."""
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    mesh = sharding.make_mesh(axes, devices=devices)
    batch, key = sharding.shard_batch(drawn(config), mesh), jax.random.key(0)
    program = make_program(objective(config), STAGE, mesh)
    like = program.abstract_state(key, drawn(config))
    state = sharding.place(init_state(program.objective, program.tx, key, drawn(config)), mesh)
    out, found = None, {}
    if with_forward:
        with sharding.on(mesh):
            predict = jax.jit(functools.partial(forward, config)).lower(state.params["dit"], batch).compile()
        out, found["forward"] = np.asarray(predict(state.params["dit"], batch)), collectives(predict.as_text())
    step = program.lower(like, (), batch, jax.device_put(key, sharding.replicated(mesh))).compile()
    found["step"] = collectives(step.as_text())
    state, metrics = step(state, (), batch, jax.device_put(key, sharding.replicated(mesh)))
    return out, jax.tree.map(np.asarray, state), {name: float(value) for name, value in metrics.items()}, found


on_one = functools.cache(lambda config, with_forward: run(config, {"data": 1}, with_forward))


def compare(name):
    """A case of `CASES`; its collectives, and the exchanges that its layers plan."""
    config, axes = CASES[name]
    with_forward = config in (PLAIN, UNSHIFTED)
    out, state, metrics, found = run(config, axes, with_forward)
    single_out, single, single_metrics, alone = on_one(config, with_forward)
    assert not any(part["count"] for part in alone.values()), alone
    if out is not None:
        np.testing.assert_allclose(out, single_out, atol=2e-5 * np.abs(single_out).max())
    for metric in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics[metric], single_metrics[metric], rtol=2e-5)
    # Adam's first moment after one step is the gradient, by a factor; the step itself is its sign, unless it is nearly
    # nothing: there rounding decides.
    moments, wanted_moments = (jax.tree.leaves(s.opt_state[1][0].mu) for s in (state, single))
    params, wanted_params = (jax.tree.leaves(s.params) for s in (state, single))
    assert any(np.abs(moment).max() > 0 for moment in moments)
    for moment, wanted, param, wanted_param in zip(moments, wanted_moments, params, wanted_params):
        largest = np.abs(wanted).max()
        np.testing.assert_allclose(moment, wanted, atol=1e-4 * largest)
        clear = np.abs(wanted) > 1e-2 * largest
        np.testing.assert_allclose(param[clear], wanted_param[clear], atol=2e-3 * STAGE.optimizer.learning_rate)
    devices = axes.get("window", 1)
    planned = [
        0 if devices == 1 or layer.is_reshape else len(layer_exchange(layer, devices, back).sends)
        for layer in config.layer_windows()
        for back in (False, True)
    ]
    tokens = config.layer_windows()[0].order.num_tokens
    return {**found, "planned": sum(planned), "hidden_size": BATCH * tokens * config.width}


def streaming(axes):
    """The streaming step, two rows of which the second emits, guided: one device's states, and the collectives."""
    config = dataclasses.replace(PLAIN, num_layers=2)
    scheme = PartitionScheme.parse("N4c2s2")
    batch = drawn(config, 1)
    shapes = jax.eval_shape(objective(config).init, jax.random.key(0), batch)["dit"]
    params, rows = unstack(filled(shapes)), stream.streaming_rows(scheme)
    text = ((batch["text"], batch["text_mask"]),)
    condition = stream.Condition(text, jax.tree.map(np.zeros_like, text), np.full(1, 2.0, np.float32))
    results = []
    for sizes in ({"data": 1}, axes):
        mesh = sharding.make_mesh(sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])
        everywhere = functools.partial(jax.device_put, device=sharding.replicated(mesh))
        keys = jax.random.split(jax.random.key(1), 1)
        state = everywhere(stream.initial_state(keys, scheme, config.latent[1:]))
        arguments = sharding.place(params, mesh), everywhere(stream.row_at(rows, 0)), everywhere(condition)
        with sharding.on(mesh):
            lowered = streaming_step(config, scheme, False).lower(arguments[0], state, *arguments[1:])
        step = lowered.compile()
        for index in range(2):
            state, front = step(arguments[0], state, everywhere(stream.row_at(rows, index)), arguments[2])
        results.append((np.asarray(state.buffer), np.asarray(front)))
    for got, wanted in zip(results[1], results[0]):
        np.testing.assert_allclose(got, wanted, atol=2e-5 * np.abs(wanted).max())
    return collectives(step.as_text())


if __name__ == "__main__":
    report = {}
    for name in sys.argv[1:]:
        if name.startswith("streaming"):
            report[name] = streaming(json.loads(name.removeprefix("streaming")))
        else:
            report[name] = compare(name)
    print(json.dumps(report))
