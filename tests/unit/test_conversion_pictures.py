"""Pictures in results: shown in the answer as AgentFabric's prompt asks, and nothing else changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.fabric import Call, Turn, language_of
from services.common.pictures import find_pictures, find_shown
from services.conversion.pictures import show_pictures
from services.conversion.readers import READERS

ROWS_FILE = Path(__file__).parent.parent / "data/pictures.jsonl"
# Written for this test; none is of a published data set.
ROWS = [json.loads(line) for line in ROWS_FILE.read_text(encoding="utf-8").splitlines()]
HOST = "https://images.example.com"
URL = f"{HOST}/a(1).png?sig=a%2Fb&t=1"
SHOWN_ANSWERS = {
    "pictures-zh-drawn": "已经为您画好了一只在雪地里奔跑的狐狸。\n"
    f"![图片]({HOST}/gen/fox.png?Expires=1719&Signature=a%2Fb%3D)",
    "pictures-en-bare": f"Here is Lake Bled in winter: ![Image]({HOST}/photos/lake_bled.jpg). "
    "More about it: https://travel.example.com/lake-bled",
    "pictures-en-link": f"The chart of your five numbers is ![Image]({HOST}/charts/digits.svg).",
    "pictures-zh-shown": f"找到两款马克杯：青花马克杯39元 ![图片]({HOST}/shop/mug_1.webp)，素色马克杯25元。\n"
    f"![图片]({HOST}/shop/mug_2.webp)",
    "pictures-zh-two-calls": f"蓝色的玫瑰在这里：![图片]({HOST}/gen/rose_blue.png)，希望您喜欢。\n"
    f"![图片]({HOST}/gen/rose.png)",
}


def answered(answer: str, observation: str = f"{{'url': '{URL}'}}", language: str = "zh") -> str:
    return show_pictures(Turn((Call("draw", "{}", observation),), answer), language).answer


@pytest.mark.parametrize("row", ROWS, ids=[row["id"] for row in ROWS])
def test_the_pictures_of_a_row_are_shown_in_its_answer(row: dict[str, object]) -> None:
    [(query, turn, _)] = READERS["ms_agent"](row).rounds
    shown = show_pictures(turn, language_of(query))
    assert shown.answer == SHOWN_ANSWERS[str(row["id"])]
    assert shown.calls == turn.calls


@pytest.mark.parametrize(
    "mention",
    [URL, f"[这里]({URL})", f'[这里]({URL} "题")', f"[{URL}]({URL})", f"<{URL}>", f"`{URL}`", f'<img src="{URL}">'],
)
def test_an_address_in_an_answer_becomes_a_picture(mention: str) -> None:
    assert answered(f"看{mention}。") == f"看![图片]({URL})。"
    assert answered(f"See {mention}.", language="en") == f"See ![Image]({URL})."


@pytest.mark.parametrize(
    "answer", [f"![x]({URL})", f'![]( {URL} "title" )', f"[![x]({URL})]({URL})", f"看![图片]({URL})。"]
)
def test_a_picture_that_is_shown_stays_as_it_is(answer: str) -> None:
    assert answered(answer) == answer


@pytest.mark.parametrize("answer", ["好了。", f"```\n{URL}\n```", f"[x]({URL} 'single')", f"{URL[:-1]}2 是另一张。"])
def test_a_picture_that_an_answer_does_not_show_comes_on_a_line_of_its_own(answer: str) -> None:
    assert answered(answer) == f"{answer}\n![图片]({URL})"


def test_an_address_that_is_no_picture_or_not_of_the_result_stays() -> None:
    answer = "https://a.cn/b.html https://a.cn/c.png"
    assert answered(answer, "https://a.cn/b.html") == answer
    assert answered(answer, "no address") == answer


def test_a_turn_that_has_no_answer_gets_none() -> None:
    assert answered("") == ""


def test_what_is_said_between_two_calls_shows_the_picture_of_the_first() -> None:
    calls = (Call("draw", "{}", URL), Call("draw", "{}", "done", lead=f"画好了：{URL}"))
    shown = show_pictures(Turn(calls, "完成。"), "zh")
    assert shown.calls[1].lead == f"画好了：![图片]({URL})"
    assert shown.answer == "完成。"


@pytest.mark.parametrize(
    ("text", "pictures"),
    [
        (f"见{URL}，很美", [URL]),
        ("HTTPS://A.cn/B.PNG", ["HTTPS://A.cn/B.PNG"]),
        ("https://a.cn/1.png,https://a.cn/2.jpeg;https://a.cn/1.png", ["https://a.cn/1.png", "https://a.cn/2.jpeg"]),
        ('{"url": "https://a.cn/1.gif\\n"}', ["https://a.cn/1.gif"]),
        ("(https://a.cn/1.bmp)", ["https://a.cn/1.bmp"]),
        ("https://a.png https://a.cn/b.png.html https://a.cn/?u=b.png https://a.cn/p?u=https://a.cn/b.png", []),
        ('"https:\\/\\/a.cn\\/1.png" "https://a.cn/1.png?a=1\\u0026b=2"', []),
        ("ftp://a.cn/1.png a.cn/1.png", []),
    ],
)
def test_pictures_are_known_by_the_ending_of_the_path(text: str, pictures: list[str]) -> None:
    assert find_pictures(text) == pictures


@given(
    st.lists(
        st.sampled_from(
            [URL, "https://a.cn/2.jpg", "[", "]", "(", ")", "!", "<", ">", "`", "```", "图", "\n", " ", "."]
        )
    )
)
def test_every_picture_is_shown_once_it_has_been_seen_to_and_a_second_time_changes_nothing(parts: list[str]) -> None:
    turn = Turn((Call("draw", "{}", f"{URL} https://a.cn/2.jpg"),), "x" + "".join(parts))
    shown = show_pictures(turn, "zh")
    assert set(find_pictures(f"{URL} https://a.cn/2.jpg")) <= find_shown(shown.answer)
    assert show_pictures(shown, "zh") == shown
