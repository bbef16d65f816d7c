# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Links that lead out of a checkpoint, and those that do not."""

from pathlib import Path

import pytest

from nemo_ptq.checkpoint.links import links_out_of


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A NeMo checkpoint, beside a file that is none of its own."""
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").touch()
    directory = tmp_path / "checkpoint"
    (directory / "context" / "nemo_tokenizer").mkdir(parents=True)
    (directory / "context" / "model.yaml").touch()
    (directory / "weights").mkdir()
    return directory


@pytest.mark.parametrize("target", ["../../../secret.json", "../../../private", "nowhere", "extra"])
def test_a_link_that_leads_out_is_found(target: str, checkpoint: Path) -> None:
    link = checkpoint / "context" / "nemo_tokenizer" / "extra"  # the last of the targets is the link itself
    link.symlink_to(target)
    assert list(links_out_of(checkpoint)) == [link]


def test_a_context_that_is_elsewhere_is_found(checkpoint: Path) -> None:
    (checkpoint / "context").rename(checkpoint.parent / "elsewhere")
    (checkpoint / "context").symlink_to("../elsewhere")
    assert list(links_out_of(checkpoint)) == [checkpoint / "context"]


def test_a_link_behind_a_link_is_found(checkpoint: Path) -> None:
    (checkpoint / "weights" / "key").symlink_to("../../private/key")
    (checkpoint / "context" / "more").symlink_to("../weights")
    assert list(links_out_of(checkpoint)) == [checkpoint / "context" / "more" / "key"]


def test_links_within_are_fine(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "context" / "again.yaml").symlink_to("model.yaml")
    (checkpoint / "context" / "nemo_tokenizer" / "up").symlink_to("..")  # a circle
    (checkpoint / "weights" / "__0_0.distcp").symlink_to("/mnt/storage/__0_0.distcp")  # weights are not copied
    assert list(links_out_of(checkpoint)) == []
    (tmp_path / "alias").symlink_to(checkpoint)
    assert list(links_out_of(tmp_path / "alias")) == []


def test_weights_of_a_hugging_face_directory_may_be_elsewhere(tmp_path: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(f"/mnt/storage/{name}")
    assert list(links_out_of(tmp_path)) == [tmp_path / "tokenizer.json"]


@pytest.mark.parametrize("is_nemo", [True, False])
def test_a_hub_cache_is_a_part_of_its_snapshots(is_nemo: bool, tmp_path: Path) -> None:
    model = tmp_path / "hub" / "models--org--name"
    snapshot = model / "snapshots" / "0123abc"
    place = snapshot / "context" if is_nemo else snapshot
    place.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "blobs" / "abcd").touch()
    up = "../../.." if is_nemo else "../.."
    (place / "config.json").symlink_to(f"{up}/blobs/abcd")
    assert list(links_out_of(snapshot)) == []
    (model / "refs").mkdir()
    (model / "refs" / "main").touch()
    (place / "tokenizer.json").symlink_to(f"{up}/refs/main")
    assert list(links_out_of(snapshot)) == [place / "tokenizer.json"]
