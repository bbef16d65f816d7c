# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""An output directory is there whole or not at all."""

from pathlib import Path

import pytest

from nemo_ptq.checkpoint import staging as module
from nemo_ptq.checkpoint.staging import atomic_directory, discard, prepare, publish, staging_path


def fill(directory: Path, text: str) -> None:
    (directory / "nested").mkdir()
    (directory / "config.json").write_text(text)
    (directory / "nested" / "data").write_text(text * 2)


def names(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def test_nothing_is_seen_before_the_end(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    staging = prepare(output)
    fill(staging, "new")
    assert not output.exists()
    assert staging.name.startswith(".")
    publish(output)
    assert names(output) == ["config.json", "nested/data"]
    assert list(output.parent.iterdir()) == [output]


def test_an_earlier_output_is_replaced_whole(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "left over").write_text("old")
    fill(prepare(output), "new")
    publish(output)
    assert names(output) == ["config.json", "nested/data"]
    assert list(tmp_path.iterdir()) == [output]


def test_what_a_killed_run_has_left_is_taken_away(tmp_path: Path) -> None:
    output = tmp_path / "out"
    fill(prepare(output), "stale")
    assert names(prepare(output)) == []


def test_discard_leaves_nothing_and_takes_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    fill(output, "finished")
    fill(prepare(output), "unfinished")
    discard(output)
    assert list(tmp_path.iterdir()) == [output]
    assert (output / "config.json").read_text() == "finished"
    discard(output)


def test_a_failure_before_the_last_step_leaves_the_earlier_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("old")
    fill(prepare(output), "new")

    def fail(_: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "_sync", fail)
    with pytest.raises(OSError, match="No space left"):
        publish(output)
    assert (output / "config.json").read_text() == "old"


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    fill(prepare(output), "new")
    synced: list[tuple[Path, bool]] = []
    monkeypatch.setattr(module, "_sync", lambda path: synced.append((path, output.exists())))
    publish(output)
    before = {path for path, published in synced if not published}
    staging = staging_path(output)
    assert before == {staging, staging / "config.json", staging / "nested", staging / "nested" / "data"}
    assert [path for path, published in synced if published] == [tmp_path]


def test_atomic_directory_appears_when_it_is_full(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "deep" / "out") as staging:
        (staging / "file").write_text("whole")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "file").read_text() == "whole"
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["out"]


def test_atomic_directory_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "out") as staging:
        (staging / "new").touch()
        raise KeyboardInterrupt
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["old"]


def test_atomic_directory_replaces_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with atomic_directory(tmp_path / "out") as staging:
        (staging / "new").touch()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["new"]
