# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The demo's results are kept, and made anew when what they were made from has changed."""

from pathlib import Path

import pytest

from demo import build
from tests.conftest import Demo


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(build, "DIRECTORY", tmp_path)
    return []


def _make(calls: list[str], target: Path, key: str) -> None:
    def make() -> None:
        calls.append(key)
        target.mkdir(exist_ok=True)

    build._build_once(target, key, make)


def test_kept_while_the_key_is_the_same(calls: list[str], tmp_path: Path) -> None:
    _make(calls, tmp_path / "hf", "one")
    _make(calls, tmp_path / "hf", "one")
    _make(calls, tmp_path / "hf", "two")
    assert calls == ["one", "two"]


def test_made_anew_when_missing(calls: list[str], tmp_path: Path) -> None:
    _make(calls, tmp_path / "hf", "one")
    (tmp_path / "hf").rmdir()
    _make(calls, tmp_path / "hf", "one")
    assert calls == ["one", "one"]


def test_failure_does_not_count(calls: list[str], tmp_path: Path) -> None:
    def fail() -> None:
        (tmp_path / "hf").mkdir()
        raise RuntimeError("no space left")

    with pytest.raises(RuntimeError):
        build._build_once(tmp_path / "hf", "one", fail)
    _make(calls, tmp_path / "hf", "one")
    assert calls == ["one"]


def test_demo_has_its_files(demo: Demo) -> None:
    assert (demo.checkpoint / "context" / "io.json").is_file()
    assert (demo.checkpoint / "weights" / "metadata.json").is_file()
    assert (demo.hf / "model.safetensors").is_file()
    assert demo.calibration.is_file() and demo.heldout.is_file()
