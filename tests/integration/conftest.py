"""modelscope-agent 0.7.1 itself, for the tests that ask RolePlay.

It gets a venv of its own (228 MB, about a minute), since its dependencies are no concern of ours. It stays in build/roleplay,
or in the folder that FABRICTUNE_ROLEPLAY_VENV names, for the next session.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "modelscope-agent==0.7.1"
ROOT = Path(__file__).resolve().parents[2]
NEEDED = ROOT / "examples/agentfabric/requirements.txt"
NO_NETWORK = re.compile(
    "NewConnectionError|NameResolutionError|ConnectTimeoutError|Network is unreachable|Temporary failure in name"
)


@pytest.fixture(scope="session")
def role_play_python() -> Path:
    """The interpreter of a venv that has the package. Tests that ask for it belong to the xdist group "roleplay"."""
    folder = Path(os.environ.get("FABRICTUNE_ROLEPLAY_VENV") or ROOT / "build/roleplay")
    found, complete = folder / "bin/python", folder / "complete"
    wanted = f"{sys.version}\n{PACKAGE}\n{NEEDED.read_text(encoding='utf-8')}"
    if not complete.exists() or complete.read_text(encoding="utf-8") != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install(found, "--no-deps", PACKAGE)
        install(found, "-r", str(NEEDED))
        complete.write_text(wanted, encoding="utf-8")
    return found


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
