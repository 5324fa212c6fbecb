"""A question as a request, in the two ways in which a model is asked for tool calls.

"prompt": AgentFabric's text, as it is trained; results return where the row had them. "tools": the OpenAI way, `tools=[…]` and
a plain question, so the server prompts (and, ours does, constrains) as it likes and answers with `tool_calls`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from services.common.fabric import INSTRUCTIONS, render_result
from services.evaluation.metrics import find_calls, parse_arguments
from services.evaluation.questions import Answer, Question, Result

# What modelscope-agent 0.7.1 sends with every request (agents/role_play.py).
STOP = ("Observation:", "Observation:\n")
# OpenAI's own API takes letters, digits, _ and - in tools' names, at most 64.
_NAME, _NOT_IN_NAMES, LONGEST_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}"), re.compile(r"[^a-zA-Z0-9_-]"), 64


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
        return {wire: own for own, wire in self._wire_names(_names(question)).items()}.get(name, name)

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
        # A row may call what it does not list.
        names = self._wire_names([*_names(first), *(step.call[0] for step in steps)])
        for number, step in enumerate(steps):
            name, arguments = step.call
            function = {"name": names[name], "arguments": arguments}
            call = {"id": f"call_{number}", "type": "function", "function": function}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": f"call_{number}", "content": step.result.observation})
        tools = [
            {**tool, "function": {**tool["function"], "name": names[str(tool["function"]["name"])]}}
            for tool in first.tools
        ]
        return {"messages": messages, "tools": tools}

    def _wire_names(self, own: Sequence[str]) -> dict[str, str]:
        """Own name → the wire's, which are numbered where they would be the same."""
        wire = {name: name for name in own if self.ours or _NAME.fullmatch(name)}
        for name in own:
            if name not in wire:
                wire[name] = _make_name(name, wire.values())
        return wire


@dataclass(frozen=True)
class _Step:
    """A call that was made, and its result."""

    text: str
    call: tuple[str, str]
    result: Result


def _make_name(own: str, taken: Collection[str]) -> str:
    """A name that the wire takes, and that is not taken."""
    plain = _NOT_IN_NAMES.sub("_", own)
    names = (f"{plain[: LONGEST_NAME - len(end)]}{end}" for end in ("" if n == 1 else f"_{n}" for n in count(1)))
    return next(name for name in names if name not in taken)


def _take_step(result: Result, question: Question, answers: Mapping[str, Answer]) -> _Step:
    """The model's own call if it is the row's tool with arguments that can be read, else the row's.

    Other servers refuse a conversation with a call whose arguments are no JSON object.
    """
    own = answers[result.question]
    wanted = find_calls(Answer("", result.said, "", 0, 0))
    called = find_calls(own)
    if called and wanted and called[0][0] == wanted[0][0] and parse_arguments(called[0][1]) is not None:
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
