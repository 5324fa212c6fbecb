"""Why a row is refused: one table of codes, and the exception that carries one from where the fact is known."""

from __future__ import annotations

from collections.abc import Mapping

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

# code → what is expected instead
EXPECTED: Mapping[str, str] = {
    INVALID_JSON: "one JSON object a line",
    WRONG_ENCODING: "UTF-8 text",
    ROW_TOO_LARGE: f"a row of at most max_row_bytes bytes and {MAX_ROUNDS} rounds",
    ROW_TOO_LONG: "a converted row of at most max_row_characters characters",
    EMPTY_CONVERSATIONS: "a list `conversations` (from/value) or `messages` (role/content) with a user and an assistant turn",
    ROLE_ORDER: "one system turn, then user and assistant turns in alternation, the assistant's last",
    NO_SYSTEM_TURN: "a system turn first",
    NOT_REACT_PROMPT: "a system prompt that says 'You have access to the following APIs:' and ends with the format block",
    NOT_FABRIC_PROMPT: "a system prompt of AgentFabric: its tool section, then its instructions",
    INVALID_TOOLS: "`tools`, a list (or its JSON) of {type: function, function: {name, description, parameters}}",
    INVALID_APIS: "APIs as `N. NAME: Call this tool …`, numbered 1, 2, 3, …, the first right after `following APIs:`",
    INVALID_PARAMETERS: "after `Parameters:` a JSON list of {name, description, required, …} or a JSON schema of an object",
    MISSING_PARAMETERS: "`Parameters:` with a list, [] when there are none",
    DUPLICATE_TOOL: "one definition for a tool's name",
    INVALID_TOOL_NAME: "a tool's name in one line, without blanks around it",
    UNKNOWN_TOOL: "a call of a tool that the prompt lists",
    INVALID_ACTION_INPUT: "`Action Input:` with one JSON object or Python dict, [] or nothing for no arguments",
    INCOMPLETE_TURN: "an answer or calls, each call followed by its arguments and, unless it is the last one, its result",
    RESULT_TAG_IN_RESULT: "a result without a literal </result>",
    UNEXPECTED_TOOL_CALL: "plain chat, without tools and calls; `format` names the readers of rows that have some",
}


class Refused(Exception):
    """A row that cannot be converted. code: a key of EXPECTED; detail: what was found, and where."""

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(f"{code}: {detail}")
        self.code, self.detail = code, detail
