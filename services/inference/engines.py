"""The engines that a revision can be served by, each a table: which module, what it calls our fields, what else it is told.

`vllm` is vLLM's own OpenAI server. `swift` is `swift deploy`, as the recipe serves: ms-swift's server around the same vLLM.
It renders chats by the model's own template, too, but reads no tool calls, takes no grammar, and loads no adapters later.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from services.common.programs import MS_SWIFT

EngineName = Literal["vllm", "swift"]

SHUTDOWN_SECONDS = 10
"""Answers in flight may take so long when an engine is told to end, where no grace period says otherwise."""

TOOL_FLAGS = (
    "--enable-auto-tool-choice",
    "--tool-parser-plugin",
    "services.inference.tool_parser",
    "--tool-call-parser",
    "agentfabric",
)
"""How vLLM reads and constrains calls. engine_args may name another parser: the later of two flags wins."""

MODEL_TYPES: Mapping[str, str] = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
"""Architecture → what ms-swift 4.6 calls it, where several of its types share one and it cannot tell them apart. Which of
them it is changes nothing here: the chat template is the model's own."""


@dataclass(frozen=True)
class Engine:
    """One engine's argv."""

    module: str
    """Run with `python -m`."""
    flags: Mapping[str, str]
    """Our field → its flag."""
    always: tuple[str, ...]
    on_cpu: tuple[str, ...]
    owned: Mapping[str, str]
    """Flags that may not stand in engine_args, and what to do instead."""
    env: Mapping[str, str] = field(default_factory=dict)
    tools: bool = True
    """Whether a request may have `tools`."""
    adapters: bool = True
    """Whether adapters are loaded while it runs."""
    says_served_name: bool = True
    """Whether its answers call the model what it is served as; else the gateway puts the name there."""
    forced_tokens: bool = True
    """Whether it takes token ids as a prompt; else the parity probe asks it with conversations."""

    def argv(self, values: Mapping[str, str | int], on_cpu: bool, more: Sequence[str] = ()) -> list[str]:
        """The process. values: by our fields; more: last, so that they win."""
        words = [word for name, value in values.items() for word in (self.flags[name], str(value))]
        return [sys.executable, "-m", self.module, *words, *self.always, *(self.on_cpu if on_cpu else ()), *more]


_ADDRESS = {
    "--host": "the engine listens on loopback; clients use the gateway",
    "--port": "the cluster picks it",
    "--api-key": "arguments can be read by every user of the machine; the gateway checks tokens",
    "--ssl-keyfile": "TLS ends at the gateway",
    "--ssl-certfile": "TLS ends at the gateway",
    "--model": "set spec.model",
    "--served-model-name": "clients use the deployment's id",
}

ENGINES: Mapping[EngineName, Engine] = {
    "vllm": Engine(
        module="vllm.entrypoints.openai.api_server",
        flags={
            "model": "--model",
            "served_model_name": "--served-model-name",
            "host": "--host",
            "port": "--port",
            "dtype": "--dtype",
            "max_model_len": "--max-model-len",
            "max_concurrency": "--max-num-seqs",
            "gpus": "--tensor-parallel-size",
            # A node that is drained tells the pod to end while it answers; the rollout itself drains before it says so.
            "shutdown": "--shutdown-timeout",
        },
        always=(
            *("--uvicorn-log-level", "warning"),
            *TOOL_FLAGS,
        ),
        on_cpu=("--enforce-eager", "--block-size", "32"),
        owned={
            **_ADDRESS,
            "--tokenizer": "the tokenizer is part of spec.model",
            "--uds": "the gateway reaches the engine by TCP",
            "--root-path": "the gateway expects /v1",
            "--dtype": "set spec.dtype",
            "--max-model-len": "set spec.max_model_len",
            "--max-num-seqs": "set spec.max_concurrency",
            "--tensor-parallel-size": "set spec.resources.gpus",
            "-tp": "set spec.resources.gpus",
            "--enable-lora": "set spec.adapters or spec.lora.max_adapters",
            "--max-loras": "set spec.lora.max_adapters",
            "--max-cpu-loras": "set spec.lora.max_adapters",
            "--max-lora-rank": "set spec.lora.max_rank",
            "--lora-modules": "set spec.adapters",
            "--shutdown-timeout": "the cluster's grace period decides it (FABRICTUNE_ENGINE_GRACE_SECONDS)",
            "--config": "it would override flags unseen; name them here instead",
            "--hf-token": "arguments can be read by every user of the machine; models come from the artifact store",
        },
    ),
    "swift": Engine(
        module="swift.cli.deploy",
        flags={
            "model": "--model",
            "model_type": "--model_type",
            "served_model_name": "--served_model_name",
            "host": "--host",
            "port": "--port",
            "dtype": "--torch_dtype",
            "max_model_len": "--vllm_max_model_len",
            "max_concurrency": "--vllm_max_num_seqs",
            "gpus": "--vllm_tensor_parallel_size",
        },
        always=(
            *("--infer_backend", "vllm"),
            # The model's own chat template renders: what vLLM's server does, and what training wrapped turns in.
            *("--template", "dummy", "--template_backend", "jinja"),
            *("--load_args", "false"),
            # Prompts and answers would be in its log, and speed every 20 s.
            *("--verbose", "false", "--log_interval", "-1", "--log_level", "warning"),
        ),
        on_cpu=("--vllm_enforce_eager", "true", "--vllm_engine_kwargs", '{"block_size":32}'),
        owned={
            **_ADDRESS,
            "--torch-dtype": "set spec.dtype",
            "--vllm-max-model-len": "set spec.max_model_len",
            "--vllm-max-num-seqs": "set spec.max_concurrency",
            "--vllm-tensor-parallel-size": "set spec.resources.gpus",
            "--vllm-data-parallel-size": "make several revisions, or replicas of one",
            "--vllm-use-async-engine": "a server needs it",
            "--infer-backend": "only vLLM says how likely a prompt is, which the parity probe asks for",
            "--template": "the model's own chat template renders its prompts",
            "--template-backend": "the model's own chat template renders its prompts",
            "--adapters": "merge them, or use engine: vllm",
            "--hub-token": "arguments can be read by every user of the machine; models come from the artifact store",
            "--external-plugins": "it would run code that is in no artifact",
            "--custom-register-path": "it would run code that is in no artifact",
        },
        env=MS_SWIFT,
        tools=False,
        adapters=False,
        says_served_name=False,  # it says the folder's
        forced_tokens=False,
    ),
}


def model_type(config: Mapping[str, Any]) -> dict[str, str]:
    """What ms-swift must be told of a model by its config.json; empty where it knows."""
    known = MODEL_TYPES.get((config.get("architectures") or [""])[0])
    return {"model_type": known} if known else {}
