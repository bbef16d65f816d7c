# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The tokenizer: the model has a row for each of its tokens."""

from pathlib import Path
from typing import Any

from nemo_ptq.checkpoint.megatron.directories import TOKENIZER, is_megatron, iteration_of
from nemo_ptq.checkpoint.metadata import is_hugging_face, read_model_yaml
from nemo_ptq.checkpoint.tokenizer_files import largest_token, tokenizer_of, tokenizer_problem
from nemo_ptq.errors import PtqError
from nemo_ptq.models.spec import ModelSpec


def tokenizer_is_given(model: ModelSpec, checkpoint: Any, tokenizer_path: Any) -> str | None:
    """The checkpoint has a complete tokenizer on this machine, or tokenizer_path names one."""
    path = Path(checkpoint).expanduser()
    if is_hugging_face(path):
        return tokenizer_problem(path)
    if tokenizer_path is not None:
        return None
    way_out = "give tokenizer_path= the Hugging Face directory of the tokenizer that the model was trained with"
    if is_megatron(path):
        if (inside := iteration_of(path) / TOKENIZER).is_dir():
            return tokenizer_problem(inside)
        said = f"nemo_checkpoint={checkpoint} has no tokenizer/ in it, as Megatron-LM's checkpoints do not"
        return f"{said}: {way_out}"
    if not (path / "context" / "model.yaml").is_file():
        return None
    settings = read_model_yaml(path)["tokenizer"] or {}
    if (own := tokenizer_of(path, settings)) is not None:
        return tokenizer_problem(own) if own.is_dir() else None
    name = str(settings.get("pretrained_model_name") or settings.get("model_path") or "")
    if not Path(name).is_absolute() or Path(name).exists():
        return None
    return f"nemo_checkpoint={checkpoint} has its tokenizer in {name}, which is not there on this machine: {way_out}"


def tokens_have_rows(model: ModelSpec, checkpoint: Any, tokenizer_path: Any) -> str | None:
    """The embedding has a row for every token of the tokenizer that is used."""
    try:
        path = _tokenizer(Path(checkpoint).expanduser(), tokenizer_path)
        found = None if path is None else largest_token(path)
    except PtqError as error:
        return str(error)
    if found is None or found[0] < model.vocab_size:
        return None
    number, token = found
    return (
        f"the tokenizer in {path} has token {number} ({token!r}), and the embedding only {model.vocab_size} rows: take "
        "out the tokens that were added (tokenizer_path= names another tokenizer), or resize the model's embedding "
        f"to {number + 1} rows or more (resize_token_embeddings in transformers)"
    )


def _tokenizer(checkpoint: Path, tokenizer_path: Any) -> Path | None:
    """The files of the tokenizer that a job uses; None where they are elsewhere, such as on the hub."""
    if tokenizer_path is not None:
        given = Path(str(tokenizer_path)).expanduser()
        return given if given.exists() else None
    if is_hugging_face(checkpoint):
        return tokenizer_of(checkpoint)
    if is_megatron(checkpoint):
        return inside if (inside := iteration_of(checkpoint) / TOKENIZER).is_dir() else None
    if not (checkpoint / "context" / "model.yaml").is_file():
        return None
    return tokenizer_of(checkpoint, read_model_yaml(checkpoint)["tokenizer"] or {})
