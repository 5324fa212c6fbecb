"""Self-cognition rows: as many as asked for, in both languages, the same for the same seed."""

from __future__ import annotations

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from services.common.fabric import language_of
from services.conversion.identity import make_conversations

RECIPE = list(make_conversations(3000, "卡卡罗特", "陶白白", 42))


def test_there_are_as_many_rows_as_asked_for_with_ids_that_count_up() -> None:
    assert len(RECIPE) == len({row.id for row in RECIPE}) == 3000
    assert (RECIPE[0].id, RECIPE[-1].id) == ("self-cognition-000001", "self-cognition-003000")
    assert list(make_conversations(0, "a", "b", 42)) == []


def test_chinese_and_english_take_turns() -> None:
    assert [language_of(row.rounds[0].query) for row in RECIPE[:4]] == ["zh", "en", "zh", "en"]
    english = make_conversations(100, "Kakarot", "Tao", 1)
    assert {language_of(row.rounds[0].turn.answer) for row in islice(english, 1, None, 2)} == {"en"}


def test_every_answer_tells_name_and_author() -> None:
    for row in RECIPE:
        [(query, turn, prefix)] = row.rounds
        assert "卡卡罗特" in turn.answer
        assert "陶白白" in turn.answer
        assert (row.tools, row.system, prefix, turn.calls) == ((), "", "", ())
        assert query


def test_nothing_is_said_twice_before_all_has_been_said_once() -> None:
    distinct = len({row.rounds for row in RECIPE})
    assert distinct > 1000
    assert len({row.rounds for row in RECIPE[:distinct]}) == distinct


def test_the_seed_decides_the_order() -> None:
    assert list(make_conversations(50, "卡卡罗特", "陶白白", 42)) == RECIPE[:50]
    assert list(make_conversations(50, "卡卡罗特", "陶白白", 43)) != RECIPE[:50]


def test_a_model_does_not_deny_what_it_is() -> None:
    rows = list(make_conversations(3000, "Qwen Agent", "阿里云", 42))
    assert not [row for row in rows if "Qwen" in row.rounds[0].query or "阿里云" in row.rounds[0].query]


@given(st.text(min_size=1), st.text(min_size=1))
def test_any_name_is_taken_as_it_is(name: str, author: str) -> None:
    for row in make_conversations(4, name, author, 1):
        assert name in row.rounds[0].turn.answer
        assert author in row.rounds[0].turn.answer
