"""Tokens of training rows, counted as training would; tokenizers are trained here, on a few lines."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import InvalidData
from services.conversion.tokens import REMEMBERED, Tokenizer, open_tokenizer

TEXTS = [
    "You are a helpful assistant. You have the following tools: weather, calculator.",
    "# 工具\n\n## 你拥有如下工具：\n\nweather: weather API。查询天气 输入参数: []",
    'Action: weather\nAction Input: {"city": "巴黎"}\n\nObservation: <result>sunny</result>\nAnswer:',
]
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def message(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ROWS = [
    [message("system", TEXTS[0]), message("user", "How is the weather?"), message("assistant", TEXTS[2])],
    [message("system", f"\n{TEXTS[1]}"), message("user", "巴黎天气怎么样？"), message("assistant", "晴。")],
    [
        message("system", TEXTS[0]),
        message("user", "Hi"),
        message("assistant", "Hello!"),
        message("user", "How is the weather?"),
        message("assistant", "Action: weather\nAction Input: {}\n", loss=True),
        message("assistant", "\nObservation: <result>sunny</result>\nAnswer:", loss=False),
        message("assistant", " It is sunny.", loss=True),
    ],
    [message("user", ""), message("assistant", "I have no system prompt.")],
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with a byte-level tokenizer, as SmolLM2 and Qwen2 have one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    made = tmp_path_factory.mktemp("model")
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(made / "tokenizer.json"))
    return made


@pytest.fixture
def tiktoken_folder(tmp_path: Path) -> Path:
    """A model's folder as Qwen-7B-Chat has it."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"he", b"ll", b"hell", b"hello", "é".encode()]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (tmp_path / "qwen.tiktoken").write_text("\n".join(lines) + "\n")
    return tmp_path


def chatml(row: list[dict[str, Any]]) -> str:
    """A row as training puts it into one text."""
    text, before = "", ""
    for said in row:
        if before == "assistant" == said["role"]:
            text = text.removesuffix("<|im_end|>\n") + said["content"] + "<|im_end|>\n"
        else:
            text += f"<|im_start|>{said['role']}\n{said['content']}<|im_end|>\n"
        before = said["role"]
    return text


@pytest.mark.parametrize("row", ROWS[:2] + ROWS[3:])
def test_a_row_has_as_many_tokens_as_its_text_in_chatml(folder: Path, row: list[dict[str, Any]]) -> None:
    from tokenizers import Tokenizer as Library

    whole = Library.from_file(str(folder / "tokenizer.json"))
    whole.no_truncation()
    whole.no_padding()
    assert open_tokenizer(folder).count(row) == len(whole.encode(chatml(row), add_special_tokens=False))


def test_messages_of_the_assistant_that_follow_each_other_are_one(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    apart = [tokenizer.count([said]) for said in ROWS[2]]
    role = tokenizer.count([message("assistant", "")])
    assert tokenizer.count(ROWS[2]) == sum(apart) - 2 * role


def test_rows_counted_together_have_the_same_lengths(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    assert tokenizer.count_rows(ROWS * 3) == [open_tokenizer(folder).count(row) for row in ROWS] * 3
    assert tokenizer.count_rows([]) == []


def test_what_rows_have_in_common_is_counted_once() -> None:
    asked: list[str] = []

    def count_texts(texts: Any) -> list[int]:
        asked.extend(texts)
        return [len(text) for text in texts]

    tokenizer = Tokenizer(count_texts)
    tokenizer.count_rows([ROWS[0], ROWS[2]])
    tokenizer.count(ROWS[0])
    assert asked.count(f"system\n{TEXTS[0]}") == 1
    assert asked.count("user\nHow is the weather?") == 2  # once for each call


def test_few_system_prompts_are_remembered_and_no_long_ones() -> None:
    tokenizer = Tokenizer(lambda texts: [len(text) for text in texts])
    for number in range(REMEMBERED + 50):
        tokenizer.count([message("system", str(number))])
    tokenizer.count([message("system", "x" * 20_000)])
    remembered = tokenizer._system_prompts
    assert len(remembered) == REMEMBERED
    assert f"system\n{REMEMBERED + 49}" in remembered


def test_truncation_and_padding_in_the_file_are_not_followed(folder: Path) -> None:
    assert open_tokenizer(folder).count([message("assistant", "the weather " * 100)]) > 100


def test_qwens_first_tokenizer_is_read(tiktoken_folder: Path) -> None:
    tokenizer = open_tokenizer(tiktoken_folder)
    header = len("assistant\n")
    assert tokenizer.count([message("assistant", "hello")]) == 3 + header + 1
    assert tokenizer.count([message("assistant", "hello hello")]) == 3 + header + 3
    assert tokenizer.count([message("assistant", "e\u0301")]) == 3 + header + 1  # é in two parts is é
    assert tokenizer.count([message("assistant", "<|im_end|>")]) == 3 + header + len("<|im_end|>")


def test_tokenizer_json_is_preferred(folder: Path, tiktoken_folder: Path) -> None:
    expected = open_tokenizer(folder).count(ROWS[0])
    (tiktoken_folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert open_tokenizer(tiktoken_folder).count(ROWS[0]) == expected


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenization_qwen.py", "vocab.json"])
def test_a_folder_without_a_tokenizer_that_we_read_is_refused_and_its_code_is_not_run(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("raise SystemExit('was run')")
    with pytest.raises(InvalidData, match=r"neither tokenizer\.json nor qwen\.tiktoken"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "nothing", "{}", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_json_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InvalidData, match=r"tokenizer\.json is no tokenizer"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "incomplete"),
        ("IQ== 0\nIg==\n", "line 2 is no token"),
        ("IQ== 0\n!!! 1\n", "line 2 is no token"),
        ("IQ== one\n", "line 1 is no token"),
        ("IQ== 0\nIg== 0\n", "incomplete"),
    ],
)
def test_a_broken_tiktoken_file_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "qwen.tiktoken").write_text(text)
    with pytest.raises(InvalidData, match=said):
        open_tokenizer(tmp_path)


def test_the_libraries_are_loaded_when_a_tokenizer_is_opened() -> None:
    code = "import sys, services.conversion.tokens; print({'tokenizers', 'tiktoken', 'regex'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_library_keeps_to_one_thread(folder: Path) -> None:
    open_tokenizer(folder)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
