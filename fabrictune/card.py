"""The card (README.md) of a published artifact: what it is, how it was made, and from what, down to the raw rows' hashes.

A pure function of manifests: the same artifact always has the same card. Hubs read the YAML at its beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import yaml
from google.protobuf import json_format

from fabrictune.v1 import artifact_pb2

SPLITS = ("train", "validation", "test")
NO_LICENSE = "unknown"
SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)


class _Text(NamedTuple):
    """What is said of a kind of artifact."""

    what: str
    use: str
    tags: tuple[str, ...] = ()


TEXTS: Mapping[str, _Text] = {
    "dataset": _Text(
        "Training rows that teach a small language model to call tools the way ModelScope's AgentFabric prompts for them.",
        "Rows are in ms-swift's messages format; a message's `loss` says whether it is trained.",
        ("tool-calling", "agent", "agentfabric", "ms-swift"),
    ),
    "rows": _Text(
        "Raw rows, as they were before conversion.",
        "`fabrictune convert` turns them into training rows.",
        ("tool-calling", "agent"),
    ),
    "adapter": _Text(
        "A LoRA adapter that teaches its base model to call tools the way ModelScope's AgentFabric prompts for them.",
        "Load the base model first, then the adapter with peft: `adapter_config.json` names the base by its name in the "
        "object store, which means nothing elsewhere.",
        ("tool-calling", "agent", "agentfabric", "lora"),
    ),
    "model": _Text(
        "A language model that calls tools the way ModelScope's AgentFabric prompts for them.",
        "It is a plain transformers model of safetensors weights.",
        ("tool-calling", "agent", "agentfabric"),
    ),
}


FILES: Mapping[str, str] = {
    "tools.jsonl": "the tools of each row as OpenAI function objects, under the row's id",
    "rejects.jsonl": "the rows that were refused, each with the reason",
    "report.json": "what became of the rows, in figures",
    "report.html": "the same, to look at",
    "metrics.jsonl": "loss and learning rate by step",
    "loss.png": "the loss as a curve",
    "training_args.json": "the arguments that ms-swift was called with",
}
"""What is in a file, where its name does not say it."""


def render_card(
    title: str,
    lineage: Sequence[artifact_pb2.Artifact],
    reports: Sequence[artifact_pb2.Artifact] = (),
    license_id: str = "",
    files: Iterable[str] = (),
) -> str:
    """The card as Markdown. lineage: the artifact first, then all that it was made from; reports: evaluations of it.

    files: paths that are published, those of the artifact when empty.
    """
    artifact = lineage[0]
    text = TEXTS[artifact.kind]
    published = set(files) or {file.path for file in artifact.files}
    parts = [
        _front_matter(lineage, license_id, published),
        f"# {title}\n\n{text.what} This card was written by fabrictune.",
        text.use,
        _facts(artifact),
        _counts(artifact),
        _evaluations(reports),
        _making(artifact),
        _lineage(lineage),
        _files(artifact, published),
        _license(lineage, license_id),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(lineage: Sequence[artifact_pb2.Artifact], license_id: str, published: set[str]) -> str:
    artifact = lineage[0]
    told: dict[str, Any] = {"license": license_id or NO_LICENSE, "tags": ["fabrictune", *TEXTS[artifact.kind].tags]}
    if artifact.kind in ("adapter", "model"):
        told["pipeline_tag"] = "text-generation"
        told["library_name"] = "peft" if artifact.kind == "adapter" else "transformers"
        if base := _hub_base(lineage):
            told["base_model"] = base
    else:
        told["task_categories"] = ["text-generation"]
        parts = [{"split": split, "path": f"{split}.jsonl"} for split in SPLITS if f"{split}.jsonl" in published]
        if parts:
            told["configs"] = [{"config_name": "default", "data_files": parts}]
        rows = sum(int(n) for n in _metadata(artifact).get("rows_written", {}).values())
        if rows:
            told["size_categories"] = [next((name for limit, name in SIZES if rows < limit), "n>10M")]
    return f"---\n{_yaml(told)}\n---"


def _facts(artifact: artifact_pb2.Artifact) -> str:
    made = artifact.create_time.ToDatetime().strftime("%Y-%m-%d %H:%M UTC")
    rows = [
        ("artifact", f"`{artifact.name}`"),
        ("sha256 of its files", f"`{artifact.digest}`"),
        ("made by", f"`{artifact.created_by.job}`" if artifact.created_by.job else "an import"),
        ("made on", made),
        ("size", f"{artifact.size_bytes:,} bytes in {len(artifact.files)} files"),
    ]
    return _table(("", ""), rows)


def _counts(artifact: artifact_pb2.Artifact) -> str:
    told = _metadata(artifact)
    if artifact.kind == "dataset" and "rows_in" in told:
        split_rows = [
            (split, told.get("rows_written", {}).get(split, 0), told.get("rows_scored", {}).get(split, 0),
             told.get("tools", {}).get(split, 0))
            for split in SPLITS
        ]  # fmt: skip
        text = f"## Rows\n\n{_table(('split', 'rows', 'with an expected answer', 'tools'), split_rows)}\n\n"
        text += f"{told['rows_in']} raw rows were read: {told.get('rows_converted', 0)} converted"
        duplicates = told.get("rows_duplicate", {})
        if sum(duplicates.values()):
            text += f", {sum(duplicates.values())} left out as duplicates"
        if told.get("rows_left_out"):
            text += f", {told['rows_left_out']} not asked for"
        text += f", {told.get('rows_rejected', 0)} refused. No tool is in two splits."
        refused = sorted(told.get("rejected_by_code", {}).items(), key=lambda item: (-item[1], item[0]))
        return text + (f"\n\n{_table(('refused because', 'rows'), refused)}" if refused else "")
    if artifact.kind == "adapter":
        known = ("preset", "step", "total_steps", "rows_trained", "tokens", "loss", "eval_loss", "seed")
        rows = [(name.replace("_", " "), told[name]) for name in known if name in told]
        return f"## Training\n\n{_table(('', ''), rows)}" if rows else ""
    return ""


def _evaluations(reports: Sequence[artifact_pb2.Artifact]) -> str:
    columns = [(r, _metadata(r)) for r in reports]
    columns = [(r, told) for r, told in columns if told.get("metrics")]
    if not columns:
        return ""
    names = list(dict.fromkeys(name for _, told in columns for name in told["metrics"]))
    rows = [(name.replace("_", " "), *(_part(told["metrics"].get(name, {})) for _, told in columns)) for name in names]
    sources = "\n".join(
        f"- {told.get('label') or report.name}: `{report.name}` (sha256 `{report.digest[:12]}`), "
        f"on the {_spec(report).get('split') or 'test'} rows of `{_spec(report).get('dataset', '?')}`"
        for report, told in columns
    )
    heads = ("", *(str(told.get("label") or report.name) for report, told in columns))
    return f"## Evaluation\n\n{_table(heads, rows)}\n\n{sources}"


def _part(metric: Mapping[str, Any]) -> str:
    if not metric.get("n") or metric.get("value") is None:
        return "–"
    of = f"{metric['k']} of {metric['n']}" if "k" in metric else f"mean of {metric['n']}"
    return f"{100 * metric['value']:.1f} % ({of})"


def _making(artifact: artifact_pb2.Artifact) -> str:
    spec, versions = _spec(artifact), dict(sorted(artifact.created_by.versions.items()))
    parts = ["## How it was made"]
    if spec:
        parts.append(f"`{artifact.created_by.job}` was asked for:\n\n{_fenced(_yaml(spec), 'yaml')}")
    if versions:
        parts.append("With " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _lineage(lineage: Sequence[artifact_pb2.Artifact]) -> str:
    """Every input down to the raw rows; one that has been deleted since is known by its hash only."""
    known = {artifact.name: artifact for artifact in lineage}
    rows: dict[str, tuple[str, ...]] = {}
    for artifact in lineage:
        sources = artifact.created_by.inputs
        came = ", ".join(f"`{source.name}`" for source in sources) or _origin(artifact)
        rows[artifact.name] = (f"`{artifact.name}`", artifact.kind, f"`{artifact.digest}`", came)
        for source in sources:
            if source.name not in known:
                rows.setdefault(source.name, (f"`{source.name}`", "deleted since", f"`{source.digest}`", ""))
    return f"## Lineage\n\n{_table(('artifact', 'kind', 'sha256', 'made from'), list(rows.values()))}"


def _origin(artifact: artifact_pb2.Artifact) -> str:
    told = _metadata(artifact)
    return str(told.get("source") or told.get("description") or "")


def _files(artifact: artifact_pb2.Artifact, published: set[str]) -> str:
    rows = [
        (f"`{f.path}`", f"{f.size_bytes:,}", f"`{f.sha256}`", FILES.get(f.path, ""))
        for f in sorted(artifact.files, key=lambda f: f.path)
        if f.path in published
    ]
    left_out = sorted(f.path for f in artifact.files if f.path not in published)
    text = f"## Files\n\n{_table(('file', 'bytes', 'sha256', ''), rows)}"
    return text + (f"\n\nNot published: {', '.join(f'`{path}`' for path in left_out)}." if left_out else "")


def _license(lineage: Sequence[artifact_pb2.Artifact], license_id: str) -> str:
    sources = [f"`{a.name}` ({_origin(a)})" for a in lineage if not a.created_by.inputs and _origin(a)]
    bound = f" It was made from {', '.join(sources)}, whose own licences bind it." if sources else ""
    if license_id:
        return f"## Licence\n\n{license_id}.{bound}"
    return (
        "## Licence\n\n**Not chosen yet.** Whoever publishes this has to choose one (`--license`, such as apache-2.0), "
        f"or may not publish it.{bound}"
    )


def _hub_base(lineage: Sequence[artifact_pb2.Artifact]) -> str:
    """The base model's name on a hub; "" when it came from elsewhere."""
    for artifact in lineage[1:]:
        source = str(_metadata(artifact).get("source", ""))
        if artifact.kind == "model" and source.startswith(("hf:", "ms:")):
            return source.partition(":")[2].partition("@")[0]
    return ""


def _metadata(artifact: artifact_pb2.Artifact) -> dict[str, Any]:
    plain = _whole(json_format.MessageToDict(artifact.metadata))
    return plain if isinstance(plain, dict) else {}


def _spec(artifact: artifact_pb2.Artifact) -> dict[str, Any]:
    plain = _whole(json_format.MessageToDict(artifact.created_by.spec))
    return plain if isinstance(plain, dict) else {}


def _whole(value: Any) -> Any:
    """A Struct knows neither whole numbers nor an order of its fields."""
    if isinstance(value, dict):
        return {key: _whole(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _fenced(text: str, language: str) -> str:
    """A block of code that nothing inside can end."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100).rstrip()
