# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Import a Hugging Face directory as a NeMo 2.0 checkpoint."""

import copy
import importlib
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import fiddle as fdl
import torch

from nemo_ptq.checkpoint.huggingface.description import HuggingFaceDescription, describe
from nemo_ptq.checkpoint.huggingface.hf_weights import Weights, load_generation_config, load_tokenizer
from nemo_ptq.checkpoint.huggingface.published import keep_config
from nemo_ptq.checkpoint.huggingface.stored_tensors import PlannedPart, planned_parts
from nemo_ptq.checkpoint.links import links_out_of
from nemo_ptq.checkpoint.parts import TensorPart, WeightsSize
from nemo_ptq.checkpoint.staging import atomic_directory, place_problem, reserved
from nemo_ptq.checkpoint.writer import write_context, write_weights
from nemo_ptq.errors import PtqError
from nemo_ptq.models.hugging_face import HuggingFaceClass
from nemo_ptq.models.mapping import WeightRule
from nemo_ptq.models.state_space import STATE_PARAMETERS

# What a NeMo checkpoint is made of.
_PARTS = ("context", "weights")


class HuggingFaceModel:
    """A Hugging Face directory as a NeMo model: its configuration and its tensors, none of them read yet.

    Args:
        directory: config.json, weights, tokenizer. Code in it is never run.

    Attributes:
        path: The directory.
        parts: Every part of every tensor, as NeMo stores it.
        vocab_size: Rows of the embedding, padding included.
        size: What the whole model takes.

    Raises:
        PtqError: A file is missing or damaged, the model is of an unknown family, or a tensor is missing or would be
            lost.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory
        self._model = describe(directory)
        self._tokenizer = load_tokenizer(directory)
        self._config, self.vocab_size = _nemo_config(self._model, len(self._tokenizer))
        generation = load_generation_config(directory)
        if self._model.spec.state_space is None:  # NeMo's configuration of these has no place for it
            self._config.generation_config = generation
        self.parts = _convert(self._model, Weights(self._model.tensors), self.vocab_size)
        self.size = WeightsSize.of((part.shape, part.dtype) for part in self.parts)

    @property
    def stored_parts(self) -> list[TensorPart]:
        """The parts as NeMo's checkpoints have them: groups of rows of state spaces are tensors of their own."""
        state_space = self._model.spec.state_space
        groups = {} if state_space is None else state_space.rows
        return [stored for part in self.parts for stored in _with_rows_split(part, groups)]

    @contextmanager
    def model_config(self) -> Iterator[fdl.Config]:
        """Gives, within a ``with`` block, the configuration of NeMo's model and tokenizer, free to be changed.

        The tokenizer's files that it names exist for as long.
        """
        with tempfile.TemporaryDirectory() as scratch:
            files = str(Path(scratch, "nemo_tokenizer"))
            self._tokenizer.save_pretrained(files)
            yield _nemo_model(self._model.hf_class, copy.deepcopy(self._config), files)

    def write_context(self, directory: Path) -> None:
        """Makes the ``context/`` directory of a NeMo checkpoint."""
        with self.model_config() as model:
            write_context(directory, model)
        keep_config(self.path, directory)


def import_hf(source: str, output: str, overwrite: bool = False) -> Path:
    """Make a NeMo 2.0 checkpoint from a Hugging Face directory.

    Needs no GPU and no more memory than the largest tensor takes. Code in the directory is never run.

    Args:
        source: Hugging Face directory: config.json, weights, tokenizer.
        output: Directory to make. It appears whole or not at all.
        overwrite: Whether a NeMo checkpoint that stands there is replaced.

    Returns:
        The checkpoint's directory.

    Raises:
        PtqError: A file is missing or damaged, the model is of an unknown family, a tensor is missing or would be
            lost, `output` exists, or another process makes it.
    """
    directory, checkpoint = Path(source), Path(output)
    _check_paths(directory, checkpoint, overwrite)
    model = HuggingFaceModel(directory)
    with reserved(checkpoint.absolute()):
        _check_paths(directory, checkpoint, overwrite)  # again: another process may have made it
        with atomic_directory(checkpoint.absolute()) as staging:
            write_weights(staging / "weights", model.stored_parts)
            model.write_context(staging / "context")
    return checkpoint


def _check_paths(source: Path, output: Path, overwrite: bool) -> None:
    if not source.is_dir():
        raise PtqError(f"{source} is not a directory: download the model first")
    if link := next(links_out_of(source), None):
        raise PtqError(f"the link {link} leads out of {source}: put the file itself in its place, or remove the link")
    if output.resolve() in (source.resolve(), *source.resolve().parents):
        raise PtqError(f"{output} holds the source {source}: choose another output")
    if problem := place_problem(output.absolute()):
        raise PtqError(f"{output} {problem}")
    if output.exists() and not overwrite:
        raise PtqError(f"{output} exists: choose another output, or ask to overwrite it")
    if output.exists():
        if not (output / "weights" / "metadata.json").is_file():
            raise PtqError(f"{output} is not a NeMo checkpoint, so it is not overwritten: choose another output")
        others = sorted(entry.name for entry in output.iterdir() if entry.name not in _PARTS)
        if others:
            raise PtqError(
                f"{output} holds {', '.join(others[:3])} beside a NeMo checkpoint, so it is not overwritten: move that "
                "away, or choose another output"
            )


def _nemo_config(model: HuggingFaceDescription, tokens: int) -> tuple[fdl.Config, int]:
    """NeMo's configuration, not built, and the number of rows of its embedding.

    Args:
        model: The model.
        tokens: That the tokenizer knows: usually fewer than the embedding has rows; more where some were added and the
            model was not trained on.
    """
    hf_class, rows, dtype = model.hf_class, model.settings["vocab_size"], getattr(torch, model.dtype)
    arguments = {
        **model.common,
        "make_vocab_size_divisible_by": math.gcd(rows, 128),
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        **model.special,
    }
    divisor = arguments["make_vocab_size_divisible_by"]
    padded = _round_up(rows, divisor)
    if _round_up(tokens, divisor) != padded:  # NeMo must not count the tokens
        arguments["vocab_size"] = padded
    return fdl.Config(getattr(importlib.import_module(hf_class.nemo_module), model.nemo_class), **arguments), padded


def _nemo_model(hf_class: HuggingFaceClass, config: fdl.Config, tokenizer: str) -> fdl.Config:
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    model = getattr(importlib.import_module(hf_class.nemo_module), hf_class.nemo_model.rpartition(".")[2])
    return fdl.Config(model, config=config, tokenizer=fdl.Config(AutoTokenizer, pretrained_model_name=tokenizer))


def _round_up(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor


def _convert(model: HuggingFaceDescription, weights: Weights, padded_vocab: int) -> list[TensorPart]:
    """Plan every tensor. Nothing is read yet; shapes come from running the rules on tensors without data."""
    sizes, dtype = (model.spec.num_query_groups, model.spec.head_size, padded_vocab), getattr(torch, model.dtype)

    def dtype_of(part: PlannedPart) -> torch.dtype:
        """That of the model; a state space's own parameters keep theirs, since servers have them in float32."""
        return weights.meta(part.names[0]).dtype if part.rule.field in STATE_PARAMETERS else dtype

    def make(rule: WeightRule, names: tuple[str, ...], dtype: torch.dtype) -> torch.Tensor:
        return rule.join(map(weights.read, names), *sizes).to(dtype)

    return [
        TensorPart(
            key=part.key,
            shape=tuple(part.rule.join(map(weights.meta, part.names), *sizes).shape),
            dtype=dtype_of(part),
            read=partial(make, part.rule, part.names, dtype_of(part)),
            position=part.position,
        )
        for part in planned_parts(model.hf_class, model.settings, model.spec)
    ]


def _with_rows_split(part: TensorPart, groups: Mapping[str, Mapping[str, int]]) -> Iterator[TensorPart]:
    """Yields a tensor for each group of rows of a part, where it has several that are stored apart."""
    rows = next((rows for module, rows in groups.items() if f".{module}." in part.live_name), None)
    if rows is None:
        yield part
        return
    first = 0
    for name, count in rows.items():
        which = slice(first, first + count)
        yield replace(part, key=f"{part.key}.{name}", shape=(count, *part.shape[1:]), read=partial(_rows, part, which))
        first += count


def _rows(part: TensorPart, which: slice) -> torch.Tensor:
    return part.read()[which].clone()
