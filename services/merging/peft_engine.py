"""The other engine: peft's own merge_and_unload, with the whole model in memory. To compare with, or for odd adapters."""

from __future__ import annotations

from pathlib import Path


def merge_with_peft(base: Path, adapter: Path, output: Path) -> None:
    """Write base + adapter into `output` as safetensors."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=True).merge_and_unload(
        safe_merge=False
    )
    merged.save_pretrained(output)
