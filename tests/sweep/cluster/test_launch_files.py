"""Launch files are valid for the programs that read them, use a token and use shared storage."""

from __future__ import annotations

import copy
import os
import re
import shlex
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from sweep.config.compose import compose, parsed
from sweep.config.sweep import parse_sweep_config
from tests.support.paths import ROOT

LAUNCH = ROOT / "conf" / "cluster" / "launch"


def load(name: str) -> dict:
    return yaml.safe_load((LAUNCH / name).read_text())


def sweep_of(name: str) -> list[str]:
    """Return the arguments of the `python -m sweep` that a file runs or shows in its comments."""
    text = re.sub(r"\n#? +", " ", (LAUNCH / name).read_text())
    shown = re.search("python -m sweep cluster=ray[^'\n]*", text)[0]
    command = load(name)["spec"]["entrypoint"] if name == "kuberay.yaml" else shown
    return shlex.split(command.split("python -m sweep ")[1])


@pytest.mark.parametrize("name", ["aws.yaml", "onprem.yaml"])
def test_ray_up_takes_the_file_and_every_node_asks_for_the_token(name):
    config = load(name)
    validate_config(prepare_config(copy.deepcopy(config)))
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        starts = [command for command in commands if "ray start" in command]
        assert len(starts) == 1 and "RAY_AUTH_MODE=token " in starts[0]
        assert subprocess.run(["bash", "-n", "-c", starts[0]], capture_output=True).returncode == 0
    assert any(target.endswith("/.ray/auth_token") for target in config["file_mounts"])
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    with pytest.raises(ValidationError):  # the twin
        validate_config(prepare_config({**copy.deepcopy(config), "head_node": {}, "typo_commands": []}))


def test_kuberay_takes_the_job_and_makes_the_token():
    job = load("kuberay.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    known = {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec"}
    assert set(spec) == known  # of ray.io/v1
    cluster = spec["rayClusterSpec"]
    assert set(cluster) == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert cluster["authOptions"] == {"mode": "token"}
    pinned = re.search(r"^ray==(.+)$", (LAUNCH.parents[2] / "constraints.txt").read_text(), re.MULTILINE).group(1)
    assert cluster["rayVersion"] == pinned  # the operator refuses authOptions below 2.52
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert "/shared" in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert all(re.fullmatch("[a-z0-9-]{1,15}", port["name"]) for port in container["ports"])
    num_gpus = 1 + sum(group["replicas"] for group in cluster["workerGroupSpecs"])
    assert all(group["replicas"] == group["minReplicas"] == group["maxReplicas"] for group in cluster["workerGroupSpecs"])
    assert f"cluster.num_gpus={num_gpus} " in spec["entrypoint"]


@pytest.mark.parametrize("name", ["aws.yaml", "onprem.yaml", "kuberay.yaml"])
def test_the_sweep_that_a_file_starts_is_one(name):
    config = parse_sweep_config(compose(sweep_of(name)))
    assert (config.cluster.address, config.sweep.output_dir, config.data.train) == ("auto", "/shared/sweeps", "/shared/my.jsonl")
    assert isinstance(config.cluster.num_gpus, int)


def stub(folder: Path, name: str, script: str) -> None:
    program = folder / name
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f"#!/usr/bin/env bash\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def job(tmp_path):
    """Start slurm.sh as Slurm does on the first of two nodes; return the process.

    Stand-ins for Slurm, Ray and the sweep write their arguments to calls.txt.
    """
    calls = tmp_path / "calls.txt"
    stub(tmp_path / "bin", "scontrol", 'printf "n1\\nn2\\n"')
    stub(tmp_path / "bin", "srun", 'while [[ $1 == -* ]]; do shift; done; exec "$@"')
    stub(tmp_path / "bin", "hostname", "echo 10.0.0.1 fe80::1")
    token = 'm=$(stat -c %a "$RAY_AUTH_TOKEN_PATH") t=$(wc -c < "$RAY_AUTH_TOKEN_PATH")'
    stub(tmp_path / ".venv/bin", "ray", f'{token}; echo "ray $RAY_AUTH_MODE $m $t $*" >> {calls}; exec sleep 60')

    def start(*arguments: str, sweep: str) -> subprocess.Popen:
        stub(
            tmp_path / ".venv/bin", "python",
            f'if [[ $1 == -c ]]; then exec python3 "$@"; fi; {token}; echo "sweep $m $t $*" >> {calls}; {sweep}',
        )  # fmt: skip
        env = {
            **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "8",
            "RAY_HEAD_START_S": "0.3",
        }  # fmt: skip
        return subprocess.Popen(["bash", str(LAUNCH / "slurm.sh"), *arguments], env=env, stderr=subprocess.PIPE, text=True)

    return start


def test_the_slurm_job_starts_ray_on_every_node_then_the_sweep_and_ends_with_its_code(job, tmp_path):
    both_wait = f"until [[ $(wc -l < {tmp_path}/calls.txt) == 3 ]]; do sleep 0.1; done; exit 3"
    process = job("model=llama-3.1-8b", "data.train=/shared/my data.jsonl", sweep=both_wait)
    assert process.wait(60) == 3, process.stderr.read()
    *rays, sweep = sorted((tmp_path / "calls.txt").read_text().splitlines(), key=lambda line: line.startswith("sweep"))
    assert len(rays) == 2 and all(line.startswith("ray token 600 64 start --block ") for line in rays)
    head, worker = sorted(rays, key=lambda line: "--head" not in line)
    assert "--node-ip-address=10.0.0.1 --port=20007" in head and "--address=10.0.0.1:20007" in worker
    assert all("--num-gpus=2" in line for line in rays)
    place = "cluster=ray cluster.address=10.0.0.1:20007 cluster.num_gpus=4 cluster.wait_s=300"
    assert sweep == f"sweep 600 64 -m sweep {place} model=llama-3.1-8b data.train=/shared/my data.jsonl"
    assert not list(tmp_path.glob(".ray-token*"))


def test_a_slurm_job_that_is_ended_lets_the_driver_stop_at_a_safe_point(job, tmp_path):
    busy = "trap 'sleep 0.5; touch stopped; exit 130' TERM; touch begun; while :; do sleep 0.1; done"
    process = job("resume=/shared/sweeps/s-1", sweep=busy)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130, process.stderr.read()
    assert (tmp_path / "stopped").exists()
    (sweep,) = (line for line in (tmp_path / "calls.txt").read_text().splitlines() if line.startswith("sweep"))
    assert "cluster=ray" not in sweep  # a resume takes no groups, but may run elsewhere
    options = dict(map(parsed, shlex.split(sweep.split("-m sweep ")[1])))
    assert options["cluster.address"] == "10.0.0.1:20007" and options["cluster.num_gpus"] == 4
