# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Describes a Megatron-LM or Megatron-Bridge checkpoint as a NeMo model: without torch, Megatron or NeMo.

Everything that reading it refuses is refused here, so that a plan knows it as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ptq.checkpoint.index import read_index
from nemo_ptq.checkpoint.known_tensors import check_complete, check_shapes, check_tensors, is_weight
from nemo_ptq.checkpoint.links import links_out_of
from nemo_ptq.checkpoint.megatron.classes import ChosenClass, choose_class
from nemo_ptq.checkpoint.megatron.directories import TOKENIZER, iteration_of
from nemo_ptq.checkpoint.megatron.fields import Fields, read_fields
from nemo_ptq.checkpoint.shards import check_shards
from nemo_ptq.checkpoint.small_files import check_small_files
from nemo_ptq.errors import PtqError

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


@dataclass(frozen=True)
class MegatronDescription:
    """A checkpoint that can be read.

    Attributes:
        iteration: The directory with its torch_dist files.
        chosen: Its model, and the class that it is of.
        tokenizer: Directory with its tokenizer, None where there is none in the checkpoint.
        rows: Rows of its embedding, without padding where that is known.
        has_vocab_size: Whether the padding is known.
        dtype: Name of the torch data type of its embedding.
    """

    iteration: Path
    chosen: ChosenClass
    tokenizer: Path | None
    rows: int
    has_vocab_size: bool
    dtype: str


def describe_megatron(path: Path) -> MegatronDescription:
    """Describes a checkpoint.

    Args:
        path: Its root, or one of its iterations.

    Raises:
        PtqError: If files are missing or damaged, the model has an unknown computation, or tensors would be lost.
    """
    iteration = iteration_of(path)
    fields, index = read_fields(iteration), read_index(iteration)
    check_shards(iteration, index.storage_data.values())
    tensors = {name: entry for name, entry in index.state_dict_metadata.items() if hasattr(entry, "size")}
    if EMBEDDING not in tensors:
        found = ", ".join([name for name in sorted(tensors) if is_weight(name, "")][:3]) or "no weights"
        raise PtqError(f"{iteration} holds no {EMBEDDING} (it has {found}): only whole GPT-like models can be read")
    _check_unquantized(iteration, tensors)
    rows = _rows(iteration, fields, tensors[EMBEDDING].size[0])
    try:
        chosen = choose_class(fields, rows)
        dtypes = {name: str(entry.properties.state[0]) for name, entry in tensors.items()}
        if fields["share_embeddings_and_output_weights"] and OUTPUT in tensors:
            raise PtqError(
                f"the embedding is the output layer as well by the options, and there is a tensor {OUTPUT}: give the "
                "description of these weights"
            )
        check_tensors(chosen.spec, dtypes, prefix="")
        check_complete(chosen.spec, tensors, prefix="")
        check_shapes(chosen.spec, {name: entry.size for name, entry in tensors.items()}, prefix="")
    except PtqError as error:
        raise PtqError(f"{iteration}: {error}") from error
    tokenizer = iteration / TOKENIZER
    if tokenizer.is_dir():
        check_small_files(tokenizer)
        if link := next(links_out_of(tokenizer), None):
            raise PtqError(f"the link {link} leads out of {tokenizer}: put the file itself in its place, or remove it")
    files, named = tokenizer if tokenizer.is_dir() else None, fields["vocab_size"] is not None
    return MegatronDescription(iteration, chosen, files, rows, named, dtypes[EMBEDDING])


def _check_unquantized(iteration: Path, tensors: Mapping[str, Any]) -> None:
    if (iteration / "modelopt_state").is_dir() or any("_quantizer." in name for name in tensors):
        raise PtqError(f"{iteration} is quantized already (it holds ModelOpt's quantizers): give the model before that")


def _rows(iteration: Path, fields: Fields, stored: int) -> int:
    """Rows of the embedding without those that Megatron has padded it with, where the configuration says how many."""
    named = fields["vocab_size"]
    if named is None:
        return stored
    if type(named) is not int or not 1 <= named <= stored:
        raise PtqError(f"{iteration} has vocab_size {named!r}, and an embedding of {stored} rows: copy it again")
    return named
