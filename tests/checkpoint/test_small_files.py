# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A damaged file beside the weights is named: readers would go on without it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_ptq.checkpoint.small_files import check_small_files
from nemo_ptq.errors import PtqError


def cut(file: Path) -> None:
    file.write_text('{"eos_tok')


def list_instead(file: Path) -> None:
    file.write_text("[]")


def pipe(file: Path) -> None:
    os.mkfifo(file)


def link(file: Path) -> None:
    file.symlink_to("nowhere")


@pytest.mark.parametrize("damage", [cut, list_instead, pipe, Path.mkdir, link])
@pytest.mark.parametrize("name", ["generation_config.json", "special_tokens_map.json", "tokenizer_config.json"])
def test_a_damaged_file_is_named(name: str, damage: Callable[[Path], object], tmp_path: Path) -> None:
    check_small_files(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(PtqError, match=name):
        check_small_files(tmp_path)


def test_whole_files_are_taken(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": Infinity}')  # as transformers may write it
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "config.json").mkdir()  # others are looked at where they are read
    check_small_files(tmp_path)
