"""The files of cluster/: valid for the tools that read them, safe by default, with sound shell.

Nothing here needs a cloud, Kubernetes, Docker or Slurm; cluster/README.md lists what that leaves
untested.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kuberay_schema import resource
from ray.autoscaler._private.util import prepare_config, validate_config
from world import World

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHER = ("aws", "gcp", "onprem")
KUBERAY = {"rayjob": "RayJob", "raycluster": "RayCluster"}
SBATCH = CLUSTER / "slurm" / "raymerge.sbatch"


def _load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def _shellcheck(script: str) -> None:
    """Fail with shellcheck's messages if it finds anything."""
    program = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [program, "-s", "bash", "-"], input=script, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


# --- Ray's cluster launcher ----------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_accepts_the_launcher_files(name: str) -> None:
    validate_config(prepare_config(_load(name)))
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**_load(name), "worker_nodez": {}}))


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_cluster_has_a_token_and_its_dashboard_is_on_loopback(name: str) -> None:
    config = _load(name)
    starts = [config[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker")]
    assert all("RAY_AUTH_MODE=token ray start" in start for start in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("~/raymerge" in command for command in config["setup_commands"])
    assert any("/shared" in command for command in config["setup_commands"])


@pytest.mark.parametrize(
    ("name", "spot"),
    [
        ("aws", {"InstanceMarketOptions": {"MarketType": "spot"}}),
        ("gcp", {"scheduling": {"provisioningModel": "SPOT"}}),
    ],
)
def test_workers_are_spot_and_the_head_is_not(name: str, spot: dict[str, dict[str, str]]) -> None:
    types = _load(name)["available_node_types"]
    ((key, value),) = spot.items()
    assert types["worker"]["node_config"][key].items() >= value.items()
    assert key not in types["head"]["node_config"]
    assert types["worker"]["min_workers"] == types["worker"]["max_workers"] > 0


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_launchers_commands_are_sound_shell(name: str) -> None:
    config = _load(name)
    commands = [c for key in config if key.endswith("_commands") for c in config[key]]
    assert len(commands) > 5
    # Ray sets the head's address, and the venv that is sourced does not exist here.
    script = "\n".join(["RAY_HEAD_IP=10.0.0.1", "# shellcheck disable=SC1090,SC1091", "{"])
    _shellcheck("\n".join([script, *commands, "}", ""]))


def test_one_version_of_ray_is_named_everywhere() -> None:
    texts = [path.read_text() for path in [*CLUSTER.rglob("*.yaml"), CLUSTER / "Dockerfile"]]
    found = {
        v
        for text in texts
        for v in re.findall(r"(?:ray\[default\]==|rayVersion: \")([\d.]+)", text)
    }
    assert len(found) == 1


# --- KubeRay -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KUBERAY)
def test_the_kuberay_files_have_only_fields_that_the_operator_knows(name: str) -> None:
    data, schema = _load(f"kuberay/{name}"), resource(KUBERAY[name])
    jsonschema.validate(data, schema)
    data["spec"]["entripoint"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="'entripoint' was unexpected"):
        jsonschema.validate(data, schema)


def _pods(data: Any) -> Iterator[dict[str, Any]]:
    """Return the specs of all pods in a file."""
    if isinstance(data, list):
        for value in data:
            yield from _pods(value)
    if isinstance(data, dict):
        if "containers" in data:
            yield data
        for value in data.values():
            yield from _pods(value)


@pytest.mark.parametrize("name", KUBERAY)
def test_every_pod_is_bounded_and_without_root(name: str) -> None:
    pods = list(_pods(_load(f"kuberay/{name}")))
    assert len(pods) == (3 if name == "rayjob" else 2)
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            assert container["resources"]["limits"] == container["resources"]["requests"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("name", KUBERAY)
def test_every_ray_node_has_the_storage_shared_memory_and_time_to_end(name: str) -> None:
    data = _load(f"kuberay/{name}")["spec"]
    cluster = data.get("rayClusterSpec", data)
    (claim,) = [_load("kuberay/storage")["metadata"]["name"]]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
        mounts = {m["mountPath"]: volumes[m["name"]] for m in pod["containers"][0]["volumeMounts"]}
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert mounts["/shared"]["persistentVolumeClaim"]["claimName"] == claim
        assert pod["terminationGracePeriodSeconds"] == 60
        stored = int(group["rayStartParams"]["object-store-memory"])
        assert stored < _bytes(mounts["/dev/shm"]["emptyDir"]["sizeLimit"])
    assert cluster["authOptions"] == {"mode": "token"}
    assert _load("kuberay/storage")["spec"]["accessModes"] == ["ReadWriteMany"]


def _bytes(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi")) * 1024**3


def test_a_failed_ray_job_continues_in_a_new_cluster() -> None:
    spec = _load("kuberay/rayjob")["spec"]
    assert spec["entrypoint"].endswith("--resume")
    assert spec["backoffLimit"] > 0
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["shutdownAfterJobFinishes"]


# --- Slurm ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [SBATCH, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_the_scripts_are_sound_shell(script: Path) -> None:
    _shellcheck(script.read_text())


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """Stand-ins for Slurm's programs, which record their arguments. The step's `srun` exits with
    $STEP_CODE."""
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {
        "scontrol": 'echo "scontrol $*" >> "$CALLS"\n[ "$1" != show ] || printf "n1\\nn2\\n"',
        "srun": 'case "$*" in *hostname*) echo "10.0.0.7 fe80::1"; exit;; esac\n'
        'printf "%s\\n" "$@" "$RAY_AUTH_MODE" "$RAY_AUTH_TOKEN" > "$STEP"; exit "$STEP_CODE"',
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def _sbatch(
    slurm: Path, *argv: str, code: int = 0, restarts: int = 0
) -> tuple[int, str, list[str]]:
    """Run the script as Slurm would; returns its exit code, scontrol's calls, the step's words."""
    calls, step = slurm / "calls", slurm / "step"
    environment = {
        **os.environ,
        "PATH": f"{slurm}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "77",
        "SLURM_RESTART_COUNT": str(restarts),
        "CALLS": str(calls),
        "STEP": str(step),
        "STEP_CODE": str(code),
    }
    done = subprocess.run(
        ["bash", SBATCH, *argv], env=environment, capture_output=True, check=False
    )
    return done.returncode, calls.read_text(), step.read_text().splitlines()


def test_the_sbatch_script_starts_ray_on_all_nodes_and_one_driver(slurm: Path) -> None:
    code, calls, step = _sbatch(slurm, "/shared/a b.yaml", "-o", "seed=2")
    assert code == 0
    assert calls == "scontrol show hostnames n[1-2]\n"
    options, driver = step[: step.index("--")], step[step.index("--") + 1 : -2]
    assert {"--nodes=2", "--ntasks=2"} < set(options)
    assert options[-4:] == ["--address", "10.0.0.7:6379", "--min-nodes", "2"]
    merge = ["python", "-m", "raymerge", "merge", "/shared/a b.yaml", "--resume", "-o", "seed=2"]
    assert driver == merge
    assert step[-2] == "token"
    assert re.fullmatch("[0-9a-f]{64}", step[-1])


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(130, 0, True), (130, 20, False), (1, 0, False), (2, 0, False)],
)
def test_only_an_interrupted_run_is_queued_again(
    code: int, restarts: int, requeued: bool, slurm: Path
) -> None:
    ended, calls, _ = _sbatch(slurm, "/shared/m.yaml", code=code, restarts=restarts)
    assert ended == code
    assert ("scontrol requeue 77\n" in calls) == requeued


def test_the_sbatch_header_asks_for_what_a_restart_needs() -> None:
    options = re.findall(r"^#SBATCH (\S+)$", SBATCH.read_text(), flags=re.MULTILINE)
    assert {"--exclusive", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} < set(options)
    (seconds,) = re.findall(r"--signal=TERM@(\d+)", " ".join(options))
    assert int(seconds) >= 60


def test_a_driver_below_a_shell_that_ignores_sigterm_still_ends_and_keeps_its_state(
    world: World, tmp_path: Path
) -> None:
    """As in the sbatch script's step: the shell and Ray ignore the signal, the driver obeys it."""
    config = world.write(tmp_path / "m.yaml", output=str(tmp_path / "merged"))
    program = [sys.executable, "-m", "raymerge", "merge", str(config), "--resume"]
    shell = ["bash", "-c", 'trap "" TERM; exec "$@"', "-", *program, "-o", "optimizer.steps=100000"]
    with subprocess.Popen(shell, stderr=subprocess.PIPE) as process:
        try:
            metrics = tmp_path / "merged" / "metrics.jsonl"
            while not metrics.exists() or not metrics.stat().st_size:
                assert process.poll() is None
                time.sleep(0.05)
            process.terminate()
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err.decode()
    assert list((tmp_path / "merged" / "state").glob("step-*"))


# --- the image -----------------------------------------------------------------------------------


def test_the_image_runs_without_root_and_is_built_from_what_it_needs_alone() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users
    assert users[-1].split(":")[0] not in ("root", "0")
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)


def test_the_readme_links_to_files_that_exist_and_to_every_file() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (CLUSTER / "README.md").read_text())
    linked = {(CLUSTER / link).resolve() for link in links}
    assert all(path.exists() for path in linked)
    files = {path for path in CLUSTER.rglob("*") if path.is_file() and path.name != "README.md"}
    assert files < linked
