"""The engine peft: its own merge_and_unload, with the whole model in memory. To compare with, or for odd adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def merge_with_peft(
    base: Path, adapters: Sequence[Path], weights: Sequence[float] | None, combination: str, output: Path
) -> None:
    """Write base + adapters into `output` as safetensors. weights: as of add_weighted_adapter; None: one adapter as it is."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto", use_safetensors=True)
    adapted = peft.PeftModel.from_pretrained(model, adapters[0], adapter_name="0", autocast_adapter_dtype=True)
    if weights is not None:
        names = [str(i) for i in range(len(adapters))]
        for name, folder in zip(names[1:], adapters[1:], strict=True):
            adapted.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=True)
        adapted.add_weighted_adapter(names, list(weights), "mixture", combination_type=combination)
        adapted.set_adapter("mixture")
    adapted.merge_and_unload(safe_merge=False).save_pretrained(output)
