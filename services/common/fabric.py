"""AgentFabric's prompt, byte for byte, and the two ways in which a conversation reaches the model.

Conversion writes training rows with it, and inference the prompts of requests that bring `tools`: what is asked is what
was trained.
Source: modelscope-agent 0.7.1 and 0.7.2, llm/utils/function_call_with_raw_prompt.py, agents/role_play.py, tools/base.py.
"inline": the whole turn, tool result included, is the assistant's (DashScope's raw prompts). "split": the result returns in
the user's turn (any OpenAI server), so each call and each summary is a row of its own, ending in the assistant's turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import orjson

T = TypeVar("T")
CHINESE = re.compile(r"[\u4e00-\u9fff]")
URL_ZH = "，如果结果中出现url，请使用如下格式展示出来：![图片](url)"
URL_EN = " If the result contains url, please display it in the following format:![Image](URL)"
ANSWER_TAIL: Mapping[tuple[str, str], str] = {
    ("0.7.1", "zh"): URL_ZH,
    ("0.7.1", "en"): URL_EN,
    ("0.7.2", "zh"): "。如果结果中出现url，请严格遵循Observation中url的格式进行展示。",
    ("0.7.2", "en"): "",
}
TOOLS: Mapping[str, str] = {
    "zh": (
        "\n# 工具\n\n## 你拥有如下工具：\n\n{descs}\n\n"
        "## 当你需要调用工具时，请在你的回复中穿插如下的工具调用命令，可以根据需求调用零次或多次：\n\n"
        "工具调用\nAction: 工具的名称，必须是[{names}]之一\nAction Input: 工具的输入\n"
        "Observation: <result>工具返回的结果</result>\n"
        "Answer: 根据Observation总结本次工具调用返回的结果{tail}\n\n"
    ),
    "en": (
        "\n# Tools\n\n## You have the following tools:\n\n{descs}\n\n"
        "## When you need to call a tool, please intersperse the following tool command in your reply. "
        "You can call zero or more times according to your needs:\n\n"
        "Tool Invocation\nAction: The name of the tool, must be one of [{names}]\nAction Input: Tool input\n"
        "Observation: <result>Tool returns result</result>\n"
        "Answer: Summarize the results of this tool call based on Observation.{tail}\n\n"
    ),
}
INSTRUCTIONS: Mapping[str, str] = {
    "zh": "\n# 指令\n\n{role}\n\n请注意：你具有图像和视频的展示能力，也具有运行代码的能力，不要在回复中说你做不到。\n",
    "en": (
        "\n#Instructions\n\n{role}\n\nNote: you have the ability to display images and videos, "
        "as well as the ability to run code. Don't say you can't do it.\n"
    ),
}
TOOL_LINE: Mapping[str, str] = {
    "zh": "{name}: {name} API。{description} 输入参数: {parameters} Format the arguments as a JSON object.",
    "en": "{name}: {name} API. {description} Parameters: {parameters} Format the arguments as a JSON object.",
}
PREFIX: Mapping[str, str] = {"zh": "(。你可以使用工具：[{names}])", "en": "(. you can use tools: [{names}])"}
ROLES: Mapping[str, str] = {
    "en": "You are a helpful assistant. Call a tool when one of them fits the question; when none fits, say so.",
    "zh": "你是一个乐于助人的助手。有合适的工具时请调用工具；没有合适的工具时请直接说明。",
}
"""The role where neither a row nor a request tells one: an empty one must be neither trained nor asked."""
KNOWN_TOOLS, LONGEST_KNOWN_TOOL = 4096, 2048
"""What so many tools became is kept, of tools of at most so many characters: 10 MB of common ones, 25 MB at worst."""
FORBIDDEN_IN_NAMES = frozenset("\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
"""What ends a line, and so a tool's name."""


class Tool(NamedTuple):
    """A tool that a prompt lists."""

    name: str
    description: str
    parameters: str
    """A JSON schema of an object, `required` always present: JSON text in one line, separators ", " and ": "."""


class Call(NamedTuple):
    """One call in a turn."""

    name: str
    arguments: str
    """A JSON object: text in one line."""
    observation: str | None = None
    """The tool's result; None when the turn ends at the call."""
    lead: str = ""
    """What was said before it: before the first call, or about the result of the one before."""


class Turn(NamedTuple):
    """What an assistant did in one turn: calls, then an answer ("" when it stopped at a call)."""

    calls: tuple[Call, ...] = ()
    answer: str = ""


class Round(NamedTuple):
    """A question and the assistant's turn."""

    query: str
    """Without the prefix that names the tools."""
    turn: Turn
    prefix: str | None = None
    """What stood before the question in the source; None: as AgentFabric would put it for these tools."""


class Example(NamedTuple):
    """One training row."""

    messages: Sequence[Mapping[str, Any]]
    expected: tuple[Call, ...] | None
    """The call that its last turn makes (() when no tool fits); None: not to be scored."""


def remember_tools(act: Callable[[Tool], T]) -> Callable[[Tool], T]:
    """A function of a tool that keeps what it made of the last ones, where these are short: rows repeat their tools."""
    known = lru_cache(maxsize=KNOWN_TOOLS)(act)

    def recall(tool: Tool) -> T:
        return known(tool) if len(tool[2]) + len(tool[1]) < LONGEST_KNOWN_TOOL else act(tool)

    return wraps(act)(recall)


def language_of(query: str) -> str:
    """Say "zh" when a text has a Chinese character, else "en"; AgentFabric asks the query only."""
    # isascii() asks a flag, not the text.
    return "en" if query.isascii() or not CHINESE.search(query) else "zh"


def render_system(tools: Sequence[Tool], role: str, language: str, wording: str = "0.7.1") -> str:
    """The system prompt that RolePlay sends. role: the instruction's text."""
    head, middle, rest, end = cut_system(language, wording)
    descs = "\n\n".join([render_tool(tool) for tool in tools])
    return f"{head}{descs}{middle}{_names(tools)}{rest}{role}{end}"


@remember_tools
def render_tool(tool: Tool) -> str:
    """The line that describes a tool, in the language of its description."""
    name, description, parameters = tool
    of_name, before, between, end = _TOOL_LINE[language_of(description)]
    return f"{name}{of_name}{name}{before}{description}{between}{parameters}{end}"


def render_prefix(tools: Sequence[Tool], language: str) -> str:
    """What RolePlay puts before the last user message."""
    head, end = _PREFIX[language]
    return f"{head}{_names(tools)}{end}"


def render_call(call: Call) -> str:
    """A call as RolePlay's parser wants it: two lines, strict JSON in one line, no trailing blanks."""
    return f"Action: {call.name}\nAction Input: {call.arguments}\n"


def render_result(observation: str | None) -> str:
    """What RolePlay appends after a call."""
    return f"\nObservation: <result>{observation or ''}</result>\nAnswer:"


def render_transcript(turn: Turn) -> str:
    """A whole turn in one text, results inside: what AgentFabric keeps of it as history."""
    if not turn.calls:
        return turn.answer
    calls = "".join(_go_on(call, first=not n) + render_result(call.observation) for n, call in enumerate(turn.calls))
    return f"{calls} {turn.answer}"


def render_rows(
    layout: str, system: str | orjson.Fragment, tools: Sequence[Tool], rounds: Sequence[Round], language: str
) -> Iterator[Example]:
    """The training rows of a conversation. layout: "split" or "inline". rounds: (user's text, assistant's turn)."""
    history: list[dict[str, Any]] = [] if system == "" else [{"role": "system", "content": system}]
    own = render_prefix(tools, language)
    rows = RENDER_TURN[layout]
    last = len(rounds) - 1
    for number, (query, turn, prefix) in enumerate(rounds):
        yield from rows(history, (own if prefix is None else prefix) + query, turn)
        if number < last:
            # For later rounds this one is history: without the prefix, as one finished text, and not trained again.
            history.append({"role": "user", "content": query})
            history.append({"role": "assistant", "content": render_transcript(turn), "loss": False})


def render_request(system: str, tools: Sequence[Tool], rounds: Sequence[Round], language: str) -> list[dict[str, Any]]:
    """The messages of a request on RolePlay's wire: those of a "split" row before the turn that it trains.

    The last round is the one to go on with: its calls and their results, if any, stand in the user's turn.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}]
    last = len(rounds) - 1
    for number, (query, turn, _) in enumerate(rounds):
        asked = render_prefix(tools, language) + query if number == last else query
        if number == last and not turn.answer:
            calls = enumerate(turn.calls)
            asked += "".join(_say(call, first=not n) + render_result(call.observation) for n, call in calls)
            messages.append({"role": "user", "content": asked})
            continue
        messages.append({"role": "user", "content": asked})
        if turn.calls or turn.answer:
            messages.append({"role": "assistant", "content": render_transcript(turn)})
    return messages


def render_together(
    system: str | orjson.Fragment, tools: Sequence[Tool], rounds: Sequence[Round], language: str
) -> list[dict[str, Any]]:
    """One row with several questions over the same tools: each is answered by its first call, or by its answer."""
    prefix = render_prefix(tools, language)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}]
    for query, turn, _ in rounds:
        text = _say(turn.calls[0], first=True) if turn.calls else turn.answer
        messages += [{"role": "user", "content": prefix + query}, {"role": "assistant", "content": text}]
    return messages


def _split_rows(history: Sequence[Mapping[str, Any]], asked: str, turn: Turn) -> Iterator[Example]:
    for number, call in enumerate(turn.calls):
        text = _say(call, first=not number)
        messages = [*history, {"role": "user", "content": asked}, {"role": "assistant", "content": text}]
        # Only the first call answers the bare question.
        yield Example(messages, None if number else (call,))
        if call.observation is None:
            return
        asked += text + render_result(call.observation)
    if turn.answer:
        # After a result RolePlay's user turn ends in "Answer:", and the summary is a turn of its own, without a blank.
        messages = [*history, {"role": "user", "content": asked}, {"role": "assistant", "content": turn.answer}]
        yield Example(messages, None if turn.calls else ())


def _inline_rows(history: Sequence[Mapping[str, Any]], asked: str, turn: Turn) -> Iterator[Example]:
    pieces: list[Mapping[str, Any]] = [*history, {"role": "user", "content": asked}]
    before = len(pieces)
    for number, call in enumerate(turn.calls):
        pieces.append({"role": "assistant", "content": _go_on(call, first=not number), "loss": True})
        if call.observation is not None:
            # The tool's words, not the model's: never trained (formats of ms-swift 4.6: `loss` of a message).
            pieces.append({"role": "assistant", "content": render_result(call.observation), "loss": False})
    if turn.answer:
        pieces.append({"role": "assistant", "content": f" {turn.answer}" if turn.calls else turn.answer, "loss": True})
    if len(pieces) > before:
        yield Example(pieces, turn.calls[:1])


RENDER_TURN: Mapping[str, Callable[[Sequence[Mapping[str, Any]], str, Turn], Iterator[Example]]] = {
    "split": _split_rows,
    "inline": _inline_rows,
}
"""Layout → (messages before, user's text, assistant's turn) → the training rows of one round."""


def _say(call: Call, first: bool) -> str:
    """A call and what is said before it. After a result comes a summary first, be it an empty one."""
    if first:
        return f"{call.lead}\n{render_call(call)}" if call.lead else render_call(call)
    return f"{call.lead}\n\n{render_call(call)}"


def _go_on(call: Call, first: bool) -> str:
    """The same where it follows "Answer:" in one text."""
    return f" {_say(call, first)}" if call.lead and not first else _say(call, first)


def _names(tools: Sequence[Tool]) -> str:
    return ",".join([tool.name for tool in tools])


# Templates are cut at their places once: `replace` would also find a place in what stands in another one.
_PREFIX = {language: text.split("{names}") for language, text in PREFIX.items()}
_TOOL_LINE = {
    language: re.split(r"\{name\}|\{description\}|\{parameters\}", text)[1:] for language, text in TOOL_LINE.items()
}


def cut_prefix(language: str) -> list[str]:
    """The prefix's text before the tools' names, and after them."""
    return _PREFIX[language]


@cache
def cut_system(language: str, wording: str) -> list[str]:
    """The system prompt's text before the tools' lines, their names and the role, and after it."""
    whole = TOOLS[language].replace("{tail}", ANSWER_TAIL[wording, language]) + INSTRUCTIONS[language]
    return re.split(r"\{descs\}|\{names\}|\{role\}", whole)
