# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A tokenizer that is longer than the vocabulary is found before a job starts, with the ways out."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.checkpoint.huggingface.hf_weights import load_tokenizer
from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.checkpoint.tokenizer_files import largest_token, tokenizer_problem
from nemo_ptq.errors import PtqError
from nemo_ptq.plan.rules.tokenizer import tokenizer_is_given, tokens_have_rows
from tests.families import make_hf, make_tokenizer
from tests.plan.models import LLAMA_8B


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory)
    return directory


def padded(tokenizer: Path, directory: Path, **special: Any) -> Path:
    """The tokenizer with a token more, as people add one to pad with."""
    from transformers import AutoTokenizer

    longer = AutoTokenizer.from_pretrained(tokenizer)
    assert longer.add_special_tokens(special or {"pad_token": "[PAD]"}) == 1
    longer.save_pretrained(directory)
    return directory


def test_tokens_are_counted_as_transformers_does(tokenizer: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for path in (tokenizer, padded(tokenizer, tmp_path)):
        found = largest_token(path)
        loaded = AutoTokenizer.from_pretrained(path)
        assert found is not None
        assert found[0] == len(loaded) - 1
        assert loaded.convert_tokens_to_ids(found[1]) == found[0]


def test_tokens_of_files_by_name(tmp_path: Path) -> None:
    assert largest_token(tmp_path) is None
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    assert largest_token(tmp_path) == (1, "b")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": 2}))
    assert largest_token(tmp_path) == (2, "<x>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"3": {"content": "<y>"}}}))
    assert largest_token(tmp_path) == (3, "<y>")


@pytest.mark.parametrize("kind", ["hf", "nemo"])
def test_a_token_without_a_row(
    kind: str, checkpoint_of: Callable[[str], Path], tokenizer: Path, tmp_path: Path
) -> None:
    made = checkpoint_of("llama2")
    source = Path(shutil.copytree(made.with_name("llama2.hf") if kind == "hf" else made, tmp_path / "model"))
    files = source if kind == "hf" else source / "context" / "nemo_tokenizer"
    model, tokens = read_metadata(source), largest_token(files)
    assert tokens is not None
    shorter = replace(model, vocab_size=tokens[0] + 1)
    assert tokens_have_rows(model, source, None) is None
    assert tokens_have_rows(shorter, source, None) is None
    padded(tokenizer, files)
    problem: Any = tokens_have_rows(shorter, source, None)
    assert f"has token {tokens[0] + 1} ('[PAD]'), and the embedding only {tokens[0] + 1} rows: take out" in problem
    assert f"to {tokens[0] + 2} rows or more" in problem
    assert "tokenizer_path=" in problem
    assert tokens_have_rows(shorter, source, str(tokenizer)) is None
    assert "[PAD]" in str(tokens_have_rows(shorter, tokenizer, str(files)))


def test_gemmas_token_for_images_needs_no_row(
    tokenizer: Path, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    tokens = largest_token(tokenizer)
    assert tokens is not None
    longer = padded(tokenizer, tmp_path, additional_special_tokens=["<image_soft_token>"])
    assert largest_token(longer) == tokens
    model = replace(read_metadata(checkpoint_of("llama2")), vocab_size=tokens[0] + 1)
    assert tokens_have_rows(model, longer, str(longer)) is None


def test_a_damaged_tokenizer_is_told(tokenizer: Path, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = read_metadata(checkpoint_of("llama2"))
    damaged = Path(shutil.copytree(tokenizer, tmp_path / "damaged"))
    for content in ("{", "{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": {"a": "b"}}}'):
        (damaged / "tokenizer.json").write_text(content)
        assert "tokenizer" in str(tokens_have_rows(model, tokenizer, str(damaged)))


def test_files_that_are_elsewhere_are_not_looked_at(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = replace(read_metadata(checkpoint_of("llama2")), vocab_size=1)
    assert tokens_have_rows(model, tmp_path / "nowhere", None) is None
    assert tokens_have_rows(model, checkpoint_of("llama2"), "meta-llama/Llama-3.1-8B") is None


def test_a_tokenizer_of_another_machine_is_told(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = read_metadata(checkpoint_of("llama2"))
    checkpoint = tmp_path / "moved"
    shutil.copytree(checkpoint_of("llama2") / "context", checkpoint / "context")
    file = checkpoint / "context" / "model.yaml"
    assert tokenizer_is_given(model, checkpoint, None) is None
    there = file.read_text()
    file.write_text(there.replace("pretrained_model_name: nemo_tokenizer", "pretrained_model_name: /lustre/llama"))
    problem = str(tokenizer_is_given(model, checkpoint, None))
    assert "has its tokenizer in /lustre/llama, which is not there on this machine: give tokenizer_path=" in problem
    assert tokenizer_is_given(model, checkpoint, "/somewhere") is None
    file.write_text(there.replace("pretrained_model_name: nemo_tokenizer", "pretrained_model_name: meta-llama/Llama"))
    assert tokenizer_is_given(model, checkpoint, None) is None  # may be on the hub


def test_a_hugging_face_directory_has_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    source = make_hf("llama2", tmp_path / "model")
    model = read_metadata(source)
    assert tokenizer_is_given(model, source, None) is None
    for file, lacks in (
        ("tokenizer.json", "has no tokenizer.json, and no other vocabulary: give it the tokenizer's files"),
        ("tokenizer_config.json", "has no tokenizer_config.json: give it the tokenizer's files"),
    ):
        (source / file).unlink()
        problem = tokenizer_is_given(model, source, None)
        assert problem is not None and problem.startswith(f"{source} {lacks}")
        with pytest.raises(PtqError, match=re.escape(lacks)):
            load_tokenizer(source)  # as the job does


def test_a_nemo_checkpoint_has_the_whole_tokenizer(tmp_path: Path) -> None:
    tokenizer = tmp_path / "context" / "nemo_tokenizer"
    tokenizer.mkdir(parents=True)
    (tmp_path / "context" / "model.yaml").write_text(
        "_target_: a.Model\nconfig: {_target_: a.Config}\ntokenizer: {pretrained_model_name: nemo_tokenizer}\n"
    )
    problem = tokenizer_is_given(LLAMA_8B, tmp_path, None)
    assert problem is not None and problem.startswith(f"{tokenizer} has no tokenizer_config.json")
    assert tokenizer_is_given(LLAMA_8B, tmp_path, "another") is None
    for file in ("tokenizer_config.json", "tokenizer.json"):
        (tokenizer / file).touch()
    assert tokenizer_is_given(LLAMA_8B, tmp_path, None) is None


CODE = {"AutoTokenizer": ["own.OwnTokenizer", None]}


@pytest.mark.parametrize(
    ("settings", "files", "said"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, ["tokenizer.json"], None),
        ({"tokenizer_class": "TokenizersBackend"}, ["tokenizer.json"], None),
        ({"tokenizer_class": "Qwen2Tokenizer", "auto_map": CODE}, ["tokenizer.json"], None),
        ({}, ["tokenizer.json"], None),
        ({"tokenizer_class": "LlamaTokenizer"}, ["vocab.json"], "no tokenizer.json and no tokenizer.model for its Ll"),
        ({"tokenizer_class": "GPT2TokenizerFast"}, ["vocab.json"], "no tokenizer.json and no merges.txt for its GPT2"),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, ["vocab.json"], "has no tokenizer.json for its PreTrained"),
        (
            {"tokenizer_class": "OwnTokenizer"},
            ["tokenizer.json"],
            "has tokenizer_class 'OwnTokenizer', which trans",
        ),
        (
            {"tokenizer_class": "OwnTokenizer", "auto_map": CODE},
            ["tokenizer.json"],
            "code that the model brings is",
        ),
        ({"tokenizer_class": ["LlamaTokenizer"]}, ["tokenizer.json"], "has tokenizer_class ['LlamaTokenizer'], which"),
    ],
)
def test_a_plan_knows_which_classes_load(
    settings: dict[str, Any], files: list[str], said: str | None, tokenizer: Path, tmp_path: Path
) -> None:
    shutil.copy(tokenizer / "tokenizer.json", tmp_path)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in {"tokenizer.json", "vocab.json"}.difference(files):
        (tmp_path / name).unlink()
    problem = tokenizer_problem(tmp_path)
    if said is None:
        assert problem is None
        assert len(load_tokenizer(tmp_path))
    else:
        assert problem is not None and said in problem
        with pytest.raises(PtqError, match=re.escape(problem)):
            load_tokenizer(tmp_path)
