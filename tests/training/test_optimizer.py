"""AdamW's and Muon's numbers against their formulas in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamdit_jax.training.optimizer import decay_mask, hidden_matrices, make_optimizer, make_schedule


@pytest.mark.parametrize("steps, warmup", [(100, 10), (100, 0), (7, 3), (5, 5), (1, 0), (1, 1)])
def test_cosine_schedule_is_its_formula(toy, steps, warmup):
    config = toy.optimizer(learning_rate=0.3, warmup_steps=warmup, final_scale=0.2)
    n = np.arange(steps)
    q = np.clip((n - warmup) / max(1, steps - 1 - warmup), 0, 1)
    expected = 0.3 * (0.2 + 0.8 * (1 + np.cos(np.pi * q)) / 2)
    expected[:warmup] = 0.3 * (n[:warmup] + 1) / max(warmup, 1)
    np.testing.assert_allclose(jax.vmap(make_schedule(config, steps))(n), expected, rtol=1e-6)


def test_schedule_reaches_its_peak_and_its_end(toy):
    config = toy.optimizer(learning_rate=0.5, warmup_steps=4, final_scale=0.1)
    cosine = np.asarray(jax.vmap(make_schedule(config, 20))(jnp.arange(20)))
    np.testing.assert_allclose(cosine[[0, 3, 4, 19]], [0.125, 0.5, 0.5, 0.05], rtol=1e-6)
    assert np.all(np.diff(cosine[4:]) < 0)
    constant = jax.vmap(make_schedule(dataclasses.replace(config, decay="constant"), 20))(jnp.arange(20))
    np.testing.assert_allclose(constant[3:], 0.5, rtol=1e-6)


def test_impossible_fields_are_named(toy):
    with pytest.raises(ValueError, match=r"^optimizer\.warmup_steps: 11 .* 10 steps"):
        make_schedule(toy.optimizer(warmup_steps=11), 10)
    config = toy.optimizer(warmup_steps=0)
    object.__setattr__(config, "decay", "linear")
    with pytest.raises(ValueError, match=r"^optimizer\.decay: 'linear'"):
        make_schedule(config, 10)
    with pytest.raises(ValueError, match=r"^name: 'adam' is not one of adamw, muon"):
        toy.optimizer(name="adam")
    with pytest.raises(ValueError, match=r"^momentum: lies in \[0, 1\), not at 1"):
        toy.optimizer(momentum=1.0)
    object.__setattr__(config, "decay", "cosine")
    object.__setattr__(config, "name", "sgd")
    with pytest.raises(ValueError, match=r"^optimizer\.name: 'sgd'"):
        make_optimizer(config, 10)


def test_only_matrices_decay():
    def shapes(**kinds):
        return {name: np.zeros(shape) for name, shape in kinds.items()}

    tree = {
        "dit": {
            "blocks": {  # stacked: one axis more
                "qkv": shapes(kernel=(6, 8, 24), bias=(6, 24)),
                "query_norm": shapes(scale=(6, 2, 4)),
                "modulation": shapes(table=(6, 6, 8)),
                "gain": np.zeros((6, 8)),
            },
            "velocity": shapes(kernel=(8, 4), bias=(4,)),
            "heads": shapes(kernel=(8, 2, 4), bias=(2, 4)),
        },
        "text": {"0": {"embedding": shapes(embedding=(384, 8)), "relative_bias": np.zeros((32, 2))}},
        "tae": {
            **shapes(latent_mean=(8,), latent_std=(8,)),
            "block_0": {"conv": shapes(kernel=(3, 3, 8, 8), bias=(8,))},
        },
    }
    mask = jax.tree_util.tree_flatten_with_path(decay_mask(tree))[0]
    decayed = {jax.tree_util.keystr(path, simple=True, separator="/") for path, decays in mask if decays}
    assert decayed == {
        "dit/blocks/qkv/kernel",
        "dit/velocity/kernel",
        "dit/heads/kernel",
        "text/0/embedding/embedding",
        "tae/block_0/conv/kernel",
    }


@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_updates_are_adamw(toy, clip):
    config = toy.optimizer(learning_rate=0.1, warmup_steps=2, weight_decay=0.3, clip_norm=clip, b1=0.8, b2=0.95)
    steps, rng = 6, np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    tx, schedule = make_optimizer(config, steps), make_schedule(config, steps)
    ours = jax.tree.map(jnp.float32, params)
    opt_state = tx.init(ours)
    first, second = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
    for n in range(steps):
        gradient = {name: rng.normal(size=p.shape) for name, p in params.items()}
        updates, opt_state = tx.update(jax.tree.map(jnp.float32, gradient), opt_state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)

        norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        for name, g in gradient.items():
            g = g * min(1, clip / norm)
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            adam = first[name] / (1 - 0.8 ** (n + 1)) / (np.sqrt(second[name] / (1 - 0.95 ** (n + 1))) + config.eps)
            decay = 0.3 * params[name] if name == "kernel" else 0
            params[name] = params[name] - float(schedule(n)) * (adam + decay)
    for name, p in params.items():
        np.testing.assert_allclose(ours[name], p, rtol=2e-5, atol=1e-6)


def test_muon_takes_the_hidden_matrices():
    """Not the first and last layers of a model, nor its tables and biases."""
    blocks = {
        "qkv": {"kernel": np.zeros((6, 8, 24)), "bias": np.zeros((6, 24))},
        "position": {"row": np.zeros((6, 4, 8))},
    }
    tree = {
        "dit": {"blocks": blocks, "velocity": {"kernel": np.zeros((8, 4))}},
        "text": {"embedding": np.zeros((9, 8))},
    }
    is_leaf = lambda x: x is None or hasattr(x, "output_axis")  # noqa: E731
    leaves = jax.tree_util.tree_flatten_with_path(hidden_matrices(tree), is_leaf=is_leaf)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): dims for path, dims in leaves}
    assert {name for name, dims in named.items() if dims} == {"dit/blocks/qkv/kernel"}
    assert tuple(named["dit/blocks/qkv/kernel"]) == (1, 2)


def test_updates_are_muon(toy):
    """Each layer's matrix by itself: Nesterov momentum, five Newton–Schulz iterations, AdamW's size; decay with the
    rate. A layer whose gradient is a thousand times smaller moves as far.
    """
    config = toy.optimizer(
        name="muon", learning_rate=0.1, warmup_steps=2, weight_decay=0.3, clip_norm=1e9, momentum=0.9
    )
    steps, rng = 5, np.random.default_rng(0)
    kernels, bias = rng.normal(size=(2, 6, 4)), rng.normal(size=4)
    tx, schedule = make_optimizer(config, steps), make_schedule(config, steps)
    ours = {"blocks": {"up": {"kernel": jnp.float32(kernels)}}, "bias": jnp.float32(bias)}
    opt_state = tx.init(ours)
    momentum = np.zeros_like(kernels)
    for n in range(steps):
        gradient = rng.normal(size=kernels.shape) * np.array([1.0, 1e-3])[:, None, None]
        tree = {"blocks": {"up": {"kernel": jnp.float32(gradient)}}, "bias": jnp.float32(rng.normal(size=4))}
        updates, opt_state = tx.update(tree, opt_state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)

        momentum = 0.9 * momentum + 0.1 * gradient
        nesterov = 0.9 * momentum / (1 - 0.9 ** (n + 2)) + 0.1 * gradient / (1 - 0.9 ** (n + 1))
        for layer, direction in enumerate(nesterov):
            x = direction / np.linalg.norm(direction)
            for _ in range(5):
                square = x @ x.T
                x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
            step = 0.2 * np.sqrt(6) * x + 0.3 * kernels[layer]
            kernels[layer] = kernels[layer] - float(schedule(n)) * step
    np.testing.assert_allclose(ours["blocks"]["up"]["kernel"], kernels, rtol=2e-4, atol=2e-5)
    assert not np.array_equal(ours["bias"], bias) and np.all(np.isfinite(ours["bias"]))


def test_statistics_without_gradient_never_move(toy):
    params = {"tae": {"latent_std": jnp.asarray([0.3, 1.7]), "kernel": jnp.ones((2, 2))}}
    tx = make_optimizer(toy.optimizer(weight_decay=0.5), 10)
    opt_state = tx.init(params)
    gradient = {"tae": {"latent_std": jnp.zeros(2), "kernel": jnp.ones((2, 2))}}
    moved = params
    for _ in range(5):
        updates, opt_state = tx.update(gradient, opt_state, moved)
        moved = jax.tree.map(jnp.add, moved, updates)
    assert np.array_equal(moved["tae"]["latent_std"], params["tae"]["latent_std"])
    assert not np.array_equal(moved["tae"]["kernel"], params["tae"]["kernel"])
