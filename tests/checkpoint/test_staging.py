# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""An output directory is there whole or not at all, and of one run alone."""

from pathlib import Path

import pytest

from nemo_ptq.checkpoint import staging as module
from nemo_ptq.checkpoint.output_lock import held, owner_of
from nemo_ptq.checkpoint.staging import (
    Staging,
    atomic_directory,
    begin,
    discard,
    publish,
    reserved,
    staging_roots,
)
from nemo_ptq.errors import PtqError


def fill(directory: Path, text: str) -> None:
    (directory / "nested").mkdir(parents=True)
    (directory / "config.json").write_text(text)
    (directory / "nested" / "data").write_text(text * 2)


def begun(output: Path, text: str = "new") -> Staging:
    output.parent.mkdir(exist_ok=True)
    staging = begin(output)
    fill(staging.files, text)
    return staging


def names(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


@pytest.fixture(params=[True, False], ids=["in one step", "in two steps"])
def exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system lets two directories change places."""
    if not request.param:
        monkeypatch.setattr(module, "_exchange", lambda first, second: False)
    return bool(request.param)


def test_nothing_is_seen_before_the_end(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    staging = begun(output)
    assert not output.exists()
    assert staging.root.name.startswith(".")
    publish(staging)
    assert names(output) == ["config.json", "nested/data"]
    assert list(output.parent.iterdir()) == [output]


def test_an_earlier_output_is_replaced_whole(tmp_path: Path, exchanges: bool) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "left over").write_text("old")
    publish(begun(output))
    assert names(output) == ["config.json", "nested/data"]
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("what", ["directory", "file", "link"])
def test_what_has_appeared_in_the_meantime_is_left_alone(what: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    staging = begun(output)
    if what == "directory":
        fill(output, "another job's")
    elif what == "file":
        output.write_text("another job's")
    else:
        output.symlink_to(tmp_path / "nowhere")
    with pytest.raises(PtqError, match="out appeared while this job ran"):
        publish(staging)
    found = output / "config.json" if what == "directory" else output
    assert output.is_symlink() if what == "link" else found.read_text() == "another job's"


def test_what_was_changed_in_the_meantime_is_left_alone(tmp_path: Path, exchanges: bool) -> None:
    output = tmp_path / "out"
    fill(output, "old")
    staging = begun(output)
    (output / "nested" / "notes.txt").write_text("of the user")
    with pytest.raises(PtqError, match="out was changed while this job ran"):
        publish(staging)
    assert names(output) == ["config.json", "nested/data", "nested/notes.txt"]
    assert (output / "config.json").read_text() == "old"
    assert (staging.files / "config.json").read_text() == "new"


def test_what_was_removed_in_the_meantime_is_no_obstacle(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    staging = begun(output)
    output.rmdir()
    publish(staging)
    assert names(output) == ["config.json", "nested/data"]


def test_a_process_killed_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out"
    staging = begun(output)
    fill(staging.root / "replaced", "old")
    with reserved(output):
        assert (output / "config.json").read_text() == "old"


def test_each_run_has_a_staging_directory_of_its_own(tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = begun(output)
    second = begin(output, is_alone=False)
    assert first.root != second.root
    assert sorted((first.root, second.root)) == staging_roots(output)
    assert names(second.files) == []


def test_what_a_killed_run_has_left_is_taken_away(tmp_path: Path) -> None:
    output = tmp_path / "out"
    begun(output, "stale")
    staging = begin(output)
    assert list(tmp_path.iterdir()) == [staging.root]


def test_what_a_killed_run_has_left_is_taken_over(tmp_path: Path) -> None:
    output = tmp_path / "out"
    stale, other = begun(output, "stale"), begin(output, is_alone=False)
    staging = begin(output, stale.root)
    assert not stale.root.exists()
    assert not other.root.exists()
    assert names(staging.files) == ["config.json", "nested/data"]


def test_leftovers_of_outputs_with_similar_names_are_left_alone(tmp_path: Path) -> None:
    others = [begun(tmp_path / name).root for name in ("out2", "out.partial-01234567", "ou", ".out", "o.t")]
    begin(tmp_path / "out")
    assert all(names(root) for root in others)


def test_discard_leaves_nothing_and_takes_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "out"
    fill(output, "finished")
    staging = begun(output, "unfinished")
    discard(staging)
    assert list(tmp_path.iterdir()) == [output]
    assert (output / "config.json").read_text() == "finished"
    discard(staging)


def test_a_failure_before_the_last_step_leaves_the_earlier_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("old")
    staging = begun(output)

    def fail(_: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "_sync", fail)
    with pytest.raises(OSError, match="No space left"):
        publish(staging)
    assert (output / "config.json").read_text() == "old"


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    staging = begun(output)
    synced: list[tuple[Path, bool]] = []
    monkeypatch.setattr(module, "_sync", lambda path: synced.append((path, output.exists())))
    publish(staging)
    before = {path for path, published in synced if not published}
    files = staging.files
    assert before == {files, files / "config.json", files / "nested", files / "nested" / "data"}
    assert [path for path, published in synced if published] == [tmp_path]


def test_atomic_directory_appears_when_it_is_full(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with reserved(output), atomic_directory(output) as staging:
        (staging / "file").write_text("whole")
        assert not output.exists()
    assert (output / "file").read_text() == "whole"
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["out"]


def test_atomic_directory_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "out") as staging:
        (staging / "new").touch()
        raise KeyboardInterrupt
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["old"]


def test_a_reserved_output_is_refused_to_others(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with reserved(output) as works:
        assert works
        with pytest.raises(PtqError, match="is being written by process"), held(output):
            pass
        assert owner_of(output) is not None
    assert list(tmp_path.iterdir()) == []
