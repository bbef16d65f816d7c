# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Files from outside are read as data: what is not a file, too large, too deep or damaged is named in one line."""

import json
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from nemo_ptq.untrusted import (
    FileError,
    check_regular,
    inside,
    open_file,
    parse_json,
    read_json,
    read_json_object,
    read_yaml,
)


def _socket(path: Path) -> None:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.close()


def _link_loop(path: Path) -> None:
    path.with_name("other").symlink_to(path)
    path.symlink_to(path.with_name("other"))


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "it is not a regular file"),
    "socket": (_socket, "No such device or address"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is not a regular file"),
    "directory": (Path.mkdir, "it is not a regular file"),
    "links in a circle": (_link_loop, "Too many levels of symbolic links"),
    "link to nothing": (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
    "nothing": (lambda path: None, "No such file or directory"),
}


@pytest.mark.timeout(20)  # the opening of a pipe would wait for ever
@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("read", [open_file, check_regular, read_json, read_yaml])
def test_what_is_no_file_is_refused_without_waiting(
    read: Callable[[Path], object], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, reason = NO_FILES[kind]
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make(Path("a.json"))
    with pytest.raises(FileError) as caught:
        read(Path("a.json"))
    assert str(caught.value) == f"a.json cannot be read: {reason}"


def test_a_name_with_a_nul_is_refused() -> None:
    with pytest.raises(FileError, match="cannot be read: embedded null byte"):
        open_file(Path("a\0b"))


def test_a_file_is_opened_for_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    with open_file(tmp_path / "a") as file:
        assert file.read() == b"0123456789"
        assert stat.S_ISREG(os.fstat(file.fileno()).st_mode)


@pytest.mark.parametrize(
    "content",
    [b'{"a": [1, 2.5, "x"]}', b'\xef\xbb\xbf{"a": [1, 2.5, "x"]}', b'{"a":\r\n [1, 2.5, "x"]\r\n}\r\n'],
    ids=["plain", "byte order mark", "CRLF"],
)
def test_json_is_read_as_editors_write_it(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json") == read_json_object(tmp_path / "a.json") == {"a": [1, 2.5, "x"]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not JSON: Expecting value"),
        (b'{"a": 1', "is not JSON: Expecting"),
        (b'{"a": NaN}', "is not JSON: NaN is not a JSON number"),
        (b'{"a": -Infinity}', "is not JSON: -Infinity is not a JSON number"),
        (b'{"a": 1e999}', "is not JSON: a number of 5 characters is too large"),
        (b'{"a": ' + b"7" * 5000 + b"}", "is not JSON: it has a number of more than 100 digits"),
        (b"[" * 100_000, "is not JSON: it is nested too deeply"),
        (b'{"a":' * 100_000, "is not JSON: it is nested too deeply"),
        (b'{"a": "\0"}', "is not JSON: Invalid control character"),
        (b'{"a": \0}', "is not JSON: Expecting value"),
        ('{"a": "é"}'.encode("latin-1"), "cannot be read: it is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "cannot be read: it is not UTF-8"),
        (b"[1]", "holds a list, expected a JSON object"),
    ],
    ids=str,
)
def test_damaged_json_is_refused_in_a_line(content: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(FileError) as caught:
        read_json_object(file)
    message = str(caught.value)
    assert message.startswith(f"{file} {reason}")
    assert "\n" not in message
    assert len(message) < len(str(file)) + 200


def test_numbers_that_json_lacks_are_read_where_python_writes_them() -> None:
    assert parse_json("[Infinity, 1.5]", finite=False) == [float("inf"), 1.5]


def test_a_file_without_end_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    with file.open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(FileError, match="has more than the 134217728 bytes that such a file may have"):
        read_json(file)


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    text = (
        f"a: !!python/object/apply:os.mkdir [{str(marker)!r}]\nb: !!python/name:os.system ''\nc: !mine {{x: 1}}\nd: 2\n"
    )
    (tmp_path / "a.yaml").write_text(text)
    assert read_yaml(tmp_path / "a.yaml") == {"a": None, "b": None, "c": None, "d": 2}
    assert not marker.exists()
    yaml.unsafe_load(text.split("\n")[0])
    assert marker.exists()  # the file was dangerous indeed


def test_yaml_may_name_a_value_twice(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &x [1, 2]\nb: *x\nc: &y 3\nd: [*y, *y]\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": [1, 2], "b": [1, 2], "c": 3, "d": [3, 3]}


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [\n", "while parsing"),
        ("[" * 10_000, "nested more than 100 deep"),
        ("".join(" " * i + f"a{i}:\n" for i in range(200)), "nested more than 100 deep"),
        ("a: " + "7" * 5000, "a number of more than 100 digits"),
        ("a: 1" + ":1" * 100_000, "a number of more than 100 digits"),
        (LAUGHS, "more than 1000000 values"),
        ("a: *nowhere\n", "undefined alias"),
        ("a: \0", "characters are not allowed"),
        ("? [a, b]\n: 1\n? {c: d}\n: 2\n", "unhashable"),
    ],
    ids=["cut", "deep lists", "deep mappings", "digits", "base 60", "aliases", "no alias", "NUL", "keys"],
)
def test_damaged_yaml_is_refused_in_a_line(text: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(FileError) as caught:
        read_yaml(file)
    assert str(caught.value).startswith(f"{file} is not YAML: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a\0b"])
def test_names_that_lead_out_of_a_directory_are_refused(name: str) -> None:
    with pytest.raises(FileError, match="it must name an entry below its directory"):
        inside(Path("weights"), name)
    assert inside(Path("weights"), "__0_0.distcp") == Path("weights/__0_0.distcp")


def test_what_is_read_is_what_the_library_reads(tmp_path: Path) -> None:
    content = {"a": [1, -2, 3.5, 1e-6, True, None, "é\n\u2028"], "b": {"c": {}}, "": 10**50}
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert read_json(tmp_path / "a.json") == content
