"""A question as a request, in the two ways in which a model is asked for tool calls.

"prompt": AgentFabric's text, as it is trained; results return where the row had them. "tools": the OpenAI way, `tools=[…]` and
a plain question, so the server prompts (and, ours does, constrains) as it likes and answers with `tool_calls`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.common.fabric import INSTRUCTIONS, render_result
from services.evaluation.metrics import find_calls
from services.evaluation.questions import Answer, Question, Result

# What modelscope-agent 0.7.1 sends with every request (agents/role_play.py).
STOP = ("Observation:", "Observation:\n")
_NOT_A_NAME = re.compile(r"[^a-zA-Z0-9_-]")


@dataclass(frozen=True)
class Wire:
    """How a target is asked."""

    tools: bool = False
    """With `tools=`."""
    ours: bool = True
    """It is one of our revisions: it takes tools of any name, and goes on with an assistant's turn."""

    def body(self, chain: Sequence[Question], number: int, answers: Mapping[str, Answer]) -> dict[str, Any]:
        """The request for the chain's question `number`; answers: by id, those to the questions before it at least."""
        steps = [_take_step(q.after, q, answers) for q in chain[1 : number + 1] if q.after is not None]
        return self._with_tools(chain[0], steps) if self.tools else self._with_prompt(chain[0], steps)

    def read_name(self, question: Question, name: str) -> str:
        """A tool's own name, of the one that the wire has."""
        return {self._name(own): own for own in _names(question)}.get(name, name)

    def _with_prompt(self, first: Question, steps: Sequence[_Step]) -> dict[str, Any]:
        messages = [dict(m) for m in first.messages]
        text = "".join(step.text + render_result(step.result.observation) for step in steps)
        if steps and steps[0].result.in_turn and self.ours:
            # Fields of vLLM; another server takes the user's turn, where AgentFabric itself puts results.
            turn = [*messages, {"role": "assistant", "content": text}]
            return {"messages": turn, "stop": STOP, "continue_final_message": True, "add_generation_prompt": False}
        messages[-1]["content"] += text
        return {"messages": messages, "stop": STOP}

    def _with_tools(self, first: Question, steps: Sequence[_Step]) -> dict[str, Any]:
        messages: list[dict[str, Any]] = strip_prompt(first)
        for number, step in enumerate(steps):
            name, arguments = step.call
            function = {"name": self._name(name), "arguments": arguments}
            call = {"id": f"call_{number}", "type": "function", "function": function}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": f"call_{number}", "content": step.result.observation})
        tools = [
            {**tool, "function": {**tool["function"], "name": self._name(tool["function"]["name"])}}
            for tool in first.tools
        ]
        return {"messages": messages, "tools": tools}

    def _name(self, name: str) -> str:
        """OpenAI's own API takes letters, digits, _ and - only."""
        return name if self.ours else _NOT_A_NAME.sub("_", name)[:64]


@dataclass(frozen=True)
class _Step:
    """A call that was made, and its result."""

    text: str
    call: tuple[str, str]
    result: Result


def _take_step(result: Result, question: Question, answers: Mapping[str, Answer]) -> _Step:
    """The model's own call if it is the row's tool, else the row's."""
    own = answers[result.question]
    wanted = find_calls(Answer("", result.said, "", 0, 0))
    called = find_calls(own)
    if called and wanted and called[0][0] == wanted[0][0]:
        return _Step(own.text, called[0], result)
    return _Step(result.said, wanted[0], result)


def strip_prompt(question: Question) -> list[dict[str, Any]]:
    """AgentFabric's prompt without its tools: the role as system message, and the question without its prefix."""
    messages = [dict(m) for m in question.messages]
    if messages[0]["role"] == "system":
        role = _find_role(messages[0]["content"])
        messages = [{"role": "system", "content": role}, *messages[1:]] if role else messages[1:]
    names = re.escape(",".join(_names(question)))
    prefix = rf"\([^()\n]*?(?:。你可以使用工具：|\. you can use tools: )\[{names}\][^()\n]*\)"
    messages[-1]["content"] = re.sub(rf"^{prefix}", "", messages[-1]["content"], count=1)
    return messages


def _find_role(system: str) -> str:
    """The instruction in AgentFabric's system prompt; all of another prompt."""
    for text in INSTRUCTIONS.values():
        head, end = text.split("{role}")
        _, found, rest = system.rpartition(head)
        if found and rest.endswith(end):
            return rest.removesuffix(end)
    return system


def _names(question: Question) -> list[str]:
    return [str(tool["function"]["name"]) for tool in question.tools]
