# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Which formats a value of `export_format` names."""

from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.config import NO_QUANT, ExportConfig, read_list
from nemo_ptq.errors import PtqError
from nemo_ptq.export.formats import FORMATS, Format, register
from nemo_ptq.plugins import locate
from nemo_ptq.quantization.algorithms import ALGORITHMS


@pytest.mark.parametrize(
    ("value", "names", "has_subdirectories"),
    [
        ("hf", ("hf",), False),
        (["hf"], ("hf",), True),
        ("[hf]", ("hf",), True),
        ("[trtllm, 'hf']", ("trtllm", "hf"), True),
        ("trtllm,hf", ("trtllm", "hf"), True),
        (["trtllm", "hf", "trtllm"], ("trtllm", "hf"), True),
    ],
)
def test_a_name_a_list_or_the_text_of_one(value: Any, names: tuple[str, ...], has_subdirectories: bool) -> None:
    config = ExportConfig("out", export_format=value)
    assert (config.formats, config.has_subdirectories) == (names, has_subdirectories)


@pytest.mark.parametrize("value", [None, 3, [3], {"hf": 1}])
def test_anything_else_names_none(value: Any) -> None:
    assert read_list(value) == ()


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
def test_what_a_record_names_is_there(format: Format) -> None:
    paths = (
        format.packed_export,
        format.model_check,
        format.model_obstacle,
        format.state_adapter,
        format.model_writer,
    )
    assert all(callable(locate(path)) for path in paths if path is not None)
    assert format.is_packed == (format.model_writer is None)


def test_a_name_is_taken_once() -> None:
    with pytest.raises(PtqError, match="there is an export format hf already"):
        register(Format("hf", "another"))


def documented() -> dict[str, dict[str, str]]:
    """The first table of docs/formats.md: rows by name, each with its text for every format."""
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    table = text[text.index("\n| |") : text.index("\n\nWhat a format cannot hold")].strip().splitlines()
    head, _, *rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


@pytest.mark.parametrize("format", FORMATS)
def test_the_documents_table_says_what_a_format_can_carry(format: str) -> None:
    record, table = FORMATS[format], {name: row[format] for name, row in documented().items()}
    for algorithm in ALGORITHMS:
        reason = record.refused.get(algorithm)
        if reason is None:
            assert table[algorithm].startswith("yes")
        else:
            assert table[algorithm].startswith("use ")
            way_out = table[algorithm].removeprefix("use ")
            assert reason.endswith((f"use export_format={way_out}", f"use {way_out}"))
    assert set(table["mixtures of experts"].split(", ")) == {*record.experts, NO_QUANT} - record.refused.keys()
    assert table["families"].startswith("all with a Hugging Face class" if record.is_hugging_face else "all")
    assert (table["inference TP, PP"] == "cut for them") == record.has_parallelism


def test_the_documents_table_has_every_format() -> None:
    assert all(list(row) == list(FORMATS) for row in documented().values())
