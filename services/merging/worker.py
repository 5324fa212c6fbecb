"""The merge worker: weights by the chosen engine, everything else carried over from the base model."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.common.reporter import Progress, Reporter
from services.common.stage import Stage
from services.merging.adapter import read_adapter
from services.merging.merge import merge_folder
from services.merging.peft_engine import merge_with_peft
from services.merging.spec import Spec

# What a model folder holds beside its weights; the adapter's copy wins where it has one.
CARRIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "*.py")
NOT_CARRIED = frozenset({"adapter_config.json", "training_args.json", "manifest.json"})
FROM_ADAPTER = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)


def run(spec: Spec, inputs: Mapping[str, Path], output: Path, reporter: Reporter) -> dict[str, Any]:
    """Merge inputs["adapter"] into inputs["base_model"]."""
    begin = time.monotonic()
    base, adapter = inputs["base_model"], read_adapter(inputs["adapter"])
    told: dict[str, Any] = {
        "engine": spec.engine,
        "rank": adapter.config.get("r"),
        "merged_tensors": len(adapter.pairs),
    }
    if spec.engine == "peft":
        merge_with_peft(base, adapter.folder, output)
    else:
        done = merge_folder(
            base, adapter, output, lambda n, total: reporter.progress(Progress("tensors", n, total, "merging"))
        )
        told |= {"tensors": done.tensors, "bytes": done.bytes}
    _carry(base, adapter.folder, output)
    told["seconds"] = round(time.monotonic() - begin, 2)
    reporter.log(f"merged {len(adapter.pairs)} weights in {told['seconds']} s ({spec.engine})")
    return told


def _carry(base: Path, adapter: Path, output: Path) -> None:
    for folder, patterns in ((base, CARRIED), (adapter, FROM_ADAPTER)):
        for pattern in patterns:
            for file in folder.glob(pattern):
                if file.name not in NOT_CARRIED:
                    shutil.copyfile(file, output / file.name)


STAGE: Stage[Spec] = Stage(
    kind="merging",
    collection="mergeJobs",
    output_kind="model",
    output_collection="models",
    spec=Spec,
    inputs=lambda spec: {"base_model": spec.base_model, "adapter": spec.adapter},
    run=run,
    versions=("numpy", "ml_dtypes"),
)

if __name__ == "__main__":
    from services.common.worker import main

    main(STAGE)
