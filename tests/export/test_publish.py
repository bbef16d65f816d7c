# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""An output directory is there whole or not at all."""

import hashlib
import json
from pathlib import Path

import pytest

from nemo_ptq.export import publish
from nemo_ptq.export.publish import MANIFEST, discard, prepare, sha256_of, staging_path, write_manifest


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
    publish.publish(output)
    assert names(output) == ["config.json", "nested/data"]
    assert list(output.parent.iterdir()) == [output]


def test_an_earlier_output_is_replaced_whole(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "left over").write_text("old")
    fill(prepare(output), "new")
    publish.publish(output)
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

    monkeypatch.setattr(publish, "_sync", fail)
    with pytest.raises(OSError, match="No space left"):
        publish.publish(output)
    assert (output / "config.json").read_text() == "old"


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    fill(prepare(output), "new")
    synced: list[tuple[Path, bool]] = []
    monkeypatch.setattr(publish, "_sync", lambda path: synced.append((path, output.exists())))
    publish.publish(output)
    before = {path for path, published in synced if not published}
    staging = staging_path(output)
    assert before == {staging, staging / "config.json", staging / "nested", staging / "nested" / "data"}
    assert [path for path, published in synced if published] == [tmp_path]


def test_manifest_lists_every_file_with_its_checksum(tmp_path: Path) -> None:
    fill(tmp_path, "text")
    write_manifest(tmp_path, {}, {"arguments": {"calibration_tp": 2}})
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["version"] == 1
    assert manifest["arguments"] == {"calibration_tp": 2}
    assert manifest["files"] == {
        "config.json": {"size": 4, "sha256": hashlib.sha256(b"text").hexdigest()},
        "nested/data": {"size": 8, "sha256": hashlib.sha256(b"texttext").hexdigest()},
    }


def test_known_checksums_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "text")
    read: list[str] = []
    monkeypatch.setattr(publish, "sha256_of", lambda path: read.append(path.name) or "computed")
    write_manifest(tmp_path, {"config.json": "known"}, {})
    digests = {name: file["sha256"] for name, file in json.loads((tmp_path / MANIFEST).read_text())["files"].items()}
    assert digests == {"config.json": "known", "nested/data": "computed"}
    assert read == ["data"]


def test_checksum_of_a_file_larger_than_a_chunk(tmp_path: Path) -> None:
    data = bytes(range(256)) * 20_000
    (tmp_path / "file").write_bytes(data)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()
