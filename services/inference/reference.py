"""What a model says at fixed texts when transformers computes it: the yardstick of the parity probe.

    python -m services.inference.reference --model DIR --output FILE [--dtype float32] [--digest SHA256]

Runs in a process of its own, on the CPU, never through the engine that it is to judge. For each position: the token
that transformers finds most likely, the next one, how far apart they are, and the log-probability of the forced token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from services.common.errors import FabrictuneError, FailedPrecondition, InvalidData
from services.common.programs import TORCH_PROGRAM

PROMPTS_VERSION = 1
"""Raise it with every change of PROMPTS: references of another version are computed again."""

Conversation = tuple[tuple[str, str], ...]
"""(role, content) each; one of the role "text" is plain text."""

PROMPTS: tuple[Conversation, ...] = (
    (
        ("system", "You are a helpful assistant."),
        ("user", "What is the capital of France?"),
        ("assistant", "The capital of France is Paris. It lies on the river Seine."),
    ),
    (
        (
            "system",
            "# Tools\n\n## You have the following tools:\n\nget_weather: get_weather API. The weather now. Parameters: "
            '[{"name": "location", "description": "a city", "required": true, "schema": {"type": "string"}}]\n\n'
            "Action: The name of the tool, must be one of [get_weather]\nAction Input: Tool input\n",
        ),
        ("user", "(You can use tools: [get_weather])How is the weather in Berlin?"),
        ("assistant", 'Action: get_weather\nAction Input: {"location": "Berlin"}\n'),
    ),
    (
        ("system", "# 工具\n\n## 你拥有如下工具：\n\namap_weather: 查询天气"),
        ("user", "(。你可以使用工具：[amap_weather])朝阳区天气怎样？"),
        ("assistant", 'Action: amap_weather\nAction Input: {"location": "朝阳区"}\n'),
    ),
    (
        (
            "text",
            "The water cycle moves water between the oceans, the air and the land. The sun heats the sea, water rises "
            "as vapour, cools, and falls again as rain or snow. 1, 2, 3, 4, 5, 6, 7, 8, 9. def add(a, b): return a + b",
        ),
    ),
)
"""Conversations like those that are served: a chat, AgentFabric's prompts in English and Chinese, plain text."""


@dataclass(frozen=True)
class ForcedText:
    """One text of n tokens. The four lists have n - 1 entries: entry i is about token i + 1, given tokens 0…i."""

    tokens: tuple[int, ...]
    top: tuple[int, ...]
    second: tuple[int, ...]
    margin: tuple[float, ...]
    """log p(top) - log p(second), nats."""
    logprobs: tuple[float, ...]
    """log p of the token that really follows, nats."""


@dataclass(frozen=True)
class Reference:
    """A model's answers at PROMPTS."""

    model_digest: str
    """Of the model artifact."""
    dtype: str
    prompts_version: int
    versions: dict[str, str]
    sequences: tuple[ForcedText, ...]


def reference_key(model_digest: str, dtype: str) -> str:
    """Where the object store keeps it."""
    return f"references/{model_digest}/{dtype}.json"


def reference_to_json(reference: Reference) -> dict[str, Any]:
    """Plain JSON, as stored beside the artifact."""
    return asdict(reference)


def reference_from_json(plain: dict[str, Any]) -> Reference | None:
    """The stored reference, or None when it is of another version of PROMPTS. Raises InvalidData."""
    try:
        if plain["prompts_version"] != PROMPTS_VERSION:
            return None
        sequences = tuple(ForcedText(**{k: tuple(v) for k, v in s.items()}) for s in plain["sequences"])
        return Reference(**{**plain, "sequences": sequences})
    except (KeyError, TypeError) as error:
        raise InvalidData(
            f"a stored parity reference cannot be read ({error}); delete it and it is computed again"
        ) from None


def encode_prompts(tokenizer: Any) -> list[list[int]]:
    """PROMPTS as token ids, by the model's chat template where it has one."""
    encoded = []
    for turns in PROMPTS:
        if turns[0][0] == "text" or not getattr(tokenizer, "chat_template", None):
            text = "\n".join(content for _, content in turns)
        else:
            text = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
        encoded.append([int(token) for token in tokenizer(text)["input_ids"]][:160])
    return [tokens for tokens in encoded if len(tokens) > 1]


def compute_reference(model: Path, digest: str, dtype: str, trust_remote_code: bool = False) -> Reference:
    """Run the model over PROMPTS with transformers. Raises InvalidData when it cannot be loaded."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        network = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InvalidData(f"transformers cannot load the model in {model}: {error}") from None
    network.eval()
    sequences = []
    with torch.inference_mode():
        for tokens in encode_prompts(tokenizer):
            logits = network(torch.tensor([tokens])).logits[0, :-1].float()
            best = torch.log_softmax(logits, dim=-1)
            values, ids = best.topk(2, dim=-1)
            forced = best.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
            sequences.append(
                ForcedText(
                    tokens=tuple(tokens),
                    top=tuple(ids[:, 0].tolist()),
                    second=tuple(ids[:, 1].tolist()),
                    margin=tuple(round(v, 6) for v in (values[:, 0] - values[:, 1]).tolist()),
                    logprobs=tuple(round(v, 6) for v in forced.tolist()),
                )
            )
    versions = {name: metadata.version(name) for name in ("transformers", "torch")}
    return Reference(digest, dtype, PROMPTS_VERSION, versions, tuple(sequences))


async def run_reference(
    model: Path, digest: str, dtype: str, output: Path, trust_remote_code: bool = False
) -> Reference:
    """Compute it in another process; cancelling ends that too. Raises FailedPrecondition with the end of its log."""
    argv = ["-m", "services.inference.reference", "--model", str(model), "--output", str(output)]
    argv += ["--dtype", dtype, "--digest", digest, *(["--trust-remote-code"] if trust_remote_code else [])]
    env = {**os.environ, **TORCH_PROGRAM}
    root = Path(__file__).parents[2]
    child = await asyncio.create_subprocess_exec(
        sys.executable, *argv, env=env, cwd=root, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        _, log = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode:
        tail = log.decode(errors="replace").strip()[-1500:]
        raise FailedPrecondition(
            f"the parity reference of {model} could not be computed (exit code {child.returncode}; -9 often means "
            f"too little memory):\n{tail}"
        )
    reference = reference_from_json(json.loads(await asyncio.to_thread(output.read_text)))
    assert reference is not None
    return reference


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the process; the exit code is that of the error."""
    parser = argparse.ArgumentParser(prog="python -m services.inference.reference", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--digest", default="")
    parser.add_argument("--trust-remote-code", action="store_true")
    args = parser.parse_args(argv)
    try:
        reference = compute_reference(args.model, args.digest, args.dtype, args.trust_remote_code)
    except FabrictuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    draft = args.output.with_suffix(".tmp")
    draft.write_text(json.dumps(reference_to_json(reference)))
    draft.replace(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
