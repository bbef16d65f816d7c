# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Tokenizers that are loaded without AutoTokenizer are those that it loads."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import transformers

from nemo_ptq.pretrained import load_pretrained
from tests.families import make_tokenizer
from tests.files import digests


def tokenizer_with(directory: Path, **settings: Any) -> Path:
    """Makes a tokenizer, with settings in its tokenizer_config.json; None takes one away."""
    make_tokenizer(directory)
    file = directory / "tokenizer_config.json"
    changed = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))
    return directory


@pytest.mark.parametrize("use_fast", [True, False])
@pytest.mark.parametrize(
    "name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2TokenizerFast", "Qwen2Tokenizer"]
)
def test_they_are_autotokenizers(name: str, use_fast: bool, tmp_path: Path) -> None:
    directory = tokenizer_with(tmp_path / "tokenizer", tokenizer_class=name)
    if not name.endswith("Fast") and not use_fast:
        model = json.loads((directory / "tokenizer.json").read_text())["model"]
        (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
        (directory / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]))
    ours = load_pretrained(directory, use_fast)
    theirs = transformers.AutoTokenizer.from_pretrained(directory, use_fast=use_fast)
    assert type(ours) is type(theirs)
    for tokenizer, place in ((ours, "ours"), (theirs, "theirs")):
        tokenizer.save_pretrained(tmp_path / place)
    assert digests(tmp_path / "ours") == digests(tmp_path / "theirs")
    assert ours("<s>def add(a, b)</s>").input_ids == theirs("<s>def add(a, b)</s>").input_ids


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "GenerationConfig"},
        {"tokenizer_class": "no_such"},
        {"tokenizer_class": None},
        {"auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}},
    ],
)
def test_what_is_no_fast_tokenizer_of_transformers_is_left_to_autotokenizer(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    directory = tokenizer_with(tmp_path / "tokenizer", **settings)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    with patch.object(transformers.AutoTokenizer, "from_pretrained", return_value=theirs) as load:
        assert load_pretrained(directory) is theirs
    assert load.call_args.kwargs["trust_remote_code"] is False
