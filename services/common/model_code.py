"""Python code that a model brings: transformers runs it only when told to trust it, ms-swift always."""

from __future__ import annotations

import json
from pathlib import Path


def files_naming_code(model: Path) -> list[str]:
    """Files in a model's folder whose `auto_map` names code to load: config.json, but a tokenizer's and a processor's as well."""
    return [file.name for file in sorted(model.glob("*.json")) if _names_code(file)]


def _names_code(file: Path) -> bool:
    try:
        told = json.loads(file.read_bytes())
    except ValueError:
        return False  # nor can transformers read it
    return isinstance(told, dict) and "auto_map" in told
