# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Local text files as calibration data. Imports nothing heavy: arguments are checked with it before a job starts."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

from nemo_ptq.calibration.chats import Sample, read_sample
from nemo_ptq.config import COMPRESSED_FILES, DATA_FILES
from nemo_ptq.errors import PtqError
from nemo_ptq.untrusted import FileError, open_file, parse_json

# How a file compressed with gzip begins.
_GZIP = b"\x1f\x8b"
_LIST_ENDING = "; for a list of objects, name the file .json"
# Limits of what is in memory at once: a line, and a whole .json file.
_MOST_CHARACTERS, _MOST_BYTES = 1 << 27, 1 << 30
# Rows of a parquet file that are made into objects at a time.
_PARQUET_ROWS = 64


def read_text_file(path: str, column: str | None = None) -> Iterator[Sample]:
    """Yields the samples of a file, one after the other, without reading it whole where its format allows.

    ``.jsonl`` has one JSON object on a line, ``.json`` a list of such objects, ``.parquet`` a row for each; see
    :func:`~nemo_ptq.calibration.chats.read_sample`. ``.txt`` has one text on a line. Blank lines are skipped.

    Args:
        path: The file.
        column: The key or column with the text or the messages, where it is none of the usual ones.

    Raises:
        PtqError: If the file cannot be read or holds no sample, or a line is not what the format wants; the message
            gives the line's number.
    """
    source = Path(path).expanduser()
    ending = source.suffix.lower()
    if ending not in DATA_FILES:
        fix = "; unpack it first" if ending in COMPRESSED_FILES else ""
        raise PtqError(f"calibration_dataset={path}: the file's ending must be one of {', '.join(DATA_FILES)}{fix}")
    empty = True
    try:
        for sample in _READERS[ending](source, column):
            empty = False
            yield sample
    except FileError as error:
        raise PtqError(f"calibration_dataset={path} {error.reason}") from error
    except UnicodeDecodeError as error:
        raise PtqError(f"calibration_dataset={path} cannot be read: {_not_utf8(source, error)}") from error
    except OSError as error:
        raise PtqError(f"calibration_dataset={path} cannot be read: {error}") from error
    if empty:
        raise PtqError(f"calibration_dataset={path} holds no sample; give a file with at least one text")


def _not_utf8(source: Path, error: UnicodeDecodeError) -> str:
    """What is wrong with a file that is not UTF-8, and what to do about it."""
    with open_file(source) as file:
        beginning = file.read(len(_GZIP))
    if beginning == _GZIP:
        return "it is compressed; unpack it first"
    return f"it is not UTF-8 ({error.reason} at byte {error.start}); save it in UTF-8"


def _lines(source: Path) -> Iterator[tuple[int, str]]:
    # A byte order mark is not part of the first text.
    with io.TextIOWrapper(open_file(source), encoding="utf-8-sig") as file:
        for number, line in enumerate(iter(lambda: file.readline(_MOST_CHARACTERS + 1), ""), start=1):
            if len(line) > _MOST_CHARACTERS:
                raise PtqError(
                    f"calibration_dataset={source}, line {number}: has more than the {_MOST_CHARACTERS} characters "
                    "of the longest line; put one sample on each line"
                )
            if line.strip():
                yield number, line.rstrip("\n")


def _read_txt(source: Path, column: str | None) -> Iterator[Sample]:
    if column is not None:
        raise PtqError(f"calibration_dataset={source},column={column}: a .txt file has no columns; leave column out")
    return (line for _, line in _lines(source))


def _read_jsonl(source: Path, column: str | None) -> Iterator[Sample]:
    for number, line in _lines(source):
        where = f"calibration_dataset={source}, line {number}"
        try:
            record = parse_json(line, finite=False)
        except json.JSONDecodeError as error:
            hint = _LIST_ENDING if line.strip() == "[" else ""
            raise PtqError(f"{where}: not JSON ({error.msg}, column {error.colno}){hint}") from error
        except ValueError as error:
            raise PtqError(f"{where}: not JSON ({error})") from error
        if isinstance(record, list):
            raise PtqError(f'{where}: needs an object with "text" or "messages", not list{_LIST_ENDING}')
        yield read_sample(record, where, column)


def _read_json(source: Path, column: str | None) -> Iterator[Sample]:
    try:
        with open_file(source) as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise PtqError(
                f"calibration_dataset={source}: has more than the {_MOST_BYTES} bytes of a file that is read whole; "
                "write one object on each line, and name the file .jsonl"
            )
        records = parse_json(content.decode("utf-8-sig"), finite=False)
    except json.JSONDecodeError as error:
        raise PtqError(
            f"calibration_dataset={source}, line {error.lineno}: not JSON ({error.msg}, column {error.colno}); "
            "for one object on each line, name the file .jsonl"
        ) from error
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise PtqError(f"calibration_dataset={source}: not JSON ({error})") from error
    if not isinstance(records, list):
        raise PtqError(
            f"calibration_dataset={source}: the file must hold a JSON list, not {type(records).__name__}; put its "
            "samples into [ ], or name a file with an object on each line .jsonl"
        )
    for index, record in enumerate(records):
        yield read_sample(record, f"calibration_dataset={source}, entry {index}", column)


def _read_parquet(source: Path, column: str | None) -> Iterator[Sample]:
    import pyarrow
    from pyarrow import parquet

    with open_file(source) as file:
        number = 0
        try:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=_PARQUET_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield read_sample(record, f"calibration_dataset={source}, row {number}", column)
        except pyarrow.ArrowException as error:
            reason = str(error).partition("\n")[0]
            raise PtqError(f"calibration_dataset={source} is not a parquet file that can be read ({reason})") from error


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".txt": _read_txt, ".parquet": _read_parquet}
