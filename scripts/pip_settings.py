"""pip's settings (PIP_… and pip.conf) as uv's environment, so that mirrors, proxies and local wheels are honoured."""

from __future__ import annotations

import ast
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

UV_VARIABLES = {
    # pip's option: (uv's variable, what joins several values)
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "no-index": ("UV_NO_INDEX", ""),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", ""),
    "default-timeout": ("UV_HTTP_TIMEOUT", ""),
    "timeout": ("UV_HTTP_TIMEOUT", ""),
    "proxy": ("ALL_PROXY", ""),
}


def uv_environment(python: Path, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables for uv that say what pip would do. Variables that the user has set for uv win."""
    listed = subprocess.run([str(python), "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    ours = translate(parse(listed.stdout))
    return {name: value for name, value in ours.items() if name not in environment}


def parse(listing: str) -> dict[str, list[str]]:
    """`pip config list` → {option: values}. pip's order of strength: environment, then [install], then [global]."""
    strength = {"global": 0, "install": 1, ":env:": 2}
    found: dict[str, tuple[int, list[str]]] = {}
    for line in listing.splitlines():
        key, _, quoted = line.partition("=")
        section, _, option = key.rpartition(".")
        if section not in strength or not quoted:
            continue
        rank = strength[section]
        if option not in found or rank >= found[option][0]:
            found[option] = (rank, str(ast.literal_eval(quoted)).split())
    return {option: values for option, (_, values) in found.items()}


def translate(settings: Mapping[str, list[str]]) -> dict[str, str]:
    """{option: values} → uv's variables. Indexes count alike, as in pip; uv would stop at the first."""
    variables = {
        variable: joiner.join(settings[option]) if joiner else settings[option][0]
        for option, (variable, joiner) in UV_VARIABLES.items()
        if settings.get(option)
    }
    return {**variables, "UV_INDEX_STRATEGY": "unsafe-best-match"}
