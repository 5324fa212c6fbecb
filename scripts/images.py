"""`make images`: a container image for each service, built with buildah or docker, measured, and saved for a cluster.

Only the standard library, so a clone can build images without `make setup`. What pip is told on this machine (mirrors,
certificates, local wheels) is told to the build as a secret and as read-only mounts: nothing of it stays in an image.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from image_plans import (
    IMAGES,
    SERVER_BYTES,
    SHARED,
    Image,
    Pip,
    Settings,
    parse_size,
    plan_build,
    plan_cuda_base,
    plan_pip,
    plan_save,
    plan_shared,
)

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "images"

LOADERS = {"kind": "kind load image-archive", "k3d": "k3d image import"}
"""Command on the path → what is called with the archives, so that a cluster in containers has the images."""


class ImagesError(Exception):
    """What is missing or went wrong and what to do about it; printed without a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0: all built (or loaded, or clean); 1: not, and the last lines say why."""
    parser = argparse.ArgumentParser(prog="make images", description=__doc__)
    parser.add_argument("command", choices=("build", "load", "lint"))
    parser.add_argument("names", nargs="*", metavar="IMAGE", help=f"of {', '.join(image.name for image in IMAGES)}")
    parser.add_argument("--tool", choices=("buildah", "docker"))
    parser.add_argument("--tag", default="dev")
    parser.add_argument("--registry", default="localhost")
    parser.add_argument("--base", default="", help="an image with Python 3.11, a digest if you like")
    parser.add_argument("--variant", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--load", default="", help="a command that takes docker archives")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    arguments = parser.parse_intermixed_args(argv)
    try:
        if arguments.command == "lint":
            return lint()
        images = choose(arguments.names, arguments.variant)
        settings = Settings(
            tool=arguments.tool or find_tool(),
            tag=arguments.tag,
            registry=arguments.registry,
            base=arguments.base,
            variant=arguments.variant,
            version=tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"],
            revision=git_revision(),
            source=os.environ.get("SOURCE") or "unknown",
            epoch=os.environ.get("SOURCE_DATE_EPOCH", ""),
        )
        work = load if arguments.command == "load" else build
        work(images, settings, arguments.load, dry_run=arguments.dry_run)
    except ImagesError as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    return 0


def choose(names: Sequence[str], variant: str) -> list[Image]:
    """The named images, or all that have the variant. Raises ImagesError."""
    known = {image.name: image for image in IMAGES}
    if unknown := [name for name in names if name not in known]:
        raise ImagesError(f"there is no image {', '.join(unknown)}; there are {', '.join(known)}")
    images = [known[name] for name in names or known]
    return [image for image in images if image.heavy] if variant == "cuda" else images


def build(images: Sequence[Image], settings: Settings, _: str, *, dry_run: bool) -> None:
    """Builds, prints a table, and what was not built. Raises ImagesError at the first that fails or is too large."""
    pip = read_pip(mounts=settings.tool == "buildah")
    OUT.mkdir(parents=True, exist_ok=True)
    rows, large = [("image", "size", "time")], []
    with tempfile.TemporaryDirectory() as folder:
        conf = Path(folder, "pip.conf")
        conf.write_text(pip.conf)
        if settings.variant == "cuda":
            act(settings.named("cuda-base"), plan_cuda_base(settings), OUT / "cuda-base.log", dry_run=dry_run)
        for target in SHARED:
            command = plan_shared(target, settings, pip, conf)
            act(f"what all share: {target}", command, OUT / f"shared-{target}.log", dry_run=dry_run)
        for image in images:
            started = time.monotonic()
            name = settings.reference(image)
            act(name, plan_build(image, settings, pip, conf), OUT / f"{image.name}.log", dry_run=dry_run)
            if dry_run:
                continue
            size = measure(name, settings.tool)
            rows.append((name, f"{size / 1e6:.0f} MB", f"{time.monotonic() - started:.0f} s"))
            if image.max_bytes and size > image.max_bytes:
                large.append(f"{image.name} has {size / 1e6:.0f} MB")
    if dry_run:
        return
    print_table(rows)
    print_absent(settings)
    if large:
        raise ImagesError(f"{', '.join(large)}; a server has at most {SERVER_BYTES / 1e6:.0f} MB. Look at its lock.")


def load(images: Sequence[Image], settings: Settings, command: str, *, dry_run: bool) -> None:
    """Writes build/images/*.tar and hands them to a cluster: `command`, else kind or k3d where there is one."""
    OUT.mkdir(parents=True, exist_ok=True)
    archives = []
    for image in images:
        archive = OUT / f"fabrictune-{image.name}{'-cuda' if settings.variant == 'cuda' else ''}.tar"
        archives.append(str(archive))
        if not dry_run:
            archive.unlink(missing_ok=True)
        act(archive.name, plan_save(image, settings, archive), OUT / f"{archive.name}.log", dry_run=dry_run)
    loader = command or next((call for name, call in LOADERS.items() if shutil.which(name)), "")
    if not loader:
        print('images: neither kind nor k3d is here; LOAD="command" names what loads archives into your cluster')
    elif dry_run:
        print(shlex.join([*shlex.split(loader), *archives]))
    elif subprocess.run([*shlex.split(loader), *archives], cwd=ROOT).returncode:
        raise ImagesError(f"{loader} failed; the archives are in {OUT.relative_to(ROOT)}")


def lint() -> int:
    """Every Dockerfile through hadolint; CUDA variants included, since they are the same files."""
    beside = ROOT / ".venv" / "bin" / "hadolint"
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if not hadolint:
        raise ImagesError("there is no hadolint; `make setup` installs it")
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("services/*/*Dockerfile"))
    status = subprocess.run([hadolint, *files], cwd=ROOT).returncode
    print(f"images: hadolint read {len(files)} Dockerfiles: {'findings above' if status else 'clean'}")
    return status


def find_tool() -> str:
    """buildah, else docker. Raises ImagesError."""
    for name in ("buildah", "docker"):
        if shutil.which(name):
            return name
    raise ImagesError(
        "neither buildah nor docker is here. Debian and Ubuntu: `apt-get install buildah`; Fedora: `dnf install buildah`; "
        "or Docker from https://docs.docker.com/engine/install/"
    )


def git_revision() -> str:
    """The commit, with -dirty when the tree is not it."""
    shown = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return shown.stdout.strip() or "unknown"


def read_pip(*, mounts: bool) -> Pip:
    """What pip is told on this machine; nothing where there is no pip."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    return plan_pip(listed.stdout, mounts=mounts) if listed.returncode == 0 else Pip("", ())


def act(what: str, command: Sequence[str], log: Path, *, dry_run: bool) -> None:
    """Runs a command with its words in a log, or prints it. Raises ImagesError with the end of the log."""
    if dry_run:
        print(shlex.join(command))
        return
    print(f"images: {what} …", flush=True)
    with log.open("w") as words:
        environment = tool_environment(os.environ)
        status = subprocess.run(command, cwd=ROOT, stdout=words, stderr=subprocess.STDOUT, env=environment).returncode
    if status:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise ImagesError(f"{command[0]} ended with status {status}; all of it is in {log}\n{tail}")


def tool_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """BuildKit for docker; for buildah without runc or crun the isolation that needs neither."""
    ours = {"DOCKER_BUILDKIT": "1"}
    if not (shutil.which("runc") or shutil.which("crun")):
        ours["BUILDAH_ISOLATION"] = "chroot"
    return {**ours, **environment}


def measure(reference: str, tool: str) -> int:
    """Bytes of an image, uncompressed."""
    if tool == "docker":
        command = ["docker", "image", "inspect", "--format={{.Size}}", reference]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    shown = subprocess.run(
        ["buildah", "images", "--json", reference], capture_output=True, text=True, check=True
    ).stdout
    return parse_size(json.loads(shown)[0]["size"])


def print_table(rows: Sequence[tuple[str, str, str]]) -> None:
    """Columns as wide as they need to be."""
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, size, seconds in rows:
        print(f"  {name:{widths[0]}}  {size:>{widths[1]}}  {seconds:>{widths[2]}}")


def print_absent(settings: Settings) -> None:
    """What is not built, and why."""
    print("Not built:")
    if settings.variant == "cpu":
        print(
            "  for CUDA (inference-engine, training-worker): NVIDIA's base and some 20 GB of disk an image are needed."
        )
        print("  Their locks are resolved and their Dockerfiles linted. To try: make images VARIANT=cuda")
    print("  for arm64: this builds on and for amd64. The servers' locks hold on arm64 too; those of inference-engine")
    print("  (llguidance 1.7.6 has no wheel) and training-worker (torch's CPU build) are for amd64 only.")


if __name__ == "__main__":
    sys.exit(main())
