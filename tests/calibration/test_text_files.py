# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Local calibration data: what is read of each format, and what is said of a line that is not right."""

import gzip
import json
import os
from pathlib import Path
from typing import Any, cast

import pyarrow
import pytest
from pyarrow import parquet

from nemo_ptq.calibration import text_files
from nemo_ptq.calibration.chats import Chat
from nemo_ptq.calibration.text_files import read_text_file
from nemo_ptq.config import is_data_file
from nemo_ptq.errors import PtqError

ANOTHER = "; ,column=NAME behind the data set names another"
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
        ("owner/name", False),
        ("owner/name:train", False),
        ("folder/of/data", True),
        ("data.parquet", True),
        ("DATA.JSONL", True),
        ("data.jsonl.gz", True),
        ("data.csv", True),
        ("cnn_dailymail", False),
    ],
)
def test_a_path_is_told_from_a_hub_data_set(name: str, expected: bool) -> None:
    assert is_data_file(name) == expected


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
        (
            '["text"]',
            'line 3: needs an object with "text" or "messages", not list; for a list of objects, name the file .json',
        ),
        ("[", "line 3: not JSON (Expecting value, column 2); for a list of objects, name the file .json"),
        (
            '{"content": "a", "id": 1}',
            'line 3: needs a "text" string or a "messages" list of role and content; found keys: content, id' + ANOTHER,
        ),
        ('{"text": 5}', "line 3: text is of type int, and must be a text, or a list of messages"),
        (
            '{"messages": [{"role": "user"}]}',
            "line 3: a message needs role and content; found keys: role",
        ),
        ('{"messages": ["hello"]}', "line 3: a message must be an object with role and content, not str"),
        (
            '{"conversations": [{"from": "nobody", "value": "a"}]}',
            "line 3: a message from 'nobody' is not known: it must have a text as value, and be from human, user, "
            "prompter, gpt, chatgpt, assistant, bot, model, system, tool, observation, function_response, "
            "function_call",
        ),
        (
            '{"text": "a \\ud83d b"}',
            "line 3: the text has half of a character ('\\ud83d' at character 2), which no tokenizer takes: write the "
            "file again in UTF-8",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "line 3: the content of a message must be a text, or a list of parts with texts; take the sample out",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": null}]}]}',
            "line 3: the content of a message must be a text, or a list of parts with texts; take the sample out",
        ),
        (
            '{"messages": [{"role": "assistant", "tool_calls": "add(2, 3)"}]}',
            "line 3: tool_calls must be a list of calls, not str",
        ),
        (
            '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}',
            "line 3: arguments of a tool call: not JSON (Expecting property name enclosed in double quotes: line 1 "
            "column 2 (char 1))",
        ),
        ("{}", 'line 3: needs a "text" string or a "messages" list of role and content; found keys: none' + ANOTHER),
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
        ('{"data": []}', ": the file must hold a JSON list, not dict; put its samples into [ ], or name a file with a"),
        ('[{"text": "one"}, "two"]', ', entry 1: needs an object with "text" or "messages", not str'),
    ],
)
def test_a_wrong_json_file_is_explained(tmp_path: Path, text: str, problem: str) -> None:
    path = write(tmp_path / "data.json", text)
    with pytest.raises(PtqError) as caught:
        list(read_text_file(path))
    assert str(caught.value).startswith(f"calibration_dataset={path}{problem}")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a.txt", ", line 2: has more than the 64 characters"),
        ("a.jsonl", ", line 2: has more than the 64 characters"),
        ("a.json", ": has more than the 64 bytes"),
    ],
)
def test_what_does_not_fit_into_memory_is_not_read(
    tmp_path: Path, name: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "_MOST_CHARACTERS", 64)
    monkeypatch.setattr(text_files, "_MOST_BYTES", 64)
    path = write(tmp_path / name, '{"text": "one"}\n' + "x" * 65 + "\n")
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
    with pytest.raises(PtqError, match=r"cannot be read: it is not UTF-8 \(.* at byte 3\); save it in UTF-8"):
        list(read_text_file(str(tmp_path / "data.txt")))
    (tmp_path / "data.json").write_bytes('[{"text": "one"}]'.encode("utf-16"))
    with pytest.raises(PtqError, match=r"cannot be read: it is not UTF-8 \(.*\); save it in UTF-8"):
        list(read_text_file(str(tmp_path / "data.json")))


def test_a_compressed_file_is_to_be_unpacked(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"text": "one"}\n')
    for name, message in {
        "data.jsonl": "cannot be read: it is compressed; unpack it first",
        "data.jsonl.gz": r"ending must be one of .*\.parquet; unpack it first",
    }.items():
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(PtqError, match=message):
            list(read_text_file(str(tmp_path / name)))


def test_line_ends_byte_order_marks_and_upper_case_endings_of_other_systems(tmp_path: Path) -> None:
    (tmp_path / "DATA.JSONL").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    assert list(read_text_file(str(tmp_path / "DATA.JSONL"))) == ["one", "two"]


def test_an_unknown_ending_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PtqError, match=r"ending must be one of \.jsonl, \.json, \.txt, \.parquet"):
        list(read_text_file(os.fspath(tmp_path / "data.csv")))


def write_parquet(path: Path, **columns: list[object]) -> str:
    parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def test_parquet_has_a_sample_in_each_row(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "data.parquet", text=["one", "zwei\nZeilen"], id=[1, 2])
    assert list(read_text_file(file)) == ["one", "zwei\nZeilen"]
    chats = write_parquet(tmp_path / "chats.parquet", messages=[CHAT, CHAT[:1]])
    assert list(read_text_file(chats)) == [CHAT, CHAT[:1]]


def test_a_column_is_named(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "data.parquet", text=["title"], body=["the text"], size=[3])
    assert list(read_text_file(file, "body")) == ["the text"]
    with pytest.raises(PtqError, match="row 1: size is of type int, and must be a text"):
        list(read_text_file(file, "size"))
    with pytest.raises(PtqError, match=r"a \.txt file has no columns; leave column out"):
        list(read_text_file(write(tmp_path / "data.txt", "one"), "body"))


def test_a_damaged_parquet_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(PtqError, match=r"data\.parquet is not a parquet file that can be read \(.*\)"):
        list(read_text_file(write(tmp_path / "data.parquet", "PAR1 is not enough")))


def read_one(tmp_path: Path, record: dict[str, object]) -> object:
    (sample,) = read_text_file(write(tmp_path / "data.jsonl", json.dumps(record)))
    return sample


def test_sharegpt_conversations_are_chats(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]
    assert read_one(tmp_path, {"conversations": turns}) == CHAT
    system = {"role": "system", "content": "Be brief."}
    assert read_one(tmp_path, {"conversations": turns, "system": "Be brief."}) == [system, *CHAT]
    assert read_one(tmp_path, {"conversations": CHAT}) == CHAT
    capitals = [{"from": turn["from"].upper(), "value": turn["value"]} for turn in turns]
    assert read_one(tmp_path, {"conversations": capitals}) == CHAT


def test_sharegpt_conversations_call_tools(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "How warm is it?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bonn"}}'},
        {"from": "observation", "value": "21"},
        {"from": "gpt", "value": "21 degrees."},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": turns}))
    (messages,) = read_text_file(str(tmp_path / "a.jsonl"))
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    turns[1]["value"] = "weather()"
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": turns}))
    with pytest.raises(PtqError, match=r"line 1: a message from 'function_call': not JSON"):
        list(read_text_file(str(tmp_path / "a.jsonl")))


def test_rows_without_a_text_are_empty_samples(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "some"}\n{"text": null, "messages": null}\n')
    assert list(read_text_file(str(tmp_path / "a.jsonl"))) == ["", "some", ""]


def test_chats_written_as_json_into_a_column_are_chats(tmp_path: Path) -> None:
    written = json.dumps(CHAT)
    assert read_one(tmp_path, {"messages": written}) == CHAT
    (sample,) = read_text_file(write_parquet(tmp_path / "chats.parquet", body=[written]), "body")
    assert sample == CHAT
    for text in ("[1, 2]", "[]", "[not JSON", '[{"name": "a JSON file"}]', "User: hello"):
        assert read_one(tmp_path, {"messages": text}) == text
    assert read_one(tmp_path, {"text": written}) == written


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def test_tools_and_their_calls_are_of_the_chat(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    messages = [
        *CHAT[:1],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "4"}], "tool_call_id": "1"},
    ]
    called = {**call, "function": {"name": "add", "arguments": {"a": 2}}}
    expected = [
        *CHAT[:1],
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    assert read_one(tmp_path, {"messages": messages, "tools": [TOOL]}) == Chat(expected, [TOOL])
    assert read_one(tmp_path, {"messages": messages, "tools": json.dumps([TOOL])}) == Chat(expected, [TOOL])
    assert read_one(tmp_path, {"messages": messages, "tools": None}) == expected
    older = [*CHAT[:1], {"role": "assistant", "content": None, "function_call": call["function"]}]
    (_, answer) = cast(list[dict[str, Any]], read_one(tmp_path, {"messages": older}))
    assert answer["tool_calls"] == [{"type": "function", "function": called["function"]}]
