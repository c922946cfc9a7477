"""Every mistake in a configuration is one ConfigError that names the field; every file under configs/ builds."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from streamdit_jax import cli_arguments, partition, stages
from streamdit_jax import config as configuration
from streamdit_jax.config import from_arguments, from_mapping
from streamdit_jax.errors import ConfigError
from streamdit_jax.models.dit import parameter_count
from streamdit_jax.parameters import initialise

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))
ROADTRIP = f"--config={ROOT / 'configs' / 'roadtrip.py'}"
IMAGE = f"--config={ROOT / 'configs' / 'roadtrip_image.py'}"
BASE = f"--config={ROOT / 'configs' / 'streamdit_4b.py'}"
TASK = f"--config={ROOT / 'configs' / 'streamdit_4b_task.py'}"
DISTILL = f"--config={ROOT / 'configs' / 'roadtrip_distill.py'}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_builds_without_a_device(file):
    config = from_arguments([f"--config={file}"])
    shapes = jax.eval_shape(lambda key: initialise(config, key), jax.random.key(0))
    assert parameter_count(shapes["dit"]) > 0
    assert from_mapping(json.loads(config.to_json())) == config
    docstring = file.read_text().split('"""')[1]
    assert f"configs/{file.name}" in docstring, "a config's docstring is the command that runs it"


def test_a_config_finds_the_one_that_it_builds_on(tmp_path):
    """As the installed command does, which has no checkout on its path; and nothing of it stays there."""
    program = (
        "import sys; from streamdit_jax.config import from_arguments; before = list(sys.path)\n"
        f"print(from_arguments(['--config={ROOT / 'configs' / 'streamdit_4b_quality.py'}']).name, sys.path == before)"
    )
    package = tmp_path / "streamdit_jax"
    package.symlink_to(ROOT / "streamdit_jax")
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["streamdit_4b", "True"], done.stderr


def test_the_4b_model_has_its_parameters():
    config = from_arguments([f"--config={ROOT / 'configs' / 'streamdit_4b.py'}"])
    count = parameter_count(jax.eval_shape(lambda key: initialise(config, key), jax.random.key(0))["dit"])
    assert abs(count / 4.117e9 - 1) < 0.005


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["--config.dit.wdth=1"], "wdth"),
        (["--config.dit.width=wide"], "dit.width"),
        (["--config.dit.num_heads=3"], "dit.num_heads: 3 heads do not divide a width of 128"),
        (["--config.dit.windows=((8,3,4),)"], "dit.windows: 3 does not divide the 8 tokens along height"),
        ([BASE, "--config.dit.num_layers=5"], "dit.num_layers: 5 layers do not hold whole patterns of 2"),
        (["--config.dit.patch=(2,2,2)"], "dit.patch"),
        (["--config.dit.latent=(16,8,8,16)"], "dit.latent: 16 channels, but tae.latent_channels is 32"),
        (["--config.dit.qk_norm=batch"], "dit.qk_norm: 'batch' is not one of none, head, width"),
        (["--config.dit.norm=rms"], "has no field norm, so no override can set it"),
        (["--config.data.height=72"], "data.height: 72 pixels make 9 latents"),
        (["--config.sampling.scheme=N8c1s16"], "sampling.scheme: N8c1s16 does not tile the buffer"),
        (["--config.sampling.scheme=8x2"], "sampling.scheme"),
        (["--config.sampling.filling=magic"], "sampling.filling"),
        (["--config.sampling.refill=2:1.5"], "sampling.refill: from 0 to 10000 chunks and a strength"),
        (
            ["--config.training.flow_matching.objective.mixture.entries=(('N8c2s1',1.0),('N7c1s1',1.0))"],
            "flow_matching.objective.mixture.entries: N7c1s1 does not tile a buffer of 1, 2, 4, 8 or 16 frames",
        ),
        (["--config.training.flow_matching.num_frames=8"], "training.flow_matching.num_frames"),
        (["--config.training.flow_matching.num_frames=0"], "training.flow_matching.num_frames: must be at least 1"),
        (["--config.tae.widths=(64,)"], "tae.widths"),
        (["extra"], "extra: unknown argument"),
        ([IMAGE, "--config.training.autoencoder.importance_power=2.0"], "training.autoencoder.importance_power"),
        ([IMAGE, "--config.training.autoencoder.optimizer.learning_rate=0.0"], "autoencoder.optimizer.learning_rate"),
        ([IMAGE, "--config.training.text_alignment.steps=9"], "training.text_alignment.optimizer.warmup_steps: 50 is"),
        ([DISTILL, "--config.training.distillation.scheme=N8c1s1"], "training.distillation.scheme: N8c1s1 does not"),
        ([DISTILL, "--config.training.distillation.method=magic"], "training.distillation.method: 'magic' is not"),
        ([DISTILL, "--config.training.distillation.teacher="], "training.distillation.teacher: names no model"),
        ([DISTILL, "--config.training.distillation.teacher_steps=0"], "training.distillation.teacher_steps"),
        ([DISTILL, "--config.training.distillation.rollout_share=1.5"], "training.distillation.rollout_share"),
        ([DISTILL, "--config.training.distillation.batch_size=1"], "training.distillation.switch_share: 0.5 of the"),
        (
            ["--config.training.flow_matching.accumulate=8"],
            "training.flow_matching.objective.switch_share: 0.25 of the",
        ),
        (["--config.training.flow_matching.start_from="], "training.flow_matching.train_text: False leaves"),
        ([IMAGE, "--config.training.text_alignment.keep=0.5"], "training.text_alignment.keep: there is nothing"),
        ([BASE, "--config.training.flow_matching.text_from="], "training.flow_matching.train_text: False leaves"),
        (
            [BASE, "--config.training.flow_matching.buckets.images.latent=(1,48,64)"],
            "training.flow_matching.buckets.images.latent: windows: 16 does not divide the 24 tokens along height",
        ),
        (
            [BASE, "--config.training.flow_matching.buckets.images.latent=(1,64,128)"],
            "training.flow_matching.buckets.images.latent: (1, 64, 128) does not fit into the model's (16, 64, 64)",
        ),
        (
            [BASE, "--config.training.flow_matching.buckets.wide.source="],
            "training.flow_matching.buckets.wide.source: missing",
        ),
        (
            [BASE, "--config.training.flow_matching.buckets.wide.latent=(8,32,64)"],
            "training.flow_matching.objective.mixture.entries: no scheme tiles a buffer of 8 frames",
        ),
        ([BASE, "--config.training.flow_matching.buckets.wide.share=0.7"], "training.flow_matching.buckets: their"),
        ([BASE, "--config.training.flow_matching.buckets.wide.share=2.0"], "flow_matching.buckets.wide.share: lies"),
        ([BASE, "--config.training.flow_matching.accumulate=3"], "flow_matching.accumulate: 3 does not divide"),
        (
            [BASE, "--config.training.flow_matching.objective.mixture.uniform_levels=normal"],
            "mixture.uniform_levels: 'normal' is not one of uniform, logit_normal",
        ),
    ],
)
def test_mistakes_name_their_field(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        from_arguments(overrides if overrides[0] in (IMAGE, DISTILL, BASE) else [ROADTRIP, *overrides])
    assert "\n" not in str(raised.value)


def test_fine_tuning_on_another_mixture_is_a_flag_each():
    """Any number of schemes may replace those of the file; a bucket's fields are set by its name."""
    mixture = "--config.training.flow_matching.objective.mixture.entries=(('N8c2s1', 4), ('N1c16s1', 1.0))"
    config = from_arguments([TASK, "--config.training.flow_matching.start_from=roadtrip", mixture])
    stage = config.training.flow_matching
    assert stage.start_from == "roadtrip" and stage.objective.mixture.entries == (("N8c2s1", 4.0), ("N1c16s1", 1.0))
    stage = from_arguments([BASE, "--config.training.flow_matching.buckets.images.share=0.5"]).training.flow_matching
    assert list(stage.shares()) == ["main", "images", "tall", "wide"]
    assert stage.shares()["images"] == 0.5 and sum(stage.shares().values()) == pytest.approx(1)


def test_the_stages_of_the_paper_follow_from_each_other():
    """§5.1: each starts from the one before; they differ by data and learning rate."""
    names = ("task", "general", "quality")
    stages = [
        from_arguments([f"--config={ROOT}/configs/streamdit_4b_{name}.py"]).training.flow_matching for name in names
    ]
    assert [stage.start_from for stage in stages] == [
        "runs/streamdit_4b",
        "runs/streamdit_4b_task",
        "runs/streamdit_4b_general",
    ]
    assert [stage.optimizer.learning_rate for stage in stages] == [1e-4, 1e-5, 1e-5]
    assert {stage.steps for stage in stages} == {10_000} and len({stage.objective for stage in stages}) == 1
    student = from_arguments([f"--config={ROOT}/configs/streamdit_4b_distill.py"]).training.distillation
    assert student.teacher == "runs/streamdit_4b_quality"


def test_missing_and_broken_files(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    return 1 / 0\n")
    for arguments, message in (
        ([], "--config: give a file"),
        (["--config=nowhere.py"], "there is no file nowhere.py"),
        ([f"--config={broken}"], "division by zero"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_arguments(arguments)


def test_a_key_of_another_objective_is_unread():
    mapping = json.loads(from_arguments([IMAGE]).to_json())
    mapping["training"]["autoencoder"]["objective"]["caption_dropout"] = 0.1
    with pytest.raises(ConfigError, match=r"training\.autoencoder\.objective\.caption_dropout: nothing reads this key"):
        from_mapping(mapping)


def test_missing_fields_are_named():
    mapping = json.loads(from_arguments([ROADTRIP]).to_json())
    del mapping["dit"]["width"]
    with pytest.raises(ConfigError, match=r"dit\.width: missing"):
        from_mapping(mapping)


def test_every_field_is_read_somewhere():
    """A field that no module reads as an attribute would be a key that changes nothing."""
    source = "\n".join(path.read_text() for path in (ROOT / "streamdit_jax").rglob("*.py"))
    read = set(re.findall(r"\.([a-z_][a-z0-9_]*)", source))
    # Read as a whole: the mesh's axes by `sharding.make_mesh`, the weights of the losses by the names of these.
    whole = (configuration.MeshConfig, stages.AutoencoderObjective)
    named = [*vars(configuration).values(), *vars(stages).values()]
    classes = [cls for cls in named if dataclasses.is_dataclass(cls) and cls not in whole]
    unread = [f"{cls.__name__}.{f.name}" for cls in classes for f in dataclasses.fields(cls) if f.name not in read]
    assert not unread


def test_the_command_line_offers_every_filling():
    assert cli_arguments.FILLINGS == partition.FILLINGS
