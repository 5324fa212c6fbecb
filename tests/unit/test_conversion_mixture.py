"""Which tools may stand beside a question, and how tools are dealt to the splits."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidData
from services.common.fabric import Tool
from services.conversion.elsewhere import Elsewhere
from services.conversion.kinship import fits_none, names_one, nearly_fits, pair_up, related
from services.conversion.mixture import ToolGroups, add_distractors, assign_splits
from services.conversion.rows import make_tool

NAMES = st.lists(st.sampled_from([f"t{n}" for n in range(30)]), min_size=1, max_size=4)


def tool(name: str) -> Tool:
    parameters: dict[str, Any] = {"type": "object", "properties": {}, "required": []}
    return make_tool(name, "", parameters)


@pytest.mark.parametrize(
    ("asked", "listed", "none_fits"),
    [
        ("get_weather", "get_news", True),  # "get" tells nothing
        ("calculate_area", "calculate_tax_for_data", True),
        ("findDetailsOfBooks", "search.find_details", True),
        ("get_weather", "weather_forecast", False),
        ("currentWeather", "weather.get", False),
        ("get_weather", "get_weather", False),
    ],
)
def test_common_words_do_not_make_tools_alike(asked: str, listed: str, none_fits: bool) -> None:
    assert fits_none([tool(asked)], [tool(listed)]) is none_fits
    beside = add_distractors([tool(asked)], [tool(listed)], 1, 42, "row")
    assert (len(beside) == 2) is none_fits


def test_distractors_are_other_tools_in_a_seeded_order() -> None:
    pool = [tool(name) for name in ("alpha", "bravo", "charlie", "delta", "echo")]
    beside = add_distractors([pool[0]], pool, 3, 42, "row")
    assert len({t.name for t in beside}) == 4
    assert pool[0] in beside
    assert beside == add_distractors([pool[0]], pool, 3, 42, "row")
    assert len(add_distractors([pool[0]], pool, 99, 42, "row")) == 5


@given(st.lists(NAMES, min_size=1, max_size=20), st.integers(0, 5))
def test_tools_of_one_prompt_are_never_separated(prompts: list[list[str]], seed: int) -> None:
    groups = ToolGroups()
    for names in prompts:
        groups.tie(names)
    assigned = assign_splits(groups, {}, 0.2, 0.2, seed)
    assert set(assigned) == set(groups.members())
    for names in prompts:
        assert len({assigned[groups.root(name)] for name in names}) == 1


def test_a_group_in_two_named_splits_is_refused() -> None:
    groups = ToolGroups()
    groups.tie(["a", "b"])
    with pytest.raises(InvalidData, match="no tool may be in two splits"):
        assign_splits(groups, {groups.root("a"): {"train", "test"}}, 0, 0, 1)


@pytest.mark.parametrize(
    ("asked", "listed", "nearly"),
    [
        ("get_local_time", "get_time_difference", True),
        ("sports_team.get_schedule", "sportsTeam.topScorer", True),
        ("get_weather", "get_news", False),  # far
        ("get_distance", "calculate_distance", False),  # perhaps the same
        ("calculate_triangle_area", "triangle.area", False),
        ("get_local_time", "get_local_time", False),
    ],
)
def test_a_near_miss_is_of_the_same_field_and_another_tool(asked: str, listed: str, nearly: bool) -> None:
    assert nearly_fits([tool(asked)], [tool(listed)]) is nearly
    assert nearly_fits([tool(asked)], [tool(listed), tool("other_thing")]) is nearly


def test_a_question_that_one_of_the_listed_tools_may_fit_is_no_near_miss_of_another() -> None:
    assert not nearly_fits([tool("get_local_time")], [tool("get_time_difference"), tool("local_time")])


@pytest.mark.parametrize(
    ("question", "listed", "named"),
    [
        ("What is the current weather at 13° N?", "get_current_weather", True),  # its row calls another tool
        ("Could you tell me the temperatures?", "temperature", True),
        ("What is the weather?", "get_current_weather", False),
        ("get the data", "get_data", False),  # no word of this name tells anything
    ],
)
def test_a_question_that_names_a_listed_tool_is_not_refused(question: str, listed: str, named: bool) -> None:
    assert names_one(question, [tool("other_thing"), tool(listed)]) is named
    asked = (question, (tool("red_sun"),))
    elsewhere = Elsewhere([asked])
    assert list(elsewhere.far([tool(listed)], 0)) == ([] if named else [asked])
    near = [tool(listed), tool("red_house")]  # the second one is of the same field as the question's own
    assert list(elsewhere.near(near, 0)) == ([] if named else [asked])


@given(st.integers(0, 1 << 64))
def test_near_and_far_questions_are_told_apart_from_any_place_on(start: int) -> None:
    asked = [(f"{a} {b}?", (tool(f"{a}_{b}"),)) for a in ("red", "green", "blue") for b in ("sun", "sea", "tree")]
    tools = [tool("red_house"), tool("sun_rise")]
    elsewhere = Elsewhere(asked)
    assert {q for q, _ in elsewhere.near(tools, start)} == {q for q, _ in asked if "red" in q or "sun" in q}
    assert {q for q, _ in elsewhere.far(tools, start)} == {q for q, _ in asked if "red" not in q and "sun" not in q}
    assert not list(Elsewhere([]).near(tools, start))
    assert not list(Elsewhere([]).far(tools, start))


def test_tools_that_can_stand_for_each_other_are_neither_distractors_nor_near_misses_nor_far() -> None:
    song, music, volume = tool("play_song"), tool("play_music"), tool("set_song_volume")
    news, headlines = tool("fetch_news"), tool("get_headlines")
    pairs = pair_up([["play_song", "play_music", "spotify"], ["fetch_news", "get_headlines"]])
    assert nearly_fits([song], [music]) and not nearly_fits([song], [music], pairs)
    assert not nearly_fits([song], [volume, music], pairs)  # one of them fits
    assert nearly_fits([song], [volume], pairs)
    assert fits_none([news], [headlines]) and not fits_none([news], [headlines], pairs)
    assert add_distractors([news], [headlines, song], 2, 42, "row", pairs) == add_distractors(
        [news], [song], 1, 42, "row"
    )
    elsewhere = Elsewhere([("Anything new?", (news,)), ("Play it!", (song,))], pairs)
    assert [q for q, _ in elsewhere.far([headlines], 0)] == ["Play it!"]
    assert not list(elsewhere.near([music], 0))


def test_no_question_is_the_near_miss_of_every_prompt() -> None:
    fields = ["sun", "sea", "tree", "house", "road"]
    asked = [("all of them?", (tool("red_" + "_".join(fields)),))]
    asked += [
        (f"{field} {n}?", (tool(f"{field}_{color}"),)) for field in fields for n, color in enumerate(["red", "blue"])
    ]
    elsewhere = Elsewhere(asked)
    first = [next(elsewhere.near([tool(f"{field}_rise")], start))[0] for field in fields for start in range(40)]
    # Each prompt has three near misses. The one that all of them have is drawn much less often than a third.
    assert 0 < first.count("all of them?") < 200 / 4
    assert len(set(first)) == len(asked)


def test_a_near_miss_is_told_by_the_pair_that_makes_it_one() -> None:
    listed = [tool("local_time"), tool("get_news")]
    assert list(related([tool("get_time_difference")], listed)) == [("get_time_difference", "local_time")]
