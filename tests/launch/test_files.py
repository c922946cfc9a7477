"""The files of launch/, each read by its own linter, and what they must say of each other."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from streamdit_jax.clusters import detect
from streamdit_jax.training.messenger import RESTART

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch"), ROOT / ".ci" / "run"])
JOBSETS = sorted((LAUNCH / "gke").glob("*.yaml"))
SCHEMA = json.loads(Path(__file__).with_name("jobset.schema.json").read_text())


def lint(tool, *arguments):
    done = subprocess.run(
        [Path(sys.executable).with_name(tool), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_scripts_pass_shellcheck(tmp_path):
    assert {path.name for path in SCRIPTS} >= {"entrypoint.sh", "forward.sh", "tpu-vm.sh", "train.sbatch", "run"}
    assert lint("shellcheck", "--shell=bash", "--external-sources", *SCRIPTS) == (0, "")
    (tmp_path / "bad.sh").write_text('#!/bin/bash\nrm -rf $1/*\nif [ $x = 1 ]; then echo "$y"; fi\n')
    assert lint("shellcheck", tmp_path / "bad.sh")[0] == 1


def test_dockerfiles_pass_hadolint_and_pin_what_they_take(tmp_path):
    files = sorted((LAUNCH / "docker").glob("Dockerfile.*"))
    assert [path.suffix for path in files] == [".gpu", ".tpu"]
    assert lint("hadolint", *files) == (0, "")
    for path in files:
        text = path.read_text()
        for image in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
            assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", image), image
        assert "USER 1000" in text.splitlines()
        for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
            assert all((ROOT / name).exists() for name in source.split()), source
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN pip install jax\nUSER root\n")
    assert lint("hadolint", tmp_path / "Dockerfile")[0] == 1


def test_images_pin_every_package_that_setup_names():
    setup = (ROOT / "setup.py").read_text()
    base = (
        re.search(r"install_requires=\[(.*?)\]", setup, re.DOTALL)[1]
        + re.search(r"TRAIN = \[(.*?)\]", setup, re.DOTALL)[1]
    )
    wanted = {name.replace("_", "-").lower() for name in re.findall(r'"([\w-]+)>=', base)}
    pinned = dict(
        re.findall(r"^([\w-]+)==([\d.]+)$", (LAUNCH / "docker" / "constraints.txt").read_text(), re.MULTILINE)
    )
    assert len(wanted) > 10 and wanted <= pinned.keys()
    cuda = (LAUNCH / "docker" / "constraints-cuda.txt").read_text()
    assert f"jax-cuda13-plugin=={pinned['jax']}\n" in cuda, "the plugin is made for one version of JAX"


def test_scripts_and_guide_agree_on_the_codes_that_a_restart_mends():
    for name in ("entrypoint.sh", "slurm/train.sbatch"):
        assert re.search(r"^ *75 \| 134 \| 137 \| 143\)", (LAUNCH / name).read_text(), re.MULTILINE), name
    rows = re.findall(r"^\| ([\d, ]+) \|.*\| (.+) \|$", (ROOT / "docs" / "launching.md").read_text(), re.MULTILINE)
    again = {int(code) for codes, what in rows if what == "start again" for code in codes.split(",")}
    assert again == {RESTART, 134, 137, 128 + signal.SIGTERM} == {75, 134, 137, 143}


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def jobs(jobset):
    """The Jobs that the controller makes of a JobSet's templates."""
    return [
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
        for job in jobset["spec"]["replicatedJobs"]
    ]


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.stem)
def test_jobsets_are_valid(path):
    assert lint("yamllint", "--strict", "--config-file", LAUNCH / "yamllint.yaml", path) == (0, "")
    version = kubernetes_validate.latest_version()
    kinds = []
    for document in documents(path):
        kinds.append(document["kind"])
        if document["kind"] == "JobSet":
            jsonschema.validate(document, SCHEMA)
            for job in jobs(document):
                kubernetes_validate.validate(job, version, strict=True)
        else:
            kubernetes_validate.validate(document, version, strict=True)
    assert kinds == ["PersistentVolumeClaim", "JobSet"]


def test_the_validators_find_mistakes():
    jobset = documents(JOBSETS[0])[-1]
    [job] = jobs(jobset)
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 5
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    jobset["spec"]["failurePolicy"]["rules"][0]["action"] = "Restart"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(jobset, SCHEMA)


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.stem)
def test_jobsets_restart_what_a_restart_mends_and_run_without_privileges(path):
    claim, jobset = documents(path)
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert policy["rules"] == [{"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    [job] = jobs(jobset)
    [rule] = job["spec"]["podFailurePolicy"]["rules"]
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert job["spec"]["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert job["spec"]["parallelism"] == job["spec"]["completions"]
    assert pod["terminationGracePeriodSeconds"] >= 300
    assert pod["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]
    assert not pod["automountServiceAccountToken"]
    assert {"name": "STREAMDIT_RESTARTS", "value": "0"} in container["env"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [claim["metadata"]["name"]] and claim["spec"]["accessModes"] == ["ReadWriteMany"]
    config, workdir = (argument.split("=", 1)[1] for argument in container["args"])
    assert (ROOT / config).is_file()
    assert workdir.startswith(next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == "work") + "/")


def test_the_gpu_jobset_tells_each_pod_what_detection_asks_for():
    jobset = documents(LAUNCH / "gke" / "jobset-gpu.yaml")[-1]
    [job] = jobs(jobset)
    environment = {"JOB_COMPLETION_INDEX": "3"}  # set by Kubernetes in every pod of an indexed Job
    for variable in job["spec"]["template"]["spec"]["containers"][0]["env"]:
        if "valueFrom" in variable:
            field = variable["valueFrom"]["fieldRef"]["fieldPath"]
            assert field == "metadata.annotations['jobset.sigs.k8s.io/coordinator']"
            leader = jobset["spec"]["coordinator"]
            assert leader["replicatedJob"] == jobset["spec"]["replicatedJobs"][0]["name"]
            variable["value"] = "streamdit-train-0-0.streamdit"
        environment[variable["name"]] = variable["value"]
    cluster = detect(environment)
    assert (cluster.found, cluster.processes, cluster.process) == ("Kubernetes", job["spec"]["completions"], 3)
    assert cluster.coordinator == "streamdit-train-0-0.streamdit:8482"
