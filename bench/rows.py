"""`python -m bench.rows COUNT SIZE FILE`: ms_agent rows like the published ones; SIZE is their mean length in bytes.

1 to 5 APIs stand in a prompt, out of 3,000 tools of which a few are frequent (Zipf-Mandelbrot); the user asks one question and
the assistant answers it with one call. 1 % of the rows have a defect, 1 % say an earlier row again and 1 % almost do. Text is
written as JSON once, when the tools are made; a row is then bytes put together, so the disk is the limit. The same seed gives
the same bytes for any number of processes.
"""

from __future__ import annotations

import argparse
import json
import os
from bisect import bisect
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import NamedTuple

TOOLS, PHRASES, BLOCK = 3000, 4096, 2000
DEFECT, AGAIN, ALMOST_AGAIN = 0.01, 0.01, 0.01
"""Parts of all rows."""
APIS = (0.2, 0.5, 0.8, 0.95, 1.0)
"""How many prompts have at most 1, 2, … APIs."""
DEFECTS = ("unknown tool", "no Parameters", "broken Parameters", "input that is no object", "no answer", "half a line")
"""The last one is no JSON at all: the published converter ends there, whatever its options."""

HEAD = "Answer the following questions as best you can. You have access to the following APIs:\n"
FORMAT = (
    "Use the following format:\n\nThought: you should always think about what to do\n"
    "Action: the action to take, should be one of the above tools[{names}]\nAction Input: the input to the action\n"
    "Observation: the result of the action\n"
    "... (this Thought/Action/Action Input/Observation can be repeated zero or more times)\n"
    "Thought: I now know the final answer\nFinal Answer: the final answer to the original input question\nBegin!"
)
_WORDS = {
    "en": (
        "account address alarm amount article author balance battery book booking budget calendar camera category channel "
        "cheap city client code color comment company contact coupon course currency customer date default delivery device "
        "discount distance document driver duration email event exchange fast file filter flight format free genre goal "
        "guest health hotel image index invoice item keyword language latest level list local location market meeting menu "
        "message movie music near network news note number offer online order package page password payment phone photo "
        "place plan player playlist price product profile project public quality query rating recipe record region report "
        "request result review room route schedule score season seat service shop size song sport station status stock "
        "store street student style subject summary table target team text ticket time title topic track traffic train "
        "travel type unit update user value vehicle video weather website week weight word year zone"
    ),
    "zh": (
        "查询 搜索 获取 推荐 生成 翻译 转换 计算 预订 购买 取消 更新 发送 播放 识别 天气 城市 日期 时间 价格 "
        "商品 名称 列表 编码 用户 订单 电影 音乐 歌曲 图片 视频 新闻 酒店 航班 机票 火车 路线 地址 位置 距离 "
        "菜谱 食材 健康 运动 学生 课程 老师 文章 作者 语言 文本 内容 结果 信息 详细 类型 类别 数量 单位 货币 "
        "汇率 股票 公司 员工 会议 日程 提醒 邮件 电话 手机 电脑 相机 拍照 游戏 旅游 景点 美食 餐厅 评价 评分 "
        "品牌 颜色 尺寸 重量 温度 湿度 风力 北京 上海 杭州 今天 明天 本周 最近 便宜 附近 热门 请问 帮我 可以 "
        "需要 适合 一下 什么 哪些 怎么 多少 根据 指定 支持 提供 包括 例如"
    ),
}
WORDS = {language: text.split() for language, text in _WORDS.items()}


class Made(NamedTuple):
    """A tool as a row needs it: text that is JSON already, in bytes."""

    name: bytes
    language: str
    line: bytes
    """Without its number, and without its parameters."""
    parameters: bytes
    inputs: tuple[bytes, ...]
    """`'name': '`, for each parameter."""
    fields: tuple[bytes, ...]
    """The same for the fields of its results."""


class World(NamedTuple):
    """What rows are made of."""

    tools: Sequence[Made]
    frequencies: Sequence[float]
    """Cumulative, the last one 1."""
    phrases: Mapping[str, Sequence[bytes]]


def write_rows(count: int, size: int, file: Path, seed: int = 0, half_lines: bool = True, processes: int = 0) -> int:
    """Write the rows; returns their bytes. half_lines: whether some of the defects are lines that are no JSON."""
    starts = iter(range(0, count, BLOCK))
    waiting: deque[Future[bytes]] = deque()
    with file.open("wb") as out, ProcessPoolExecutor(processes or os.cpu_count() or 1) as pool:
        while True:
            while len(waiting) < 8 and (start := next(starts, None)) is not None:
                waiting.append(pool.submit(_make_block, start, min(BLOCK, count - start), size, seed, half_lines))
            if not waiting:
                return out.tell()
            out.write(waiting.popleft().result())


def _make_block(start: int, count: int, size: int, seed: int, half_lines: bool) -> bytes:
    world, rng = _world(seed), Random(f"rows {seed} {size} {start}")
    rows: list[bytes] = []
    earlier: tuple[bytes, bytes, bytes] | None = None
    owed = 0.0  # what rows are too long or too short until now, so that the mean comes out
    for number in range(start, start + count):
        roll = rng.random()
        defect = rng.choice(DEFECTS if half_lines else DEFECTS[:-1]) if roll < DEFECT else ""
        if earlier and DEFECT <= roll < DEFECT + AGAIN + ALMOST_AGAIN:
            system, query, turn = earlier
            query += b"" if roll < DEFECT + AGAIN else rng.choice(world.phrases["en"])
        else:
            system, query, turn = _make_row(world, rng, size * rng.uniform(0.6, 1.4) - owed, defect)
        line = b'{"id": "MS_Agent_Bench_%d", "conversations": [{"from": "system", "value": "%s"}, ' % (number, system)
        line += b'{"from": "user", "value": "%s"}' % query
        line += b"]}\n" if defect == "no answer" else b', {"from": "assistant", "value": "%s"}]}\n' % turn
        owed += len(line) - size
        if defect == "half a line":
            line = line[: len(line) // 2].rstrip(b"\\") + b"\n"
        if not defect and rng.random() < 0.1:
            earlier = system, query, turn
        rows.append(line)
    return b"".join(rows)


def _make_row(world: World, rng: Random, size: float, defect: str) -> tuple[bytes, bytes, bytes]:
    """(system prompt, question, turn) of about `size` bytes together, the row's own braces included."""
    random = rng.random
    wanted = bisect(APIS, random()) + 1
    chosen: list[Made] = []
    while len(chosen) < wanted:
        tool = world.tools[bisect(world.frequencies, random())]
        if tool not in chosen:
            chosen.append(tool)
    called = chosen[int(random() * wanted)]
    lines = [b"%d. %s%s\\n\\n" % (n, tool.line, tool.parameters) for n, tool in enumerate(chosen, 1)]
    if defect == "no Parameters":
        lines[-1] = b"%d. %s\\n\\n" % (wanted, chosen[-1].line.removesuffix(b" Parameters: "))
    elif defect == "broken Parameters":
        lines[-1] = b'%d. %s[{\\"name\\": \\"key\\", \\"descr\\n\\n' % (wanted, chosen[-1].line)
    end = _escape(FORMAT).replace(b"{names}", b", ".join(tool.name for tool in chosen))
    system = _escape(HEAD) + b"".join(lines) + end

    phrases = world.phrases[called.language]
    query = b" ".join(phrases[int(random() * PHRASES)] for _ in range(2))
    inputs = b", ".join(start + phrases[int(random() * PHRASES)] + b"'" for start in called.inputs)
    name = b"no such tool" if defect == "unknown tool" else called.name
    given = b"%s" % phrases[0] if defect == "input that is no object" else b"{%s}" % inputs
    turn = b"Action: %s\\nAction Input: %s\\nObservation: [" % (name, given)
    room = size - len(system) - len(query) - len(turn) - 220
    records = b""
    while not records or len(records) < room * 0.6:
        fields = b", ".join(start + phrases[int(random() * PHRASES)] + b"'" for start in called.fields)
        records += b", {%s}" % fields if records else b"{%s}" % fields
    answer = phrases[int(random() * PHRASES)]
    while len(records) + len(answer) < room:
        answer += (b", " if called.language == "en" else "，".encode()) + phrases[int(random() * PHRASES)]
    turn += b"%s]\\nThought: I now know the final answer\\nFinal Answer: %s." % (records, answer)
    return system, query, turn


@cache
def _world(seed: int) -> World:
    rng = Random(f"tools {seed}")
    phrases = {language: [_escape(_phrase(rng, language, 3, 9)) for _ in range(PHRASES)] for language in WORDS}
    weights = list(accumulate(1 / (rank + 10) for rank in range(TOOLS)))
    return World([_make_tool(rng, n) for n in range(TOOLS)], [w / weights[-1] for w in weights], phrases)


def _make_tool(rng: Random, number: int) -> Made:
    language = "zh" if rng.random() < 0.6 else "en"
    if rng.random() < 0.1:
        name = f"{''.join(rng.sample(WORDS['zh'], 2))}{number}"
    else:
        name = rng.choice(("_", "", " ")).join((*rng.sample(WORDS["en"], 2), str(number)))
    description = "" if rng.random() < 0.05 else _phrase(rng, language, 3, 12)
    keys = rng.sample(WORDS["en"], rng.choice((0, 1, 1, 2, 2, 2, 3, 3, 4, 5)))
    parameters = [
        {"name": key, "description": _phrase(rng, language, 2, 7), "required": rng.choice(("True", "True", "False"))}
        for key in keys
    ]
    human = name.replace("_", "")
    line = (
        f"{name}: Call this tool to interact with the {human} API. What is the {human} API useful for? "
        f"{description}. Parameters: "
    )
    fields = tuple(_escape(f"'{key}': '") for key in rng.sample(WORDS["en"], rng.randint(1, 3)))
    inputs = tuple(_escape(f"'{key}': '") for key in keys)
    schema = _escape(json.dumps(parameters, ensure_ascii=False))
    return Made(_escape(name), language, _escape(line), schema, inputs, fields)


def _phrase(rng: Random, language: str, low: int, high: int) -> str:
    return ("" if language == "zh" else " ").join(rng.choices(WORDS[language], k=rng.randint(low, high)))


@cache
def _escape(text: str) -> bytes:
    return json.dumps(text, ensure_ascii=False)[1:-1].encode()


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rows")
    parser.add_argument("count", type=int)
    parser.add_argument("size", type=int, help="mean length of a row in bytes: 2300 or 3300")
    parser.add_argument("file", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-half-lines", action="store_true", help="every line is JSON")
    told = parser.parse_args()
    print(write_rows(told.count, told.size, told.file, told.seed, not told.no_half_lines), "bytes")


if __name__ == "__main__":
    _main()
