"""Runs modelscope-agent's RolePlay on cases from stdin, in a venv of its own; test_conversion_roleplay.py starts it.

Two things are put right from outside, no file of the package is edited: its memory package imports llama-index 0.10 and
langchain, of which RolePlay needs nothing but the base class; and its own tools load data when they are made, so ours are
registered before RolePlay looks for any.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any


def import_role_play() -> tuple[Any, Any]:
    """(the module of RolePlay, the module of tools) without the packages that only memories need."""
    found = find_spec("modelscope_agent")
    assert found is not None and found.origin is not None
    memory: Any = ModuleType("modelscope_agent.memory")
    memory.__path__ = [str(Path(found.origin).parent / "memory")]
    sys.modules[memory.__name__] = memory
    memory.Memory = import_module("modelscope_agent.memory.base").Memory
    return import_module("modelscope_agent.agents.role_play"), import_module("modelscope_agent.tools.base")


def main() -> None:
    """Run every case against the server named by the only argument; prints what RolePlay said, a JSON list."""
    agents, tools = import_role_play()
    said = []
    for case in json.load(sys.stdin):
        functions = []
        for told in case["tools"]:
            members = {key: told[key] for key in ("name", "description", "parameters")}
            members["call"] = lambda self, params, result=told["result"], **_: result
            tools.register_tool(told["name"])(type("Tool", (tools.BaseTool,), members))
            functions.append({told["name"]: {told["name"]: {"schema": told["schema"]}}})
        model = {"model": "qwen-7b-chat", "model_server": "openai", "api_base": sys.argv[1], "support_stream": False}
        bot = agents.RolePlay(function_list=functions, llm=model, instruction=case["role"])
        said.append("".join(bot.run(case["query"])))
    print(json.dumps(said))


if __name__ == "__main__":
    main()
