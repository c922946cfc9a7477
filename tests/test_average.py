"""`streamdit average`: the mean of weights, exactly, of models that belong together."""

import json

import jax
import numpy as np
import pytest

from streamdit_jax import cli, weights
from streamdit_jax.errors import CheckpointError


@pytest.fixture
def models(tiny, tiny_params, tmp_path):
    """Three models with one autoencoder, and the DiTs of each."""
    dits = [jax.tree.map(lambda x, n=n: x * np.float32(1 + n), tiny_params["dit"]) for n in range(3)]
    for number, dit in enumerate(dits):
        config = json.loads(tiny.to_json())
        dtype = "bfloat16" if number == 2 else "float32"
        weights.save_model(tmp_path / str(number), config, {**tiny_params, "dit": dit}, {}, dtype=dtype)
    return [tmp_path / str(number) for number in range(3)], dits


def test_the_mean_of_models_and_what_it_is_made_of(models, tiny_params, tmp_path, capsys):
    (one, two, _), dits = models
    assert cli.main(["average", str(tmp_path / "mean"), str(one), str(two)]) == 0
    assert "the mean of 2 models, dit, tae, text" in capsys.readouterr().out
    card = weights.load_card(tmp_path / "mean")
    made = weights.load_part(tmp_path / "mean", card, "dit")
    jax.tree.map(lambda x, a, b: np.testing.assert_array_equal(x, (a + b) / np.float32(2)), made, dits[0], dits[1])
    kept = weights.load_part(tmp_path / "mean", card, "tae")
    jax.tree.map(np.testing.assert_array_equal, kept, tiny_params["tae"])
    of = card["card"]["average_of"]
    assert [entry["model"] for entry in of] == [str(one), str(two)]
    assert of[1]["parts"]["dit"] == weights.load_card(two)["parts"]["dit"]["sha256"]
    assert card["card"]["command"].startswith("streamdit average") and weights.find_model(tmp_path / "mean")


def test_bfloat16_is_summed_in_float32(models):
    (one, _, half), dits = models
    _, parts = weights.average([one, half])
    leaves = zip(*map(jax.tree.leaves, (parts["dit"], dits[0], dits[2])))
    for made, a, b in leaves:
        assert made.dtype == np.float32
        rounded = np.asarray(b, jax.numpy.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(made, (a + rounded) / np.float32(2))


def test_models_that_do_not_belong_together_are_named(models, tiny, tiny_params, tmp_path):
    (one, *_), _ = models
    config = json.loads(tiny.to_json())
    weights.save_model(tmp_path / "part", config, {"dit": tiny_params["dit"]}, {})
    with pytest.raises(CheckpointError, match=r"part: has the parts dit, but .*/0 has dit, tae, text"):
        weights.average([one, tmp_path / "part"])
    other = {**tiny_params, "dit": {**tiny_params["dit"], "extra": np.zeros(3, np.float32)}}
    weights.save_model(tmp_path / "other", config, other, {})
    with pytest.raises(CheckpointError, match="other: dit: parameter extra is not part of this configuration"):
        weights.average([one, tmp_path / "other"])
