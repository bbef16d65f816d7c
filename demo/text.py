# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Text that every Python installation carries: the sources and docstrings of its standard library."""

import json
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Optional in many distributions of Python, test data, or tables without sentences.
_SKIPPED_FOLDERS = {
    *("__pycache__", "dist-packages", "site-packages"),
    *("distutils", "ensurepip", "idlelib", "lib2to3", "turtledemo"),
    *("encodings", "pydoc_data", "test", "tests"),
}
_PASSAGE_CHARACTERS = 1000
_FOLDS = 25
_CALIBRATION_PASSAGES = 512
_HELDOUT_PASSAGES = 128


@dataclass(frozen=True)
class Corpus:
    """Passages of about 1,000 characters. No file contributes to more than one of the three parts."""

    training: tuple[str, ...]
    calibration: tuple[str, ...]
    heldout: tuple[str, ...]


def load_corpus(library: Path | None = None) -> Corpus:
    """Reads the standard library of the running Python.

    A file's part is chosen by a hash of its path, so that it stays the same when other files come or go.

    Args:
        library: Folder to read instead.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    parts: dict[str, list[str]] = {"training": [], "calibration": [], "heldout": []}
    for path in _source_files(library):
        fold = zlib.crc32(path.encode()) % _FOLDS
        part = "heldout" if fold == 0 else "calibration" if fold <= 3 else "training"
        parts[part].extend(split_passages((library / path).read_text(encoding="utf-8", errors="replace")))
    return Corpus(
        training=tuple(parts["training"]),
        calibration=_spread(parts["calibration"], _CALIBRATION_PASSAGES),
        heldout=_spread(parts["heldout"], _HELDOUT_PASSAGES),
    )


def split_passages(source: str) -> Iterator[str]:
    """Yields pieces of at least 1,000 characters (the last one may be shorter) that begin and end at a blank line."""
    passage = ""
    for paragraph in source.split("\n\n"):
        passage += paragraph + "\n\n"
        if len(passage) >= _PASSAGE_CHARACTERS:
            yield passage.rstrip() + "\n"
            passage = ""
    if passage.strip():
        yield passage.rstrip() + "\n"


def write_jsonl(path: Path, passages: Iterable[str]) -> None:
    """Writes one JSON object with a `text` field on each line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in passages), encoding="utf-8")


def _source_files(library: Path) -> list[str]:
    """Paths relative to the library, with forward slashes, sorted."""
    paths = (path.relative_to(library) for path in library.rglob("*.py"))
    return sorted(path.as_posix() for path in paths if _SKIPPED_FOLDERS.isdisjoint(path.parts))


def _spread(passages: Sequence[str], count: int) -> tuple[str, ...]:
    """At most `count` passages, evenly spaced, so that every file is represented."""
    step = max(1, len(passages) // count)
    return tuple(passages[::step][:count])
