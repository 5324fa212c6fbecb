"""Why a row is refused: one table of codes, and the exception that carries one from where the fact is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

INVALID_JSON = "INVALID_JSON"
WRONG_ENCODING = "WRONG_ENCODING"
ROW_TOO_LARGE = "ROW_TOO_LARGE"
ROW_TOO_LONG = "ROW_TOO_LONG"
EMPTY_CONVERSATIONS = "EMPTY_CONVERSATIONS"
ROLE_ORDER = "ROLE_ORDER"
NO_SYSTEM_TURN = "NO_SYSTEM_TURN"
NOT_REACT_PROMPT = "NOT_REACT_PROMPT"
NOT_FABRIC_PROMPT = "NOT_FABRIC_PROMPT"
INVALID_TOOLS = "INVALID_TOOLS"
INVALID_APIS = "INVALID_APIS"
INVALID_PARAMETERS = "INVALID_PARAMETERS"
MISSING_PARAMETERS = "MISSING_PARAMETERS"
DUPLICATE_TOOL = "DUPLICATE_TOOL"
INVALID_TOOL_NAME = "INVALID_TOOL_NAME"
UNKNOWN_TOOL = "UNKNOWN_TOOL"
INVALID_ACTION_INPUT = "INVALID_ACTION_INPUT"
INCOMPLETE_TURN = "INCOMPLETE_TURN"
RESULT_TAG_IN_RESULT = "RESULT_TAG_IN_RESULT"
UNEXPECTED_TOOL_CALL = "UNEXPECTED_TOOL_CALL"

MAX_ROUNDS = 256
"""Each round of a conversation is trained with all before it: their text grows with the square of their number."""


class Reason(NamedTuple):
    """Why a row is refused, as it is told to people."""

    expected: str
    """What should stand there instead."""
    mend: str
    """How the row is mended."""


REASONS: Mapping[str, Reason] = {
    INVALID_JSON: Reason(
        "one JSON object a line",
        "Write each row as one JSON object on one line; a line break inside a text is \\n.",
    ),
    WRONG_ENCODING: Reason(
        "UTF-8 text",
        "Save the file as UTF-8, for instance with iconv -t UTF-8.",
    ),
    ROW_TOO_LARGE: Reason(
        f"a row of at most max_row_bytes bytes and {MAX_ROUNDS} rounds",
        "Shorten the row, or raise max_row_bytes.",
    ),
    ROW_TOO_LONG: Reason(
        "a converted row of at most max_row_characters characters",
        "Shorten the results or drop turns, or raise max_row_characters.",
    ),
    EMPTY_CONVERSATIONS: Reason(
        "a list `conversations` (from/value) or `messages` (role/content) with a user and an assistant turn",
        "Give the turns as a list of from/value or role/content, all of them texts.",
    ),
    ROLE_ORDER: Reason(
        "one system turn, then user and assistant turns in alternation, the assistant's last",
        "Order the turns: system, user, assistant, user, assistant …; join two in a row of the same role.",
    ),
    NO_SYSTEM_TURN: Reason(
        "a system turn first",
        "Put the system prompt first, or name the format that has none.",
    ),
    NOT_REACT_PROMPT: Reason(
        "a system prompt that says 'You have access to the following APIs:' and ends with the format block",
        "Name the source's real format, or write the prompt with its APIs and its format block.",
    ),
    NOT_FABRIC_PROMPT: Reason(
        "a system prompt of AgentFabric: its tool section, then its instructions",
        "Name the source's real format, or write the prompt as AgentFabric does.",
    ),
    INVALID_TOOLS: Reason(
        "`tools`, a list (or its JSON) of {type: function, function: {name, description, parameters}}",
        "Write the tools as OpenAI function objects.",
    ),
    INVALID_APIS: Reason(
        "APIs as `N. NAME: Call this tool …`, numbered 1, 2, 3, …, the first right after `following APIs:`",
        "Number the APIs 1, 2, 3, … and begin each with its name and `: Call this tool`.",
    ),
    INVALID_PARAMETERS: Reason(
        "after `Parameters:` a JSON list of {name, description, required, …} or a JSON schema of an object",
        "Close all brackets and quotes after Parameters: and give every parameter a name of its own.",
    ),
    MISSING_PARAMETERS: Reason(
        "`Parameters:` with a list, [] when there are none",
        "Write Parameters: [] behind a tool that takes none.",
    ),
    DUPLICATE_TOOL: Reason(
        "one definition for a tool's name",
        "Keep one of the definitions, or give the other one another name.",
    ),
    INVALID_TOOL_NAME: Reason(
        "a tool's name in one line, without blanks around it",
        "Give the tool a name in one line, without blanks at its ends.",
    ),
    UNKNOWN_TOOL: Reason(
        "a call of a tool that the prompt lists",
        "Correct the name in the call, or list the tool in the prompt.",
    ),
    INVALID_ACTION_INPUT: Reason(
        "`Action Input:` with one JSON object or Python dict, [] or nothing for no arguments",
        'Write the arguments as one JSON object: {"city": "Paris"}.',
    ),
    INCOMPLETE_TURN: Reason(
        "an answer or calls, each call followed by its arguments and, unless it is the last one, its result",
        "Give each Action its Action Input and, where the turn goes on, its Observation.",
    ),
    RESULT_TAG_IN_RESULT: Reason(
        "a result without a literal </result>",
        "Take </result> out of the tool's result.",
    ),
    UNEXPECTED_TOOL_CALL: Reason(
        "plain chat, without tools and calls; `format` names the readers of rows that have some",
        "Name the format of rows with tools, or take the calls out.",
    ),
}


class Refused(Exception):
    """A row that cannot be converted. code: a key of REASONS; detail: what was found, and where."""

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(f"{code}: {detail}")
        self.code, self.detail = code, detail
