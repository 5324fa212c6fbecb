"""A stage's spec, out of a file and what the command line says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fabrictune.errors import ApiError
from fabrictune.sources import resolve_alias


def read_spec(file: Path | None) -> dict[str, Any]:
    """A YAML mapping, or {} without a file. Raises ApiError."""
    if file is None:
        return {}
    import yaml

    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ApiError(f"{file} cannot be read: {error.strerror}", "NOT_FOUND") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ApiError(f"{file} is not YAML: {error}", "INVALID_ARGUMENT") from None
    if not isinstance(read, dict):
        raise ApiError(f"{file} must hold a mapping, such as `training: …`", "INVALID_ARGUMENT")
    return read


def read_section(spec: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The mapping at a key, to which options of the command are added. Raises ApiError."""
    told = spec.get(key)
    if told is not None and not isinstance(told, dict):
        raise ApiError(f"{key} must be a mapping, not {told!r}", "INVALID_ARGUMENT")
    return told or {}


def read_sources(conversion: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sources of a conversion's spec. Raises ApiError."""
    sources = conversion.get("sources")
    if not isinstance(sources, list) or not all(isinstance(s, dict) and isinstance(s.get("uri"), str) for s in sources):
        raise ApiError("conversion.sources must be a list of mappings with a `uri`", "INVALID_ARGUMENT")
    return sources


def name_sources(named: Sequence[str], options: Mapping[str, str], spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sources of the command, with the options for all of them; without any, those of the spec, each with its own."""
    given = {key: value for key, value in options.items() if value}
    if named:
        return [resolve_alias({"uri": uri, **given}) for uri in named]
    if given or "sources" not in spec:
        raise ApiError(
            "name the rows to convert, or give a --spec with `sources` and their options", "INVALID_ARGUMENT"
        )
    return [resolve_alias(source) for source in read_sources(spec)]


def name_adapters(names: Sequence[str], weights: Sequence[float]) -> dict[str, Any]:
    """A spec's adapter, or its adapters when there are several or weights."""
    if len(names) == 1 and not weights:
        return {"adapter": names[0]}
    return {
        "adapters": [{"adapter": n, "weight": w} for n, w in zip(names, weights or [1.0] * len(names), strict=True)]
    }


def read_template(told: str) -> str:
    """A spec's chat_template: the text of the file, where there is one of this name."""
    file = Path(told)
    try:
        return file.read_text(encoding="utf-8") if told and file.is_file() else told
    except (OSError, UnicodeDecodeError) as error:
        raise ApiError(f"{file} cannot be read: {error}", "INVALID_ARGUMENT") from None


def parse_range(text: str) -> dict[str, int]:
    """MIN:MAX, or one number for both. Raises ApiError."""
    low, _, high = text.partition(":")
    if not (low.isdigit() and (high or low).isdigit()):
        raise ApiError(f"--distractors {text!r} must look like 0:3", "INVALID_ARGUMENT")
    return {"min": int(low), "max": int(high or low)}


def parse_setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE; the value is read as YAML. Raises ApiError."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ApiError(f"--set {text!r} must look like learning_rate=1e-4", "INVALID_ARGUMENT")
    try:
        return key.replace("-", "_"), yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2024-13-45
        why = getattr(error, "problem", None) or error
        raise ApiError(
            f"--set {text!r}: the value is not YAML ({why}); quote it: {key}='\"…\"'", "INVALID_ARGUMENT"
        ) from None
