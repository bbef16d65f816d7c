# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The manifest lists every file of an export."""

import json
import random
from pathlib import Path

import pytest
from blake3 import blake3

from nemo_ptq.export import manifest_writer
from nemo_ptq.export.manifest_writer import MANIFEST, checksum_of, write_manifest


def fill(directory: Path, text: str) -> None:
    (directory / "nested").mkdir()
    (directory / "config.json").write_text(text)
    (directory / "nested" / "data").write_text(text * 2)


def test_manifest_lists_every_file_with_its_checksum(tmp_path: Path) -> None:
    fill(tmp_path, "text")
    write_manifest(tmp_path, {}, {"arguments": {"calibration_tp": 2}})
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["version"] == 2
    assert manifest["arguments"] == {"calibration_tp": 2}
    assert manifest["files"] == {
        "config.json": {"size": 4, "blake3": blake3(b"text").hexdigest()},
        "nested/data": {"size": 8, "blake3": blake3(b"texttext").hexdigest()},
    }


def test_known_checksums_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "text")
    read: list[str] = []
    monkeypatch.setattr(manifest_writer, "checksum_of", lambda path: read.append(path.name) or "computed")
    write_manifest(tmp_path, {"config.json": "known"}, {})
    digests = {name: file["blake3"] for name, file in json.loads((tmp_path / MANIFEST).read_text())["files"].items()}
    assert digests == {"config.json": "known", "nested/data": "computed"}
    assert read == ["data"]


@pytest.mark.parametrize("size", [0, 1, 1000, 4000, 4001, 9999])
def test_checksum_of_a_file_read_by_several_threads(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_writer, "_CHUNK", 1000)
    data = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(data)
    assert checksum_of(tmp_path / "file") == blake3(data).hexdigest()
