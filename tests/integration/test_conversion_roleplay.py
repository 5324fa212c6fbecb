"""What we train on is what modelscope-agent 0.7.1's RolePlay sends, byte for byte: asked of the real package.

It runs in a venv of its own: see conftest.py.
"""

from __future__ import annotations

import json
import os
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from services.common.fabric import (
    Call,
    Round,
    Tool,
    Turn,
    language_of,
    render_call,
    render_prefix,
    render_result,
    render_rows,
    render_system,
)
from services.conversion.rows import make_call, make_tool
from services.conversion.schemas import make_schema
from tests.conftest import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("roleplay")]
SCRIPT = Path(__file__).with_name("roleplay_script.py")


class Offered(NamedTuple):
    """A tool, as RolePlay gets it and as a row has it."""

    name: str
    description: str
    parameters: Any
    """A list of {name, description, type, required}, or, where it is nested, the JSON schema."""
    result: str = "nothing"

    @property
    def tool(self) -> Tool:
        return make_tool(self.name, self.description, make_schema(self.parameters, self.name))

    @property
    def told(self) -> dict[str, Any]:
        return {**self._asdict(), "schema": "oai" if isinstance(self.parameters, list) else "json"}


class Case(NamedTuple):
    """A question to RolePlay and what the model answers, step by step."""

    role: str
    query: str
    offered: tuple[Offered, ...]
    turn: Turn


def parameter(name: str, description: str, required: bool = True, **more: Any) -> dict[str, Any]:
    return {"name": name, "description": description, "type": "string", "required": required, **more}


WEATHER = Offered(
    "amap_weather", "获取对应城市的天气数据", [parameter("location", "城市/区具体名称，如`北京市海淀区`")],
    "朝阳区的天气是晴温度是25度。",
)  # fmt: skip
DRAW = Offered(
    "image_gen", "Draws {what} is \"asked\" for.\nReally.",
    [parameter("text", "what's to be drawn: {a}, \\n or \"b\""),
     parameter("resolution", "", False, enum=["1024*1024", "720*1280"]), parameter("n", "how many", type="integer")],
    "![IMAGEGEN](https://a.example/b.png?c=1&d={e})",
)  # fmt: skip
CLOCK = Offered("时钟", "Tells the time", [], "12:00\n\nNoon.")
RARE = Offered("rare", "鿰", [parameter("a", "the last characters of the block count as Chinese: 鿰")])
ORDER = Offered(
    "order a cup", "Orders.",
    {"type": "object", "properties": {"address": {"type": "object", "description": "where", "properties":
        {"name": {"type": "string"}}, "required": ["name"]}}, "required": ["address"]},
)  # fmt: skip


def called(offered: Offered, arguments: dict[str, Any], lead: str = "") -> Call:
    return make_call(offered.name, arguments, offered.result)._replace(lead=lead)


CASES = {
    "zh": Case(
        "你扮演天气预报助手。{不是字段}\n你很友善。",
        "朝阳区天气怎样？",
        (WEATHER, CLOCK, RARE),
        Turn((called(WEATHER, {"location": "朝阳区"}, "我来查询一下。"),), "晴，25度。"),
    ),
    "en": Case(
        "Be kind.",
        "Draw a cat, will you?",
        (DRAW, ORDER, WEATHER),
        Turn((called(DRAW, {"text": "a \"cat\" 猫", "n": 1}),), "Here: ![Image](https://a.example/b.png)"),
    ),
    "two calls": Case(
        "Be kind.",
        "What time is it, and how is the weather?",
        (CLOCK, WEATHER),
        Turn((called(CLOCK, {}), called(WEATHER, {"location": "朝阳区"}, "It is noon.")), "Noon and sunny."),
    ),
    "no call": Case("", "鿰", (CLOCK,), Turn((), "?")),
}  # fmt: skip


class Recorder(ThreadingHTTPServer):
    """An OpenAI server that says what it is told to say, in order, and keeps what it is asked."""

    def __init__(self, replies: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies, self.requests = replies, list[dict[str, Any]]()


class _Handler(BaseHTTPRequestHandler):
    server: Recorder

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = ""  # RolePlay first asks whether the model calls functions, with some of its own
        if "tools" not in asked:
            content = self.server.replies[len(self.server.requests)]
            self.server.requests.append(asked)
        said = {"role": "assistant", "content": content}
        told = {
            "id": "1", "object": "chat.completion", "created": 1, "model": asked["model"],
            "choices": [{"index": 0, "message": said, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }  # fmt: skip
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="session")
def requests(role_play_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Case → the requests that RolePlay makes."""
    steps = {name: [row[-1] for row in rows(case)] for name, case in CASES.items()}
    told = [
        {"role": case.role, "query": case.query, "tools": [o.told for o in case.offered]} for case in CASES.values()
    ]
    home = tmp_path_factory.mktemp("home")  # it writes into ~/.modelscope-agent and ./tmp
    env = {"HOME": str(home), "PATH": os.environ["PATH"], "NO_PROXY": "127.0.0.1", "OPENAI_API_KEY": "EMPTY"}
    with Recorder([step["content"] for all_steps in steps.values() for step in all_steps]) as server:
        argv = [str(role_play_python), str(SCRIPT), f"http://127.0.0.1:{server.server_port}/v1"]
        with serving(server):
            done = subprocess.run(
                argv,
                input=json.dumps(told),
                cwd=home,
                env=env,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
        assert done.returncode == 0, done.stderr[-4000:]
        recorded = iter(server.requests)
        return {name: [next(recorded) for _ in all_steps] for name, all_steps in steps.items()}


def rows(case: Case) -> list[list[dict[str, Any]]]:
    """Our training rows for a case."""
    tools, language = [offered.tool for offered in case.offered], language_of(case.query)
    system = render_system(tools, case.role, language)
    examples = render_rows("split", system, tools, [Round(case.query, case.turn)], language)
    return [[dict(message) for message in example.messages] for example in examples]


@pytest.mark.parametrize("case", CASES)
def test_the_system_prompt_is_role_plays(case: str, requests: dict[str, list[dict[str, Any]]]) -> None:
    role, query, offered, _ = CASES[case]
    ours = render_system([o.tool for o in offered], role, language_of(query))
    assert [asked["messages"][0] for asked in requests[case]] == [{"role": "system", "content": ours}] * len(
        requests[case]
    )


@pytest.mark.parametrize("case", CASES)
def test_the_question_is_role_plays(case: str, requests: dict[str, list[dict[str, Any]]]) -> None:
    _, query, offered, _ = CASES[case]
    ours = render_prefix([o.tool for o in offered], language_of(query)) + query
    assert requests[case][0]["messages"][1:] == [{"role": "user", "content": ours}]


@pytest.mark.parametrize("case", ["zh", "en"])
def test_the_result_comes_back_as_role_play_sends_it(case: str, requests: dict[str, list[dict[str, Any]]]) -> None:
    first, second = requests[case]
    [call] = CASES[case].turn.calls
    lead = f"{call.lead}\n" if call.lead else ""
    said = first["messages"][1]["content"] + lead + render_call(call) + render_result(call.observation)
    assert second["messages"][1:] == [{"role": "user", "content": said}]


@pytest.mark.parametrize("case", CASES)
def test_every_training_row_is_a_request_of_role_play_and_its_answer(
    case: str, requests: dict[str, list[dict[str, Any]]]
) -> None:
    assert [row[:-1] for row in rows(CASES[case])] == [asked["messages"] for asked in requests[case]]


def test_generation_stops_where_the_result_begins(requests: dict[str, list[dict[str, Any]]]) -> None:
    assert all("Observation:" in asked["stop"] for all_asked in requests.values() for asked in all_asked)
