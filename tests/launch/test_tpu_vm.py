"""launch/tpu-vm.sh: the commands it would give, and the order in which it gives them."""

import shlex
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "tpu-vm.sh"
GIVEN = {
    "TPU_NAME": "run",
    "ZONE": "us-east5-b",
    "TPU_TYPE": "v6e-256",
    "RUNTIME": "v2-alpha-tpuv6e",
    "IMAGE": "us-docker.pkg.dev/p/r/streamdit-tpu:0.1.0",
    "NFS": "10.0.0.2:/work",
}


@pytest.fixture
def script(start):
    def run(*arguments, **environment):
        process = start("bash", SCRIPT, *arguments, **{**GIVEN, **environment})
        said, error = process.communicate(timeout=60)
        return process.returncode, said, error

    return run


def commands(said):
    return [shlex.split(line) for line in said.splitlines() if line.startswith("gcloud ")]


def test_create_asks_for_one_slice_or_several(script):
    code, said, _ = script("--dry-run", "create", PROJECT="p")
    assert code == 0
    assert commands(said) == [
        [
            *("gcloud", "compute", "tpus", "queued-resources", "create", "run"),
            *("--accelerator-type=v6e-256", "--runtime-version=v2-alpha-tpuv6e", "--node-id=run"),
            *("--zone=us-east5-b", "--project=p"),
        ]
    ]
    [several] = commands(script("--dry-run", "create", SLICES="2", SPOT="1")[1])
    assert several[-4:] == ["--node-count=2", "--node-prefix=run", "--spot", "--zone=us-east5-b"]


def test_run_starts_training_on_every_machine_of_every_slice(script):
    arguments = ("--config=configs/streamdit_4b.py", "--workdir=/work/my run")
    code, said, _ = script("--dry-run", "run", *arguments, SLICES="2")
    assert code == 0
    first, second = commands(said)
    assert [command[5] for command in (first, second)] == ["run-0", "run-1"] and "--worker=all" in first
    [remote] = [word.removeprefix("--command=") for word in first if word.startswith("--command=")]
    docker = shlex.split(remote.split(";", 1)[1])
    assert docker[-2:] == list(arguments) and docker[-3] == GIVEN["IMAGE"]
    assert "--env=STREAMDIT_CLUSTER=tpu-vm" in docker and "--volume=/mnt/work:/work" in docker


def test_every_other_command(script):
    for what, words in {
        "wait": ["describe", "run", "--format=value(state.state)"],
        "install": ["ssh", "run", "--worker=all"],
        "logs": ["ssh", "run", "--worker=0"],
        "stop": ["ssh", "run", "--command=sudo docker stop --time=600 streamdit"],
        "delete": ["delete", "run", "--force"],
    }.items():
        code, said, error = script("--dry-run", what)
        assert code == 0, error
        [command] = [shlex.split(line) for line in said.splitlines()]
        assert all(word in command for word in words), (what, command)
    [install] = commands(script("--dry-run", "install")[1])
    assert "docker pull" in install[7] and "10.0.0.2:/work /mnt/work" in install[7]


def test_wait_ends_with_what_becomes_of_the_request(script, tmp_path):
    """With a gcloud that answers from a list."""
    shim = tmp_path / "gcloud"
    shim.write_text(f"#!/usr/bin/env bash\ncd {tmp_path}\nhead -n 1 states\nsed -i 1d states\n")
    shim.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    for states, code in (("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n", 0), ("PROVISIONING\nFAILED\nACTIVE\n", 1)):
        (tmp_path / "states").write_text(states)
        done, said, error = script("wait", PATH=path, POLL_SECONDS="0")
        assert done == code, error
        assert said == states[: len(said)] and said.splitlines()[-1] in ("ACTIVE", "FAILED")


def test_what_is_missing_is_named(script):
    code, said, error = script("--dry-run", "create", TPU_TYPE="")
    assert (code, said) == (2, "") and error.startswith("tpu-vm.sh: TPU_TYPE: missing")
    code, _, error = script("--dry-run", "start")
    assert code == 2 and "start is none of create, wait," in error
