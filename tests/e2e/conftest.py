"""A release on a real cluster, shared by all tests of this folder; `make e2e` runs them, in the order of the file.

KUBECONFIG names the cluster. What else there is to know of it comes from the environment:

    E2E_VALUES      a values file for images and the like, beside tests/e2e/values.yaml
    E2E_NAMESPACE   default fabrictune-e2e; made, with Pod Security "restricted", and deleted at the end (E2E_KEEP=1 keeps it)
    E2E_POOL        1 when GPU nodes come from zero for pods that ask for nvidia.com/gpu (Karpenter, cluster autoscaler)
    E2E_KILL_NODE   a command that is given a node's name and ends it without a word
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
MODEL = "models/smollm2-135m-instruct"
TIMES = pytest.StashKey[dict[str, list[str]]]()


class Release:
    """`helm`, `kubectl` and `fabrictune` against one release in one namespace."""

    def __init__(self, folder: Path, namespace: str) -> None:
        self.folder, self.namespace = folder, namespace
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("FABRICTUNE_")}
        self.env |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
        bin_folder = Path(sys.executable).parent
        self.env["PATH"] = (
            f"{self.env['PATH']}:{bin_folder}"  # kubectl and helm of `make setup`, where there are no others
        )
        self._connect: subprocess.Popen[bytes] | None = None

    def run(self, *argv: str, status: int | None = 0, timeout: float = 600, stdin: str = "") -> str:
        """Run a program; returns its output. Fails on another exit status, unless that is None."""
        done = subprocess.run(
            argv,
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            input=stdin,
        )
        if status is not None:
            assert done.returncode == status, f"{argv}: {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        return done.stdout + (done.stderr if status != 0 else "")

    def kubectl(self, *arguments: str, status: int | None = 0, stdin: str = "", timeout: float = 300) -> str:
        return self.run("kubectl", "-n", self.namespace, *arguments, status=status, stdin=stdin, timeout=timeout)

    def get(self, *arguments: str) -> Any:
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def fabrictune(self, *arguments: str, status: int | None = 0, timeout: float = 900) -> str:
        return self.run(sys.executable, "-m", "fabrictune", *arguments, status=status, timeout=timeout)

    def json(self, *arguments: str) -> Any:
        return json.loads(self.fabrictune("--json", *arguments))

    def write(self, name: str, value: Any) -> str:
        (self.folder / name).write_text(yaml.safe_dump(value))
        return name

    def helm(self, verb: str, *arguments: str) -> str:
        """install or upgrade with the values of these tests."""
        files = [HERE / "values.yaml", *([Path(v)] if (v := os.environ.get("E2E_VALUES")) else [])]
        chosen = [word for file in files for word in ("-f", str(file.resolve()))]
        chart = str(ROOT / "helm" / "fabrictune")
        said = self.run("helm", verb, "fabrictune", chart, "-n", self.namespace, *chosen, *arguments)
        # Replaced servers answer who is connected to them for some seconds more, with the settings that they had.
        self.until(lambda: not self._servers_going(), 60, "the replaced servers are gone")
        return said

    def _servers_going(self) -> list[str]:
        pods = self.get("pods", "-l", "app.kubernetes.io/instance=fabrictune,!fabrictune.dev/kind")["items"]
        return [pod["metadata"]["name"] for pod in pods if pod["metadata"].get("deletionTimestamp")]

    def connect(self) -> None:
        """Keep `fabrictune connect` running; other commands find it by its file."""
        self.disconnect()
        with (self.folder / "connect.txt").open("wb") as said:
            argv = [sys.executable, "-m", "fabrictune", "connect", "--namespace", self.namespace]
            self._connect = subprocess.Popen(argv, cwd=self.folder, env=self.env, stdout=said, stderr=said)
        self.until(lambda: (self.folder / ".fabrictune" / "connection.json").exists(), 60, "connect")

    def disconnect(self) -> None:
        if self._connect is not None:
            self._connect.terminate()
            self._connect.wait(20)
            self._connect = None

    def job(self, name: str) -> Any:
        return self.json("jobs", "get", name)

    def wait_state(self, name: str, states: set[str], seconds: float) -> Any:
        """The job once it is in one of the states."""
        return self.until(
            lambda: (j := self.job(name))["execution"]["state"] in states and j, seconds, f"{name} {states}"
        )

    def until(self, check: Callable[[], Any], seconds: float, what: str) -> Any:
        """What `check` returns once that is true. Fails after `seconds`, with what it was last."""
        begin = time.monotonic()
        while not (found := check()):
            assert time.monotonic() - begin < seconds, (
                f"{what}: not within {seconds} s\n{self.kubectl('get', 'pods,jobs')}"
            )
            time.sleep(0.5)
        return found

    def train(self, name: str, steps: int, batch: int = 1, **resources: Any) -> str:
        """Begin a training of SmolLM2 on the small data set, with a checkpoint every other step; returns its name."""
        arguments = {"max_steps": steps, "save_steps": 2, "num_train_epochs": 100, "max_length": 1024}
        arguments["effective_batch_size"] = batch
        spec: dict[str, Any] = {"preset": "smollm2-cpu", "arguments": arguments, "resources": resources}
        file = self.write(f"{name}.yaml", spec)
        self.fabrictune("train", "datasets/e2e", "--model", MODEL, "--spec", file, "--id", name, "--detach")
        return f"trainingJobs/{name}"

    def step(self, name: str) -> int:
        """How far a training is."""
        progress = self.job(name)["execution"].get("progress", {})
        return int(progress.get("step", 0)) if progress.get("unit") == "steps" else 0

    def pod(self, name: str) -> Any | None:
        """The live pod of a training, or None."""
        pods = self.get("pods", "-l", f"fabrictune.dev/name=training-{name.rpartition('/')[2]}")["items"]
        live = [p for p in pods if p["status"]["phase"] == "Running" and not p["metadata"].get("deletionTimestamp")]
        return live[0] if live else None

    def manifests(self, prefix: str) -> list[str]:
        """Names of the artifacts of a collection."""
        return [a["name"] for a in self.json("artifacts", "ls", prefix)]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TIMES] = {}


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Keeps a figure for the table at the end."""
    return request.config.stash[TIMES].setdefault(request.node.name, []).append


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome == "skipped":
        REPORTS.append(report)


REPORTS: list[pytest.TestReport] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    terminalreporter.section("on the cluster")
    for report in REPORTS:
        name = report.nodeid.rpartition("::")[2]
        figures = "; ".join(config.stash[TIMES].get(name, []))
        terminalreporter.line(
            f"{report.outcome:8} {report.duration:7.1f} s  {name.removeprefix('test_').replace('_', ' ')}"
        )
        if figures:
            terminalreporter.line(f"                    {figures}")


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    if not os.environ.get("KUBECONFIG"):
        pytest.exit("no cluster: set KUBECONFIG (`kind create cluster` makes one; docs/kubernetes.md)", returncode=2)
    there = Release(tmp_path_factory.mktemp("e2e"), os.environ.get("E2E_NAMESPACE", "fabrictune-e2e"))
    for program in ("helm", "kubectl"):
        if shutil.which(program, path=there.env["PATH"]) is None:
            pytest.exit(f"{program} is missing: `make setup` brings it into .venv/bin", returncode=2)
    restricted = {"pod-security.kubernetes.io/enforce": "restricted"}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": there.namespace, "labels": restricted}}
    there.run("kubectl", "apply", "-f", "-", stdin=yaml.safe_dump(namespace))
    try:
        there.helm("upgrade", "--install", "--wait", "--timeout", "5m")
        there.connect()
        yield there
    finally:
        there.disconnect()
        if not os.environ.get("E2E_KEEP"):
            there.run("helm", "uninstall", "fabrictune", "-n", there.namespace, "--timeout", "3m", status=None)
            there.run("kubectl", "delete", "namespace", there.namespace, "--timeout=120s", status=None)
