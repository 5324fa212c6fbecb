"""`fabrictune convert`, `train`, `merge`, `evaluate`: one stage, as a job on a server or, with --output, right here.

With `--output DIR` nothing but folders is read and written and no server is needed. Without it the command starts a job
on the endpoint and follows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fabrictune.cli.artifacts import push_with_bar
from fabrictune.cli.context import console, errors, print_json, print_message, settings
from fabrictune.cli.estimate import estimate_training, show_estimate
from fabrictune.cli.jobs import raise_failure
from fabrictune.cli.preview import preview_sources, show_preview
from fabrictune.cli.progress import StageListener, find_with_bar, follow, new_progress
from fabrictune.cli.specs import (
    name_adapters,
    name_sources,
    parse_range,
    parse_setting,
    read_section,
    read_spec,
    read_template,
)
from fabrictune.errors import ApiError
from fabrictune.rows import push_rows
from fabrictune.sources import is_artifact, public_uri

if TYPE_CHECKING:
    from fabrictune.client import Jobs

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write into this new folder, in this process, without a server.")
]
JobId = Annotated[str, typer.Option("--id", help="The job's id, and that of what it makes; made up when absent.")]
SpecFile = Annotated[
    Path | None, typer.Option("--spec", help="YAML with the stage's spec; the other options win over it.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check the spec and the inputs, and print the plan; start nothing.")
]
Detach = Annotated[bool, typer.Option("--detach", "-d", help="Start the job and return.")]


def convert(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Rows: files, folders, datasets/ID, https://…, s3://…, hf:ORG/NAME, ms:ORG/NAME, or ms-agent, ms-bench, … "
            "(docs/datasets.md); those of --spec when absent."
        ),
    ] = None,
    output: Output = None,
    job_id: JobId = "",
    form: Annotated[
        str, typer.Option("--format", help="Of all these sources: ms_agent, agentfabric, openai or chat.")
    ] = "",
    layout: Annotated[str, typer.Option(help="split (results return in the user turn), inline, or both.")] = "",
    distractors: Annotated[str, typer.Option(help="MIN:MAX tools of other rows added to each prompt.")] = "",
    seed: Annotated[int | None, typer.Option(help="Of the order, the split and the distractors.")] = None,
    preview: Annotated[
        int, typer.Option(min=0, max=50, help="Show so many rows of each source before and after; convert nothing.")
    ] = 0,
    spec_file: SpecFile = None,
    dry_run: DryRun = False,
    detach: Detach = False,
) -> None:
    """Turn rows into training rows in AgentFabric's prompt form.

    Every row is converted or refused by name (rejects.jsonl); tools are split, so that none is in two parts.
    """
    spec = read_spec(spec_file)
    spec["sources"] = name_sources(sources or [], {"format": form, "layout": layout}, spec)
    folder = spec_file.parent if spec_file and not sources else Path()
    if distractors:
        spec["distractors"] = parse_range(distractors)
    if seed is not None:
        spec["seed"] = seed
    if preview:
        show_preview(preview_sources(spec, folder, preview))
        return
    if output is not None:
        paths = {f"sources/{i}": _find_here(s["uri"], folder) for i, s in enumerate(spec["sources"])}
        spec["sources"] = [{**s, "uri": public_uri(s["uri"])} for s in spec["sources"]]
        _run_here("conversion", spec, paths, output, dry_run)
        return
    with settings().connect() as client:
        spec["sources"] = [
            {**s, "uri": push_rows(client, s["uri"], push_with_bar, folder, find_with_bar)} for s in spec["sources"]
        ]
        _start(client.conversion, spec, job_id, dry_run, detach)


def train(
    dataset: Annotated[str, typer.Argument(help="datasets/ID, or a folder with train.jsonl.")],
    model: Annotated[str, typer.Option("--model", help="The base model: models/ID, or a folder.")],
    preset: Annotated[str, typer.Option(help="A named set of ms-swift arguments.")] = "",
    argument: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE: an ms-swift argument that overrides the preset's.")
    ] = None,
    output: Output = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs on each node; 0 is the CPU.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Machines.")] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Say memory, time and cost; start nothing.")] = False,
    gpu: Annotated[str, typer.Option(help="For --estimate: a100-80gb, h100-80gb, l4, …, or 24GiB.")] = "",
    price: Annotated[float, typer.Option(min=0, help="For --estimate: of one GPU for an hour.")] = 0.0,
    job_id: JobId = "",
    spec_file: SpecFile = None,
    dry_run: DryRun = False,
    detach: Detach = False,
) -> None:
    """Fine-tune a base model with ms-swift; the result is an adapter (or a model) with its loss curve."""
    spec = read_spec(spec_file)
    if preset:
        spec["preset"] = preset
    if argument:
        spec["arguments"] = {**read_section(spec, "arguments"), **dict(parse_setting(a) for a in argument)}
    if asked := {k: v for k, v in {"gpus": gpus, "nodes": nodes}.items() if v is not None}:
        spec["resources"] = {**read_section(spec, "resources"), **asked}
    if estimate:
        show_estimate(estimate_training(spec, dataset, model, gpu, price))
        return
    if output is not None:
        spec |= {"dataset": "datasets/local", "base_model": "models/local"}
        _run_here("training", spec, {"dataset": Path(dataset), "base_model": Path(model)}, output, dry_run)
        return
    spec |= {"dataset": dataset, "base_model": model}
    with settings().connect() as client:
        _start(client.training, spec, job_id, dry_run, detach)


def merge(
    model: Annotated[str, typer.Option("--model", help="The base model: models/ID, or a folder.")],
    adapter: Annotated[
        list[str], typer.Option("--adapter", help="adapters/ID, or a folder. Give several to merge them as one.")
    ],
    weight: Annotated[
        list[float] | None, typer.Option("--weight", help="Of each adapter, in their order; may be negative.")
    ] = None,
    combination: Annotated[
        str, typer.Option("--combine", help="How several become one: linear (equal ranks), or cat (any ranks).")
    ] = "",
    engine: Annotated[str, typer.Option(help="stream (no torch, bounded memory), peft or swift.")] = "",
    chat_template: Annotated[
        str, typer.Option(help="Of the merged model: base, chatml, or a Jinja file; the adapter's when absent.")
    ] = "",
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Merge from store to store, without a copy of the model on a worker's disk."),
    ] = False,
    output: Output = None,
    job_id: JobId = "",
    dry_run: DryRun = False,
    detach: Detach = False,
) -> None:
    """Merge an adapter, or several with weights, into their base model."""
    weights = weight or []
    if weights and len(weights) != len(adapter):
        raise ApiError(
            f"{len(adapter)} --adapter need as many --weight, not {len(weights)}, or none", "INVALID_ARGUMENT"
        )
    told = {"engine": engine, "combination": combination, "chat_template": read_template(chat_template)}
    spec: dict[str, Any] = {key: value for key, value in told.items() if value}
    if output is not None:
        if stream:
            raise ApiError("--stream is from store to store; --output writes a folder here", "INVALID_ARGUMENT")
        local = name_adapters([f"adapters/local-{i}" for i in range(len(adapter))], weights)
        roles = ["adapter"] if "adapter" in local else [f"adapters/{i}" for i in range(len(adapter))]
        folders = {role: Path(folder) for role, folder in zip(roles, adapter, strict=True)}
        inputs = {"base_model": Path(model), **folders}
        _run_here("merging", spec | {"base_model": "models/local", **local}, inputs, output, dry_run)
        return
    spec |= {"base_model": model, **name_adapters(adapter, weights), **({"stream": True} if stream else {})}
    with settings().connect() as client:
        _start(client.merging, spec, job_id, dry_run, detach)


def evaluate(
    dataset: Annotated[
        str, typer.Argument(help="datasets/ID, or a folder with test.jsonl and tools.jsonl; may be absent with --bfcl.")
    ] = "",
    address: Annotated[str, typer.Option(help="An OpenAI-compatible address, such as http://127.0.0.1:8480/v1.")] = "",
    model: Annotated[str, typer.Option("--model", help="What to send as model to that address.")] = "",
    revision: Annotated[str, typer.Option(help="deployments/ID/revisions/ID instead of an address.")] = "",
    baseline: Annotated[str, typer.Option(help="reports/ID, or a report's folder, to compare with.")] = "",
    label: Annotated[str, typer.Option(help="Column name in the report.")] = "",
    limit: Annotated[int, typer.Option(help="At most so many prompts; 0 takes all.")] = 0,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="held_out, multi_turn (on after each tool's result), latency; may be repeated."),
    ] = None,
    bfcl: Annotated[str, typer.Option(help="Files in BFCL's format: datasets/ID, or a folder.")] = "",
    tools: Annotated[
        bool, typer.Option("--tools", help="Ask with OpenAI's `tools`, not AgentFabric's prompt.")
    ] = False,
    constrained: Annotated[
        bool, typer.Option("--constrained", help="Ask once more with `tools`, as one more column.")
    ] = False,
    output: Output = None,
    job_id: JobId = "",
    spec_file: SpecFile = None,
    dry_run: DryRun = False,
    detach: Detach = False,
) -> None:
    """Ask a served model the held-out prompts and score its tool calls.

    More models beside it (`targets`), thresholds (`gate`) and comparisons (`not_worse`) are told in --spec: docs/evaluation.md.
    """
    spec = read_spec(spec_file)
    target = {"label": label, "revision": revision, "address": address, "model": model, "tools": tools}
    spec["target"] = {**read_section(spec, "target"), **{k: v for k, v in target.items() if v}}
    given = {"limit": limit, "suites": suite, "constrained": constrained}
    spec |= {key: value for key, value in given.items() if value}
    options = {"dataset": dataset, "bfcl": bfcl, "baseline": baseline}
    inputs = {role: str(option or spec.get(role) or "") for role, option in options.items()}
    if output is not None:
        paths = {role: Path(path) for role, path in inputs.items() if path}
        spec |= {role: f"{'reports' if role == 'baseline' else 'datasets'}/local" for role in paths}
        comparisons = spec.get("not_worse")
        for number, comparison in enumerate(comparisons if isinstance(comparisons, list) else ()):
            if isinstance(comparison, dict) and str(comparison.get("than", "")).startswith("reports/"):
                paths[f"compared/{number}"] = Path(comparison["than"])
        _run_here("evaluation", spec, paths, output, dry_run)
        return
    spec |= {role: name for role, name in inputs.items() if name}
    with settings().connect() as client:
        _start(client.evaluation, spec, job_id, dry_run, detach)


def _find_here(uri: str, folder: Path) -> Path:
    if is_artifact(uri) and not (folder / uri).exists():
        raise ApiError(
            f"{uri} is on a server, and --output works without one: `fabrictune artifacts pull {uri} FOLDER` first",
            "INVALID_ARGUMENT",
        )
    return find_with_bar(uri, folder).path


def _start(api: Jobs, spec: Mapping[str, Any], job_id: str, dry_run: bool, detach: bool) -> None:
    job = api.create(spec, job_id, validate_only=dry_run)
    if dry_run:
        print_message(job.plan)
        return
    if detach:
        print_message(job)
        return
    execution = follow(job.name, api.watch(job.name))
    raise_failure(job.name, execution)
    if settings().json:
        print_message(api.get(job.name))
    else:
        console.print(f"[green]✓[/] {job.name} made [bold]{api.get(job.name).output}[/]", highlight=False)


def _run_here(kind: str, spec: Mapping[str, Any], inputs: Mapping[str, Path], output: Path, dry_run: bool) -> None:
    from fabrictune import local

    if dry_run:
        print_message(local.plan_stage(kind, spec, inputs, output))
        return
    with new_progress(errors) as display:
        metadata = local.run_stage(kind, spec, inputs, output, StageListener(display, kind))
    if settings().json:
        print_json({"output": str(output), "metadata": metadata})
    else:
        console.print(f"[green]✓[/] wrote [bold]{output}[/]", highlight=False)
