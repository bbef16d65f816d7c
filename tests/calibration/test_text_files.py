# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Local calibration data: what is read of each format, and what is said of a line that is not right."""

import json
import os
from pathlib import Path

import pytest

from nemo_ptq.calibration.text_files import read_text_file
from nemo_ptq.config import is_text_file
from nemo_ptq.errors import PtqError

CHAT = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("data.jsonl", True),
        ("data.json", True),
        ("data.txt", True),
        ("./data", True),
        ("/data/set", True),
        ("wikitext", False),
        ("cnn_dailymail", False),
    ],
)
def test_a_path_is_told_from_a_hub_data_set(name: str, expected: bool) -> None:
    assert is_text_file(name) == expected


def test_jsonl_has_a_sample_on_each_line(tmp_path: Path) -> None:
    records = [{"text": "Grüße\nvon zwei Zeilen", "source": "a letter"}, {"messages": CHAT}]
    lines = "\n\n".join(json.dumps(record) for record in records) + "\n\n"
    assert list(read_text_file(write(tmp_path / "data.jsonl", lines))) == [records[0]["text"], CHAT]


def test_json_has_a_list_of_samples(tmp_path: Path) -> None:
    text = json.dumps([{"text": "one"}, {"messages": CHAT}], indent=2)
    assert list(read_text_file(write(tmp_path / "data.json", text))) == ["one", CHAT]


def test_txt_has_a_sample_on_each_line(tmp_path: Path) -> None:
    assert list(read_text_file(write(tmp_path / "data.txt", "one\n\n  two words\n   \nthree"))) == [
        "one",
        "  two words",
        "three",
    ]


def test_a_file_is_read_as_far_as_it_is_used(tmp_path: Path) -> None:
    samples = read_text_file(write(tmp_path / "data.jsonl", '{"text": "one"}\nnot JSON\n'))
    assert next(samples) == "one"
    with pytest.raises(PtqError, match="line 2"):
        next(samples)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "cut', "line 3: not JSON (Unterminated string starting at, column 10)"),
        ('["text"]', 'line 3: needs an object with "text" or "messages", not list'),
        (
            '{"content": "a", "id": 1}',
            'line 3: needs a "text" string or a "messages" list of role and content; found keys: content, id',
        ),
        (
            '{"text": 5}',
            'line 3: needs a "text" string or a "messages" list of role and content; found keys: text',
        ),
        (
            '{"messages": [{"role": "user"}]}',
            'line 3: needs a "text" string or a "messages" list of role and content; found keys: messages',
        ),
        ("{}", 'line 3: needs a "text" string or a "messages" list of role and content; found keys: none'),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = write(tmp_path / "data.jsonl", '{"text": "one"}\n\n' + line + "\n")
    with pytest.raises(PtqError) as caught:
        list(read_text_file(path))
    assert str(caught.value) == f"calibration_dataset={path}, {problem}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"text": "one"},\n {"text": }]', ", line 2: not JSON (Expecting value, column 11); for one object on each"),
        ('{"text": "one"}', ": the file must hold a JSON list, not dict"),
        ('[{"text": "one"}, "two"]', ', entry 1: needs an object with "text" or "messages", not str'),
    ],
)
def test_a_wrong_json_file_is_explained(tmp_path: Path, text: str, problem: str) -> None:
    path = write(tmp_path / "data.json", text)
    with pytest.raises(PtqError) as caught:
        list(read_text_file(path))
    assert str(caught.value).startswith(f"calibration_dataset={path}{problem}")


@pytest.mark.parametrize(("name", "text"), [("a.txt", " \n\n"), ("a.jsonl", ""), ("a.json", "[]")])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(PtqError, match="holds no sample"):
        list(read_text_file(write(tmp_path / name, text)))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PtqError, match=r"cannot be read: .*No such file"):
        list(read_text_file(str(tmp_path / "data.jsonl")))


def test_bytes_that_are_no_text_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(PtqError, match=r"cannot be read: .*utf-8"):
        list(read_text_file(str(tmp_path / "data.txt")))


def test_an_unknown_ending_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PtqError, match=r"ending must be one of \.jsonl, \.json, \.txt"):
        list(read_text_file(os.fspath(tmp_path / "data.parquet")))
