# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The exported context restores its tokenizer wherever it is taken, with NeMo and without."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.errors import PtqError
from nemo_ptq.plan.rules.tokenizer import tokenizer_is_given
from nemo_ptq.verify.context import read_model_yaml, round_trip_problems, tokenizer_path
from tests.families import make_tokenizer
from tests.ranks import run_ranks

TEXT = "def add(a, b): return a + b"
HUB_ID = "somebody/some-model"


def name_tokenizer(checkpoint: Path, name: str, field: str = "pretrained_model_name") -> None:
    """Has both descriptions of a checkpoint's tokenizer give it this name."""
    yaml_file, io_file = checkpoint / "context" / "model.yaml", checkpoint / "context" / "io.json"
    model = yaml.safe_load(yaml_file.read_text())
    model["tokenizer"][field] = name
    yaml_file.write_text(yaml.safe_dump(model))
    text = io_file.read_text()
    assert text.count('"value": "nemo_tokenizer"') == 1
    io_file.write_text(text.replace('"value": "nemo_tokenizer"', f'"value": "{name}"'))


def name_as_nemo_does(checkpoint: Path, name: str) -> None:
    """Has NeMo write a context whose tokenizer has a name that is no path on this machine."""
    from nemo_ptq.checkpoint.allowed_names import AllowedNames
    from nemo_ptq.checkpoint.context_build import model_config
    from nemo_ptq.checkpoint.metadata import read_model
    from nemo_ptq.checkpoint.writer import write_context

    model = model_config(read_model(checkpoint, AllowedNames()), checkpoint / "context", AllowedNames())
    model.tokenizer.pretrained_model_name, model.config.generation_config = name, None
    shutil.rmtree(checkpoint / "context")
    write_context(checkpoint / "context", model)


@pytest.fixture
def checkpoint(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint to be changed."""
    shutil.copytree(checkpoint_of("llama2"), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def export_context(checkpoint: Path, tokenizer: Path, directory: Path, replaced: bool) -> list[int]:
    """Exports a context as a job does that has used a tokenizer; returns what that made of the text."""
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

    from nemo_ptq.export.nemo_context import write_context

    used = (AutoTokenizer if tokenizer.is_dir() else SentencePieceTokenizer)(str(tokenizer))
    write_context(checkpoint, directory / "nemo_context", used, replaced)
    return used.text_to_ids(TEXT)


def restore_with_nemo(directory: Path) -> list[int]:
    from nemo.lightning.io import load_context

    return load_context(directory / "nemo_context", subpath="model.tokenizer").text_to_ids(TEXT)


def restore_without_nemo(directory: Path) -> list[int]:
    from transformers import AutoTokenizer

    path = tokenizer_path(directory, read_model_yaml(directory))
    assert round_trip_problems(path, TEXT) == []
    return AutoTokenizer.from_pretrained(path, local_files_only=True).encode(TEXT, add_special_tokens=False)


def check_restored(directory: Path, expected: list[int]) -> None:
    """Reads the tokenizer back from another place than it was written to."""
    moved = directory.with_name("moved")
    directory.rename(moved)
    assert run_ranks(restore_with_nemo, 1, moved) == [expected]
    assert run_ranks(restore_without_nemo, 1, moved) == [expected]


def test_tokenizer_of_the_checkpoint_is_copied(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = checkpoint / "context" / "nemo_tokenizer"
    (expected,) = run_ranks(export_context, 1, checkpoint, tokenizer, tmp_path / "out", False)
    for file in (checkpoint / "context").rglob("*"):
        if file.is_file():
            copy = tmp_path / "out" / "nemo_context" / file.relative_to(checkpoint / "context")
            assert copy.read_bytes() == file.read_bytes()
    check_restored(tmp_path / "out", expected)


@pytest.mark.parametrize("by_nemo", [False, True])
@pytest.mark.parametrize("name", [HUB_ID, "/elsewhere/tokenizer"])
def test_tokenizer_from_elsewhere_is_saved(checkpoint: Path, tmp_path: Path, name: str, by_nemo: bool) -> None:
    tokenizer = tmp_path / "cache"
    shutil.copytree(checkpoint / "context" / "nemo_tokenizer", tokenizer)
    if by_nemo:
        run_ranks(name_as_nemo_does, 1, checkpoint, name)
    else:
        name_tokenizer(checkpoint, name)
        shutil.rmtree(checkpoint / "context" / "nemo_tokenizer")
    said = tokenizer_is_given(read_metadata(checkpoint), checkpoint, None)
    assert said is None if name == HUB_ID else "/elsewhere/tokenizer, which is not there on this machine" in str(said)
    (expected,) = run_ranks(export_context, 1, checkpoint, tokenizer, tmp_path / "out", False)
    context = tmp_path / "out" / "nemo_context"
    assert (
        yaml.safe_load((context / "model.yaml").read_text())["tokenizer"]["pretrained_model_name"] == "nemo_tokenizer"
    )
    assert name not in (context / "io.json").read_text()
    shutil.rmtree(tokenizer)
    check_restored(tmp_path / "out", expected)


def test_another_tokenizer_replaces_the_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "other")
    # Another one indeed: without merges it spells.
    file = tmp_path / "other" / "tokenizer.json"
    description = json.loads(file.read_text())
    description["model"]["merges"] = []
    file.write_text(json.dumps(description))
    (expected,) = run_ranks(export_context, 1, checkpoint, tmp_path / "other", tmp_path / "out", True)
    assert len(expected) == len(TEXT)
    check_restored(tmp_path / "out", expected)


def test_the_rest_of_the_context_stays_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "cache"
    shutil.copytree(checkpoint / "context" / "nemo_tokenizer", tokenizer)
    name_tokenizer(checkpoint, HUB_ID)
    run_ranks(export_context, 1, checkpoint, tokenizer, tmp_path / "out", False)
    for name, load in (("model.yaml", yaml.safe_load), ("io.json", json.loads)):
        old = (checkpoint / "context" / name).read_text()
        new = (tmp_path / "out" / "nemo_context" / name).read_text()
        assert load(old.replace(HUB_ID, "nemo_tokenizer")) == load(new)


def test_the_checkpoint_is_not_changed(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "cache"
    shutil.copytree(checkpoint / "context" / "nemo_tokenizer", tokenizer)
    name_tokenizer(checkpoint, HUB_ID)
    before = {file: file.read_bytes() for file in checkpoint.rglob("*") if file.is_file()}
    run_ranks(export_context, 1, checkpoint, tokenizer, tmp_path / "out", False)
    assert {file: file.read_bytes() for file in checkpoint.rglob("*") if file.is_file()} == before


def refused_context(checkpoint: Path, tokenizer: Path, directory: Path) -> str:
    try:
        export_context(checkpoint, tokenizer, directory, True)
    except PtqError as error:
        return str(error)
    return "written"


def test_a_tokenizer_of_another_kind_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    from sentencepiece import SentencePieceTrainer

    text = tmp_path / "text.txt"
    text.write_text(f"{TEXT}\nthe quick brown fox jumps over the lazy dog\n" * 20)
    SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    (message,) = run_ranks(refused_context, 1, checkpoint, tmp_path / "m.model", tmp_path / "out")
    assert "SentencePieceTokenizer cannot be saved" in message
    assert "tokenizer_path=" in message
