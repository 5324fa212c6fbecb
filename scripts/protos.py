"""The API's generated code and its guards: generate · check · fresh · accept.

protoc (from grpcio-tools, pinned) writes fabrictune/v1. buf reads a descriptor image instead of the folder, because
a folder lint wants the network for google/rpc. The last accepted image, protos/fabrictune.v1.binpb, lies in git:
a change that breaks clients against it fails, and `accept` renews it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
ACCEPTED = PROTOS / "fabrictune.v1.binpb"
PACKAGE = "fabrictune/v1"


def main(argv: list[str]) -> int:
    """Exit status 0: good; 1: a finding, printed; 2: wrong usage."""
    commands: dict[str, Callable[[], int]] = {
        "generate": generate,
        "check": check,
        "fresh": fresh,
        "accept": accept,
    }
    if len(argv) != 1 or argv[0] not in commands:
        print(f"usage: protos.py {' | '.join(commands)}", file=sys.stderr)
        return 2
    return commands[argv[0]]()


def generate() -> int:
    """Messages (.py, .pyi) and stubs into fabrictune/v1; what belongs to a proto that is gone is removed."""
    out = ROOT / PACKAGE
    out.mkdir(parents=True, exist_ok=True)
    wanted = {proto.stem for proto in sources()}
    for path in out.glob("*_pb2*.py*"):
        if path.name.split("_pb2")[0] not in wanted:
            path.unlink()
    return protoc(f"--python_out={ROOT}", f"--pyi_out={ROOT}", f"--grpc_python_out={ROOT}")


def check() -> int:
    """Lint, then compatibility with the accepted image; findings of both are printed."""
    return lint() | breaking()


def lint() -> int:
    """Buf's STANDARD rules as protos/buf.yaml selects them."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "image.binpb")
        return write_image(image, comments=True) or buf("lint", image)


def breaking() -> int:
    """Against the accepted image, by buf's PACKAGE rules: source and wire compatible within fabrictune.v1."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "image.binpb")
        return write_image(image, comments=True) or buf("breaking", image, "--against", str(ACCEPTED))


def fresh() -> int:
    """Whether the accepted image is the one of these protos; it must be when a change lands."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "image.binpb")
        if status := write_image(image, comments=False):
            return status
        if ACCEPTED.exists() and ACCEPTED.read_bytes() == image.read_bytes():
            return 0
    print(f"{ACCEPTED.relative_to(ROOT)} is not the image of protos/: run `make proto-accept`.", file=sys.stderr)
    return 1


def accept() -> int:
    """Renew the accepted image; a breaking change only with ALLOW_BREAKING=1, said in the change log."""
    if ACCEPTED.exists() and breaking() and os.environ.get("ALLOW_BREAKING") != "1":
        print(
            "Not accepted: this breaks clients. If that is meant: ALLOW_BREAKING=1 make proto-accept", file=sys.stderr
        )
        return 1
    return write_image(ACCEPTED, comments=False)


def sources() -> list[Path]:
    """The proto files, sorted, so that images are the same bytes everywhere."""
    return sorted((PROTOS / PACKAGE).glob("*.proto"))


def write_image(path: Path, *, comments: bool) -> int:
    """A FileDescriptorSet with all imports; comments (source info) give findings a line number."""
    info = ["--include_source_info"] if comments else []
    return protoc(f"--descriptor_set_out={path}", "--include_imports", *info)


def protoc(*options: str) -> int:
    """Runs grpcio-tools' protoc over every source; google/rpc comes with googleapis-common-protos."""
    includes = [f"-I{PROTOS}", f"-I{sysconfig.get_path('purelib')}"]
    names = [str(path.relative_to(PROTOS)) for path in sources()]
    return subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *includes, *options, *names], cwd=ROOT).returncode


def buf(command: str, image: Path, *options: str) -> int:
    """Runs buf on our package only; imported packages have their own house rules."""
    binary = Path(sysconfig.get_path("scripts"), "buf")
    config = str(PROTOS / "buf.yaml")
    return subprocess.run(
        [str(binary), command, str(image), "--config", config, "--path", PACKAGE, *options]
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
