"""Calls out of an answer, wherever it is cut into pieces."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream

from services.inference.calls import CallReader, FoundCall, decode_arguments

WEATHER = 'Action: amap_weather\nAction Input: {"location": "朝阳区"}\n'
NESTED = 'Action: plan\nAction Input: {"a": {"b": [1, {"c": "} \\" ]"}], "d": null}, "e": "\\\\"}\n'
ANSWERS: dict[str, tuple[str, list[str | FoundCall]]] = {
    "nothing": ("", []),
    "no call": ("The Action: is over.\n\nBye \n", ["The Action: is over.\n\nBye \n"]),
    "chinese text": ("北京今天晴，25 度。", ["北京今天晴，25 度。"]),
    "a call": (WEATHER, [FoundCall("amap_weather", '{"location": "朝阳区"}')]),
    "prose before": (
        "我来查询一下。\n工具调用\n" + WEATHER,
        ["我来查询一下。\n工具调用", FoundCall("amap_weather", '{"location": "朝阳区"}')],
    ),
    "nested": (NESTED, [FoundCall("plan", NESTED.partition("Input: ")[2].strip())]),
    "no arguments": ("Action: 查 时间\nAction Input: {}", [FoundCall("查 时间", "{}")]),
    "several calls": (
        f"First {WEATHER}\n\n{NESTED}Then this.\n{WEATHER} \n",
        [
            "First",
            FoundCall("amap_weather", '{"location": "朝阳区"}'),
            FoundCall("plan", NESTED.partition("Input: ")[2].strip()),
            "Then this.",
            FoundCall("amap_weather", '{"location": "朝阳区"}'),
        ],
    ),
    "several lines": ('Action: w\r\nAction Input: {\n "a": 1\n}\n', [FoundCall("w", '{\n "a": 1\n}')]),
    "python": ("Action: w\nAction Input: {'a': True, 'b': \"it's\"}\n", [FoundCall("w", '{"a": true, "b": "it\'s"}')]),
    "control characters": ('Action: w\nAction Input: {"a": "\t\x01}"}', [FoundCall("w", '{"a": "\\t\\u0001}"}')]),
    "broken arguments": ("Action: w\nAction Input: {a: 1}\nSo", ["Action: w\nAction Input: {a: 1}\nSo"]),
    "broken, then a call": (
        f'Action: w\nAction Input: {{"a": [1\n{WEATHER}',
        ['Action: w\nAction Input: {"a": [1', FoundCall("amap_weather", '{"location": "朝阳区"}')],
    ),
    "no object": ("Action: w\nAction Input: Paris\n", ["Action: w\nAction Input: Paris\n"]),
    "a line between": ("Action: w\nHm\nAction Input: {}", ["Action: w\nHm\nAction Input: {}"]),
    "beginnings": ("Act\nAction\n Action", ["Act\nAction\n Action"]),
}
CUT_OFF = [NESTED[:end] for end in range(len("Action:"), NESTED.rindex("}"))]


def read(pieces: Iterable[str], drop_unfinished: bool = False) -> list[str | FoundCall]:
    """What a reader tells, text put together."""
    reader = CallReader(drop_unfinished)
    found = [each for piece in pieces for each in reader.feed(piece)] + reader.finish()
    told: list[str | FoundCall] = []
    for each in found:
        last = told[-1] if told else None
        if isinstance(each, str) and isinstance(last, str):
            told[-1] = last + each
        else:
            told.append(each)
    return told


@pytest.mark.parametrize(("answer", "told"), ANSWERS.values(), ids=ANSWERS.keys())
def test_an_answer_is_read_alike_wherever_it_is_cut(answer: str, told: list[str | FoundCall]) -> None:
    assert read([answer]) == told
    assert read(answer) == told  # character by character
    for first, size in itertools.product(range(len(answer) + 1), range(1, 30)):
        assert read([answer[:first], answer[first : first + size], answer[first + size :]]) == told
    for size in (2, 3, 5):
        assert read(answer[at : at + size] for at in range(0, len(answer), size)) == told


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level BPE, as models have: its tokens also end within a Chinese character."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([answer for answer, _ in ANSWERS.values()], trainer)
    return made


@pytest.mark.parametrize(("answer", "told"), ANSWERS.values(), ids=ANSWERS.keys())
def test_an_answer_is_read_alike_by_tokens_one_or_several_at_a_time(
    answer: str, told: list[str | FoundCall], tokenizer: Tokenizer
) -> None:
    stream = DecodeStream(skip_special_tokens=True)
    texts = [stream.step(tokenizer, token) or "" for token in tokenizer.encode(answer).ids]
    assert "".join(texts) == answer
    for size in range(1, 5):
        assert read("".join(group) for group in _groups(texts, size)) == told
    for cut in range(len(texts)):
        assert read(["".join(texts[:cut]), "".join(texts[cut:])]) == told


def _groups(texts: Sequence[str], size: int) -> Iterable[Sequence[str]]:
    return (texts[at : at + size] for at in range(0, len(texts), size))


def test_a_call_is_told_with_its_last_bracket_and_text_before_it_at_once() -> None:
    reader = CallReader()
    assert reader.feed("Let me see.") == ["Let me see."]
    assert reader.feed('\n\nAction: w\nAction Input: {"a": "b"') == []
    assert reader.feed("}") == [FoundCall("w", '{"a": "b"}')]


@pytest.mark.parametrize("cut", CUT_OFF, ids=len)
def test_a_call_that_is_cut_off_is_no_call_under_a_grammar_and_text_without_one(cut: str) -> None:
    assert read(cut, drop_unfinished=True) == []
    assert read(f"Well.\n{cut}", drop_unfinished=True) == ["Well."]
    assert read(cut) == [cut]


def test_half_a_surrogate_pair_in_pythons_notation_is_told_as_it_is_written() -> None:
    assert decode_arguments("{'a': '\\ud83d'}") == '{"a": "\\ud83d"}'


def test_what_is_told_as_arguments_always_parses() -> None:
    for text in ('{"a": NaN}', "{'a': {1, 2}}", "{1: 2}", "{a}", "[]", "{'a': 1e999}", "{" * 5000, '{"a": 1,}'):
        arguments = decode_arguments(text)
        assert arguments is None or isinstance(json.loads(arguments), dict)
