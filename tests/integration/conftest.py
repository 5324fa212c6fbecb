"""modelscope-agent 0.7.1 itself, for the tests that ask RolePlay.

It gets a venv of its own (228 MB, about a minute), since its dependencies are no concern of ours.
FABRICTUNE_ROLEPLAY_VENV names a folder where that venv is kept, or is found again.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "modelscope-agent==0.7.1"
NEEDED = Path(__file__).resolve().parents[2] / "examples/agentfabric/requirements.txt"
NO_NETWORK = re.compile(
    "NewConnectionError|NameResolutionError|ConnectTimeoutError|Network is unreachable|Temporary failure in name"
)


@pytest.fixture(scope="session")
def role_play_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The interpreter of a venv that has the package. Tests that ask for it belong to the xdist group "roleplay"."""
    kept = os.environ.get("FABRICTUNE_ROLEPLAY_VENV")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("roleplay") / "venv"
    found, complete = folder / "bin/python", folder / "complete"
    if not complete.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install(found, "--no-deps", PACKAGE)
        install(found, "-r", str(NEEDED))
        complete.touch()
    yield found
    if not kept:
        shutil.rmtree(folder)  # pytest would keep those of the last three sessions


def install(python: Path, *packages: str) -> None:
    """Let pip install packages. Fails with pip's own words; skips where there is no network."""
    argv = [str(python), "-m", "pip", "install", "--quiet", "--no-input", *packages]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip()[-2000:]
        if NO_NETWORK.search(done.stderr):
            print(f"pip cannot reach a package index, so {' '.join(packages)} cannot be asked:\n{said}")
            pytest.skip(f"no network for {' '.join(packages)}")
        pytest.fail(f"pip install {' '.join(packages)} failed, so what RolePlay sends is not known:\n{said}")
