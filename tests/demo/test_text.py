# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The corpus: nothing held out is trained on, and the same library gives the same text."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from demo.text import load_corpus, split_passages, write_jsonl


def _write_library(folder: Path) -> None:
    for index in range(100):
        path = folder / f"module_{index}.py"
        path.write_text(f"'''Module {index}.'''\n\n" + "x = 1\n\n" * 300)
    (folder / "test").mkdir()
    (folder / "test" / "test_module.py").write_text("'''Not wanted.'''\n")


def test_parts_share_no_file(tmp_path: Path) -> None:
    _write_library(tmp_path)
    corpus = load_corpus(tmp_path)
    first_passages = [
        p for part in (corpus.training, corpus.calibration, corpus.heldout) for p in part if "Module" in p
    ]
    assert sorted(p.split("'''")[1] for p in first_passages) == sorted(f"Module {index}." for index in range(100))
    assert min(len(corpus.training), len(corpus.calibration), len(corpus.heldout)) > 0


def test_tests_of_the_library_are_skipped(tmp_path: Path) -> None:
    _write_library(tmp_path)
    assert not any("Not wanted" in passage for passage in load_corpus(tmp_path).training)


def test_running_python_has_enough_text() -> None:
    corpus = load_corpus()
    assert sum(map(len, corpus.training)) > 4_000_000
    assert len(corpus.calibration) == 512
    assert len(corpus.heldout) == 128
    assert corpus == load_corpus()


@given(st.text(alphabet="ab \n", max_size=5000))
def test_passages_keep_every_word(source: str) -> None:
    passages = list(split_passages(source))
    assert " ".join(passages).split() == source.split()
    assert all(len(passage) >= 900 for passage in passages[:-1])


def test_jsonl_keeps_line_breaks(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "folder" / "text.jsonl", ["one\n\ntwo\n", "ä"])
    lines = (tmp_path / "folder" / "text.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["one\n\ntwo\n", "ä"]
