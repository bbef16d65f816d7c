# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Files from outside, read as data: regular files only, of bounded size and depth. Knows no format but JSON and YAML.

Opening a file never waits (a pipe would), parsing it runs nothing that it names, and every problem is reported in one
line.
"""

import io
import json
import math
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

import yaml

from nemo_ptq.errors import PtqError

# The largest documents that people have: a tokenizer.json of 256 thousand tokens has 33 MB.
_MOST_BYTES = 2**27
# libyaml takes about a hundred times as long for a byte, and NeMo's model.yaml has some kilobytes.
_MOST_YAML_BYTES = 2**24
_DEEPEST = 100
# Values of a YAML document, once its aliases are written out.
_MOST_YAML_VALUES = 10**6
_MOST_DIGITS = 100
_NUMBERS_BEGIN = "+-.0123456789"


class FileError(PtqError):
    """A file that cannot be read, or does not hold what it should.

    Args:
        path: The file.
        reason: What is wrong with it; the message is the path and this.
    """

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, " ".join(reason.split())
        super().__init__(f"{path} {self.reason}")


def open_file(path: Path) -> io.BufferedReader:
    """Opens a regular file for reading, without waiting where it is something else.

    Raises:
        FileError: If it cannot be opened, or is not a regular file.
    """
    return io.BufferedReader(open_unbuffered(path))


def open_unbuffered(path: Path) -> io.FileIO:
    """Does what :func:`open_file` does, for readers of large pieces.

    Raises:
        FileError: If it cannot be opened, or is not a regular file.
    """
    try:
        # Without O_NONBLOCK the opening of a pipe waits for somebody to write into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in its name
        raise FileError(path, f"cannot be read: {error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileError(path, "cannot be read: it is not a regular file")
    return io.FileIO(descriptor)


def check_regular(path: Path) -> Path:
    """Returns the path of a regular file, for libraries that open it themselves.

    Raises:
        FileError: If there is none.
    """
    open_file(path).close()
    return path


def read_text(path: Path, most: int = _MOST_BYTES) -> str:
    """Reads a text file in UTF-8; a byte order mark is left out.

    Args:
        path: The file.
        most: Maximum size in bytes.

    Raises:
        FileError: If it cannot be read, is larger, or is not UTF-8.
    """
    with open_file(path) as file:
        try:
            content = file.read(most + 1)
        except OSError as error:
            raise FileError(path, f"cannot be read: {error.strerror}") from error
    if len(content) > most:
        raise FileError(path, f"has more than the {most} bytes that such a file may have")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(path, f"cannot be read: it is not UTF-8 ({error.reason} at byte {error.start})") from error


def parse_json(text: str, *, finite: bool = True) -> Any:
    """Parses JSON.

    Args:
        text: The document.
        finite: Refuse NaN and infinities, which JSON does not have and Python writes.

    Raises:
        ValueError: If it is not JSON, is nested too deeply, or has a number too large for any use.
    """
    try:
        return json.loads(
            text,
            parse_constant=_refuse if finite else float,
            parse_float=_finite if finite else float,
            parse_int=_integer,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, *, finite: bool = True) -> Any:
    """Reads a JSON file.

    Args:
        path: The file.
        finite: As for :func:`parse_json`.

    Raises:
        FileError: If it cannot be read or is not JSON.
    """
    try:
        return parse_json(read_text(path), finite=finite)
    except ValueError as error:
        raise FileError(path, f"is not JSON: {error}") from error


def read_json_object(path: Path, *, infinite: Collection[str] = ()) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Args:
        path: The file.
        infinite: Keys whose values may be NaN or infinities, or hold some, although JSON has none.

    Raises:
        FileError: If it cannot be read, is not JSON, or holds something else.
    """
    try:
        content = read_json(path)
    except FileError:
        content = read_json(path, finite=False) if infinite else None
        if not isinstance(content, dict) or not _is_finite({k: v for k, v in content.items() if k not in infinite}):
            raise
    if not isinstance(content, dict):
        raise FileError(path, f"holds a {type(content).__name__}, expected a JSON object")
    return content


def _is_finite(content: Any) -> bool:
    """Whether what a JSON file holds has no NaN and no infinity."""
    try:
        json.dumps(content, allow_nan=False)
    except ValueError:
        return False
    return True


class _PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Makes plain data only; whatever has a tag of its own becomes None instead of an object."""


_PlainLoader.add_multi_constructor("!", lambda loader, suffix, node: None)
_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def read_yaml(path: Path) -> Any:
    """Reads a YAML file as plain data; objects that its tags name are not made, and None stands for them.

    Raises:
        FileError: If it cannot be read, is not YAML, is nested too deeply, or has aliases that multiply.
    """
    documents = read_yaml_documents(path)
    if len(documents) > 1:
        raise FileError(path, f"is not YAML of one document: it has {len(documents)}")
    return documents[0] if documents else None


def read_yaml_documents(path: Path) -> list[Any]:
    """Reads all documents of a YAML file, as :func:`read_yaml` reads one.

    Raises:
        FileError: As there.
    """
    text = read_text(path, _MOST_YAML_BYTES)
    try:
        _check_yaml(text)
        return list(yaml.load_all(text, Loader=_PlainLoader))
    except (ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
        raise FileError(path, f"is not YAML: {error}") from error


def _check_yaml(text: str) -> None:
    """Refuses documents that would take the parser or a reader of the data too long."""
    sizes: dict[str, int] = {}
    # Name and values so far of each collection that is open.
    open_collections: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, Loader=_PlainLoader):
        anchor, size = getattr(event, "anchor", None), 1
        if isinstance(event, yaml.CollectionStartEvent):
            open_collections.append((anchor, 0))
            if len(open_collections) > _DEEPEST:
                raise ValueError(f"it is nested more than {_DEEPEST} deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, inner = open_collections.pop()
            size += inner
        elif isinstance(event, yaml.AliasEvent):
            size, anchor = sizes.get(str(anchor), 1), None
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        elif event.implicit[0] and len(event.value) > _MOST_DIGITS and event.value[0] in _NUMBERS_BEGIN:
            raise ValueError(f"it has a number of more than {_MOST_DIGITS} digits")
        if anchor is not None:
            sizes[anchor] = size
        outer, total = open_collections[-1]
        open_collections[-1] = outer, total + size
        if total + size > _MOST_YAML_VALUES:
            raise ValueError(f"it has more than {_MOST_YAML_VALUES} values")


def inside(directory: Path, name: str) -> Path:
    """Returns the path of an entry that a file names, below the directory that the file belongs to.

    Raises:
        FileError: If the name leads out of the directory, or is none.
    """
    path = Path(name)
    if not name or "\0" in name or path.is_absolute() or ".." in path.parts:
        raise FileError(directory, f"has a file that names {name!r}: it must name an entry below its directory")
    return directory / path


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"a number of {len(text)} characters is too large")
    return value


def _integer(text: str) -> int:
    # Python limits the digits as well, but not in every version, and in thousands.
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"it has a number of more than {_MOST_DIGITS} digits")
    return int(text)
