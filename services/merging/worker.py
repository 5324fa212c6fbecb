"""The merge worker: weights by the chosen engine, everything else carried over from the base model and the adapter."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.common.reporter import Progress, Reporter
from services.common.stage import Stage
from services.merging.adapter import read_adapter
from services.merging.adapter_config import load_config
from services.merging.carried import Files, carry
from services.merging.folder import find_weights, merge_folder, plan_folder
from services.merging.mixture import Mixture
from services.merging.peft_engine import merge_with_peft
from services.merging.plan import Plan
from services.merging.spec import Spec
from services.merging.swift_engine import merge_with_swift, plan_swift

if TYPE_CHECKING:
    from services.common.remote import RemoteArtifact, RemoteDraft


def run(spec: Spec, inputs: Mapping[str, Path], output: Path, reporter: Reporter) -> dict[str, Any]:
    """Merge the adapters among the inputs into inputs["base_model"]."""
    begin = time.monotonic()
    base, folders = inputs["base_model"], [inputs[role] for role in spec.adapter_roles]
    told = _describe(spec, [load_config(folder) for folder in folders])
    find_weights(base)
    plan: Plan | None = None
    if spec.engine == "stream":
        mixture = Mixture([read_adapter(folder) for folder in folders], spec.weights, spec.combination)
        merged = merge_folder(base, mixture, output, _progress(reporter))
        plan = merged.plan
        told |= {"merged_tensors": len(plan.steps), "tensors": plan.tensors, "bytes": plan.size}
        told["weights_digest"] = merged.digest
    elif spec.engine == "peft":
        merge_with_peft(base, folders, spec.weights, spec.combination, output)
    else:
        merge_with_swift(base, folders[0], output)
    for name, content in carry(_files(base), _files(folders[0]), spec.chat_template, plan).items():
        if spec.engine == "stream" or not _is_engines_own(name, output):
            (output / name).write_bytes(content)
    return _conclude(told, begin, reporter)


def check(spec: Spec, inputs: Mapping[str, Path]) -> None:
    """Raises InvalidData when the adapters among the inputs cannot be merged into inputs["base_model"]."""
    base, folders = inputs["base_model"], [inputs[role] for role in spec.adapter_roles]
    for folder in folders:
        load_config(folder)
    find_weights(base)
    plan: Plan | None = None
    if spec.engine == "stream":
        plan = plan_folder(base, Mixture([read_adapter(f) for f in folders], spec.weights, spec.combination))
    elif spec.engine == "swift":
        plan_swift(base, folders[0], Path())
    carry(_files(base), _files(folders[0]), spec.chat_template, plan)


def stream(spec: Spec, inputs: Mapping[str, RemoteArtifact], draft: RemoteDraft, reporter: Reporter) -> dict[str, Any]:
    """The same from the object store to the object store: of the base, no more than some pieces is ever here."""
    from services.merging.remote import merge_remote  # here, for merges on folders need no client of the object store

    begin = time.monotonic()
    base, folders = inputs["base_model"], [inputs[role].fetch() for role in spec.adapter_roles]
    mixture = Mixture([read_adapter(folder) for folder in folders], spec.weights, spec.combination)
    plan = merge_remote(base, mixture, draft, _progress(reporter))
    carried = carry((base.sizes, base.read), _files(folders[0]), spec.chat_template, plan)
    for name, content in carried.items():
        draft.write(name, len(content), iter([content]))
    told = {**_describe(spec, [load_config(folder) for folder in folders]), "merged_tensors": len(plan.steps)}
    told |= {"tensors": plan.tensors, "bytes": plan.size, "streamed": True}
    return _conclude(told, begin, reporter)


def _describe(spec: Spec, configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    told: dict[str, Any] = {"engine": spec.engine, "rank": configs[0].get("r")}
    if spec.adapters:
        told["combination"] = spec.combination
        told["adapters"] = [{"adapter": a.adapter, "weight": a.weight} for a in spec.adapters]
    return told


def _is_engines_own(name: str, output: Path) -> bool:
    """Transformers writes a config and an index that fit the files that it makes."""
    return name.endswith(".index.json") or (
        name in ("config.json", "generation_config.json") and (output / name).exists()
    )


def _conclude(told: dict[str, Any], begin: float, reporter: Reporter) -> dict[str, Any]:
    told["seconds"] = round(time.monotonic() - begin, 2)
    reporter.log(f"merged in {told['seconds']} s ({told['engine']})")
    return told


def _progress(reporter: Reporter) -> Callable[[int, int], None]:
    return lambda done, total: reporter.progress(Progress("tensors", done, total, "merging"))


def _files(folder: Path) -> Files:
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return names, lambda name: (folder / name).read_bytes()


STAGE: Stage[Spec] = Stage(
    kind="merging",
    collection="mergeJobs",
    output_kind="model",
    output_collection="models",
    spec=Spec,
    inputs=lambda spec: spec.inputs,
    run=run,
    check=check,
    stream=lambda spec: stream if spec.stream else None,
    versions=("numpy", "ml_dtypes"),
)

if __name__ == "__main__":
    from services.common.worker import main

    main(STAGE)
