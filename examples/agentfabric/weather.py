"""The recipe's own acceptance: modelscope-agent's RolePlay plays a weather assistant on a model of yours.

    python weather.py --api-base http://127.0.0.1:8480/v1 --model weather
    python weather.py --config config/model_config.json --model weather

It asks 朝阳区天气怎样？ and the model must call the tool `amap_weather` and tell its result. The tool is modelscope-agent's
own; its question to Amap is answered here, by a server of this script that replays what Amap says (--live asks Amap itself:
a network, AMAP_TOKEN, and the packages pandas and openpyxl). Ends with 0 when the tool was called and its result was told.

It needs modelscope-agent 0.7.1 in a venv of its own (docs/agentfabric.md), not fabrictune. A token for the model's address
comes from OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qs, urlsplit

ROLE = "你扮演一个天气预报助手，你需要查询相应地区的天气，并调用给你的画图工具绘制一张城市的图。"
QUESTION = "朝阳区天气怎样？"
ADCODES: Mapping[str, str] = {"朝阳区": "110105", "北京市朝阳区": "110105"}
"""Amap's numbers of places; the tool loads all of them from a spreadsheet on the network."""
LIVE = {
    "province": "北京", "city": "朝阳区", "adcode": "110105", "weather": "晴", "temperature": "25",
    "winddirection": "西南", "windpower": "≤3", "humidity": "30", "reporttime": "2024-05-14 15:30:12",
}  # fmt: skip
ANSWER = {"status": "1", "count": "1", "info": "OK", "infocode": "10000", "lives": [LIVE]}
"""Amap's answer for 朝阳区. Source: https://lbs.amap.com/api/webservice/guide/api/weatherinfo"""


class Replay(ThreadingHTTPServer):
    """Answers as Amap's weather API, and keeps which places it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Replayed)
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Replayed(BaseHTTPRequestHandler):
    server: Replay

    def do_GET(self) -> None:
        """Amap's answer."""
        self.server.asked += parse_qs(urlsplit(self.path).query).get("city", [])
        body = json.dumps(ANSWER, ensure_ascii=False).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json;charset=UTF-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def import_role_play() -> Any:
    """The class RolePlay, without the packages that only its memories need (llama-index 0.10, langchain)."""
    found = find_spec("modelscope_agent")
    if found is None or found.origin is None:
        sys.exit("modelscope-agent is not installed here: docs/agentfabric.md says how, in a venv of its own")
    memory: Any = ModuleType("modelscope_agent.memory")
    memory.__path__ = [str(Path(found.origin).parent / "memory")]
    sys.modules[memory.__name__] = memory
    memory.Memory = import_module("modelscope_agent.memory.base").Memory
    # It tells each token at INFO, and the key for the model's address, too; into a file as well.
    import_module("modelscope_agent.utils.logger")
    logging.getLogger("modelscope-agent").setLevel(logging.WARNING)
    return import_module("modelscope_agent.agents.role_play").RolePlay


def replay_weather(address: str) -> None:
    """Put a tool in amap_weather's place that is the same, but for whom it asks and its spreadsheet of places."""
    if find_spec("pandas") is None:
        sys.modules["pandas"] = ModuleType("pandas")  # only the spreadsheet needs it
    base: Any = import_module("modelscope_agent.tools.base")
    own: Any = import_module("modelscope_agent.tools.amap_weather").AMAPWeather

    class Weather(own):  # type: ignore[misc]  # known at run time only
        def __init__(self, cfg: Any = None) -> None:
            base.BaseTool.__init__(self, cfg or {})
            self.url = f"{address}/v3/weather/weatherInfo?city={{city}}&key={{key}}"
            self.api_key = "replayed"

        def get_city_adcode(self, city_name: str) -> str:
            if city_name not in ADCODES:
                raise ValueError(f"location {city_name} not found, availables are {', '.join(ADCODES)}")
            return ADCODES[city_name]

    base.register_tool("amap_weather")(Weather)


def read_model(options: argparse.Namespace) -> dict[str, Any]:
    """RolePlay's `llm`: an entry of AgentFabric's model_config.json, taken as AgentFabric takes it, or the options."""
    if not options.config:
        told = {"type": "openai", "model": options.model, "api_base": options.api_base}
        told |= {"is_chat": True, "is_function_call": False, "support_stream": True}
    else:
        entries = json.loads(Path(options.config).read_text(encoding="utf-8"))
        told = dict(entries[options.model or next(iter(entries))])
    told["model_server"] = told.pop("type")
    return told


def main() -> int:
    """Ask, print what is said, and check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--api-base", default="http://127.0.0.1:8480/v1", help="an OpenAI-compatible address")
    parser.add_argument("--model", default="", help="its name there, or the entry's in --config")
    parser.add_argument("--config", default="", help="AgentFabric's model_config.json")
    parser.add_argument("--live", action="store_true", help="ask Amap itself")
    options = parser.parse_args()
    if not options.model and not options.config:
        parser.error("name the --model, or a --config")
    model = read_model(options)
    # The package writes into its user's home and into the folder where it runs.
    scratch = tempfile.mkdtemp(prefix="weather-")
    os.environ["HOME"] = scratch
    os.chdir(scratch)
    os.environ.setdefault("NO_PROXY", "127.0.0.1")
    os.environ.setdefault("OPENAI_API_KEY", "EMPTY")

    role_play = import_role_play()
    replay = None if options.live else Replay()
    if replay:
        replay_weather(f"http://127.0.0.1:{replay.server_port}")
    bot = role_play(function_list=["amap_weather"], llm=model, instruction=ROLE)
    print(f"> {QUESTION}\n")
    said = ""
    for piece in bot.run(QUESTION):
        said += piece
        print(piece, end="", flush=True)
    print("\n")

    told = said.rpartition("Answer:")[2] if "</result>" in said else ""
    checks = {
        "the tool was called": "</result>" in said and "failed to call" not in said,
        "for the place that was asked for": replay is None or replay.asked == [ADCODES["朝阳区"]],
        "its result was told": bool(told.strip()) and (replay is None or ("晴" in told and "25" in told)),
        "and the model stopped": "Action:" not in told and "Observation" not in told,
    }
    for check, passed in checks.items():
        print(f"{'✓' if passed else '✗'} {check}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
