# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The rules about names and places."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_ptq.calibration.hub import why_no_tokenizer
from nemo_ptq.checkpoint.output_lock import held
from nemo_ptq.checkpoint.staging import begin, reserved
from nemo_ptq.export.manifest_writer import write_manifest
from nemo_ptq.plan.rules.paths import (
    checkpoint_is_self_contained,
    output_can_be_renamed,
    output_is_apart,
    output_is_free,
    output_is_not_in_use,
    output_is_writable,
    tokenizer_exists,
)
from tests.plan.models import LLAMA_8B
from tests.plan.rules.examples import expect


@pytest.mark.parametrize("name", ["/no/such", "./no/such", "~/no/such"])
def test_a_tokenizer_that_is_a_path_must_exist(name: str) -> None:
    expect(tokenizer_exists(name), f"tokenizer_path={name} does not exist")


def test_a_link_out_of_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "context").mkdir()
    assert checkpoint_is_self_contained(tmp_path, LLAMA_8B) is None
    (tmp_path / "context" / "notes").symlink_to("/etc/hostname")
    problem = checkpoint_is_self_contained(tmp_path, LLAMA_8B)
    expect(problem, f"the link {tmp_path}/context/notes leads out of the checkpoint, to /etc/hostname, which would be")


def test_a_directory_of_a_tokenizer_is_complete(tmp_path: Path) -> None:
    assert tokenizer_exists(None) is None
    expect(tokenizer_exists(tmp_path), f"tokenizer_path={tmp_path} is not complete: {tmp_path} has no tokenizer_config")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    expect(tokenizer_exists(tmp_path), "has no tokenizer.json, and no other vocabulary")
    (tmp_path / "tokenizer.model").touch()
    assert tokenizer_exists(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "asked", "error", "message"),
    [
        ("organisation/model", True, None, None),
        ("nope", True, "RepositoryNotFoundError", "the Hugging Face hub has no tokenizer of that name"),
        ("organisation/model", True, "GatedRepoError", None),
        ("organisation/model", False, None, "the Hugging Face hub, where one of that name might be, does not answer"),
        ("my/tokenizer/of/old", True, None, "it is no name on the Hugging Face hub either"),
        ("organisation/model", None, None, "does not hold it, and HF_HUB_OFFLINE is set"),
    ],
)
def test_a_tokenizer_by_name_is_in_the_cache_or_on_the_hub(
    name: str,
    asked: bool | None,
    error: str | None,
    message: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    def ask(url: str, timeout: float) -> None:
        assert url == f"https://huggingface.co/{name}/resolve/main/tokenizer_config.json" and timeout < 5
        if error is not None:
            raise getattr(errors, error)("no", response=httpx.Response(404, request=httpx.Request("HEAD", url)))

    why_no_tokenizer.cache_clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if asked is None else "0")
    monkeypatch.setattr("nemo_ptq.calibration.hub.answers", lambda: asked)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    expect(tokenizer_exists(name), message)
    why_no_tokenizer.cache_clear()


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
    (tmp_path / "config.json").touch()  # which anybody may have
    expect(output_is_free(tmp_path, True), "holds what no manifest of an export lists (config.json)")
    expect(output_is_free(tmp_path / "config.json", True), "is not a directory, so it is not overwritten")


def make_export(directory: Path) -> None:
    (directory / "context").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "context" / "model.yaml").write_text("")
    write_manifest(directory, {}, {})


def add_note(directory: Path) -> None:
    (directory / "notes.txt").touch()


def add_engine(directory: Path) -> None:
    (directory / "context" / "deep").mkdir()
    (directory / "context" / "deep" / "rank0.engine").touch()


def add_link(directory: Path) -> None:
    (directory / "data").symlink_to("/usr")


def change_manifest(directory: Path) -> None:
    file = directory / "ptq" / "manifest.json"
    file.write_text(file.read_text().replace("config.json", "thesis.tex"))


@pytest.mark.parametrize("formats", [(), ("trtllm", "hf")])
@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (add_note, "notes.txt"),
        (add_engine, "context/deep/rank0.engine"),
        (add_link, "data"),
        (change_manifest, "config.json"),
    ],
)
def test_what_was_added_to_an_export_is_not_overwritten(
    change: Callable[[Path], None], shown: str, formats: tuple[str, ...], tmp_path: Path
) -> None:
    directories = [tmp_path / format for format in formats] or [tmp_path]
    for directory in directories:
        make_export(directory)
    assert output_is_free(tmp_path, True) is None
    change(directories[-1])
    prefix = f"{formats[-1]}/" if formats else ""
    expect(output_is_free(tmp_path, True), f"lists ({prefix}{shown}")


def test_what_lies_beside_the_formats_is_not_overwritten(tmp_path: Path) -> None:
    make_export(tmp_path / "trtllm")
    add_note(tmp_path)
    expect(output_is_free(tmp_path, True), "(notes.txt)")


def test_a_refusal_names_a_few_files_of_many(tmp_path: Path) -> None:
    for name in "edcba":
        (tmp_path / name).touch()
    expect(output_is_free(tmp_path, True), "(a, b, c and others), so it is not overwritten")


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("link", "link is a link to here: give the directory itself"),
        ("link/", "link/ is a link to here: give the directory itself"),
        ("dangling", "dangling is a link to nowhere, which does not exist: give the directory itself"),
        ("circle", "circle is a link to circle, which does not exist: give the directory itself"),
        ("n" * 250, "has a name of 250 bytes, and 230 leave room for what stands beside it: choose a shorter one"),
        ("ü" * 120, "has a name of 240 bytes, and 230 leave room"),
        ("here/..", "does not end in a name: give the path of a directory to make"),
        ("/", "export_config.path=/ does not end in a name"),
        ("/proc", "export_config.path=/proc is a mount point, which cannot be renamed: choose a directory in it"),
    ],
)
def test_output_that_cannot_be_renamed(place: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    for link, target in {"link": "here", "dangling": "nowhere", "circle": "circle"}.items():
        (tmp_path / link).symlink_to(target)
    path = place if place.startswith("/") else f"{tmp_path}/{place}"
    expect(output_can_be_renamed(path), problem)
    # One mistake is one line.
    assert output_is_free(path, True) is None
    assert output_is_free(path, False) is None
    assert output_is_not_in_use(path) is None
    assert output_is_apart(path, tmp_path / "here" / "checkpoint") is None or place.startswith(("here", "link", "/"))
    assert output_is_writable(path) is None or place == "/proc"


def test_output_whose_name_is_just_short_enough(tmp_path: Path) -> None:
    output = tmp_path / ("n" * 230)
    assert output_can_be_renamed(output) is None
    with reserved(output):
        (begin(output).files / "file").touch()
        output.with_name(f"{output.name}.calibration.safetensors").touch()


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
