# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The rules about names and places."""

import os
from pathlib import Path

import pytest

from nemo_ptq.checkpoint.output_lock import held
from nemo_ptq.plan.rules.paths import (
    output_is_apart,
    output_is_free,
    output_is_not_in_use,
    output_is_writable,
    tokenizer_exists,
)
from tests.plan.rules.examples import expect


@pytest.mark.parametrize("name", ["/no/such", "./no/such", "~/no/such"])
def test_a_tokenizer_that_is_a_path_must_exist(name: str) -> None:
    expect(tokenizer_exists(name), f"tokenizer_path={name} does not exist")


def test_other_tokenizers_may_exist(tmp_path: Path) -> None:
    assert tokenizer_exists(None) is None
    assert tokenizer_exists(tmp_path) is None
    assert tokenizer_exists("organisation/model") is None


def test_output_apart_from_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "a" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (tmp_path / "link").symlink_to(checkpoint)
    for path in (
        checkpoint,
        checkpoint / "context" / "out",
        tmp_path / "a",
        tmp_path / "link",
        tmp_path / "link" / "o",
    ):
        expect(output_is_apart(path, checkpoint), "must not contain one another: choose another directory")
    assert output_is_apart(tmp_path / "a" / "out", checkpoint) is None


def test_output_that_exists(tmp_path: Path) -> None:
    assert output_is_free(tmp_path / "new", False) is None
    expect(output_is_free(tmp_path, False), "or set export_config.overwrite=true")
    assert output_is_free(tmp_path, True) is None  # empty
    (tmp_path / "thesis.tex").touch()
    expect(output_is_free(tmp_path, True), "is not an export, so it is not overwritten")
    (tmp_path / "config.json").touch()
    assert output_is_free(tmp_path, True) is None
    expect(output_is_free(tmp_path / "thesis.tex", True), "is not an export")


def test_output_that_cannot_be_made(tmp_path: Path) -> None:
    assert output_is_writable(tmp_path / "new" / "out") is None
    assert output_is_writable("/") is None  # that it exists is told by another rule
    (tmp_path / "file").touch()
    expect(output_is_writable(tmp_path / "file" / "out"), f"{tmp_path}/file is not a directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_in_a_directory_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    expect(output_is_writable(tmp_path / "out"), f"{tmp_path} is not writable")


def test_output_that_another_job_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert output_is_not_in_use(tmp_path / "out") is None
    with held(tmp_path / "out"):
        expect(output_is_not_in_use(tmp_path / "out"), f"out is being written by process {os.getpid()} on ")
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert output_is_not_in_use(tmp_path / "out") is None  # by rank 0 of the same job
