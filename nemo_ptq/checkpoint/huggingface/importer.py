# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Import a Hugging Face directory as a NeMo 2.0 checkpoint."""

import copy
import importlib
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from nemo_ptq.checkpoint.adapters.peft_adapter import PeftAdapter
from nemo_ptq.checkpoint.gpt import ACTIVATION_FUNCTIONS, MODEL_CLASSES
from nemo_ptq.checkpoint.huggingface.description import HuggingFaceDescription, describe
from nemo_ptq.checkpoint.huggingface.hf_weights import load_generation_config, load_tokenizer
from nemo_ptq.checkpoint.huggingface.megatron_parts import megatron_parts
from nemo_ptq.checkpoint.huggingface.published import keep_config
from nemo_ptq.checkpoint.links import links_out_of
from nemo_ptq.checkpoint.model_fields import ModelFields
from nemo_ptq.checkpoint.parts import WeightsSize
from nemo_ptq.checkpoint.staging import atomic_directory, place_problem, reserved
from nemo_ptq.checkpoint.tokenizers import Tokenizer, with_nemos_special_tokens
from nemo_ptq.console.quiet import import_nemo
from nemo_ptq.errors import PtqError
from nemo_ptq.models.spec import WITHOUT_LONG_ROPE

# The parts of a NeMo checkpoint.
_PARTS = ("context", "weights")


class HuggingFaceModel:
    """A Hugging Face directory as a NeMo model: its configuration and its tensors, none of them read yet.

    Args:
        directory: config.json, weights, tokenizer. Code in it is never run.
        adapter: PEFT's LoRA that is merged into its weights as they are read; None for none.

    Attributes:
        path: The directory.
        parts: Every part of every tensor, as Megatron's model has it.
        vocab_size: Rows of the embedding, padding included.
        size: Size of the whole model.
        spec: The model.

    Raises:
        PtqError: A file is missing or damaged, the model is of an unknown family, or a tensor is missing or would be
            lost.
    """

    def __init__(self, directory: Path, adapter: PeftAdapter | None = None) -> None:
        self.path = directory
        self._model = describe(directory)
        self._tokenizer = load_tokenizer(directory)
        self.spec = self._model.spec
        self._arguments, self.vocab_size = _nemo_arguments(self._model, len(self._tokenizer))
        generation = load_generation_config(directory)
        if self.spec.state_space is None:  # NeMo's configuration of these has no place for it
            self._arguments["generation_config"] = generation
        self.parts = megatron_parts(self._model, self.vocab_size, adapter)
        self.size = WeightsSize.of((part.shape, part.dtype) for part in self.parts)

    @property
    def config(self) -> SimpleNamespace:
        """NeMo's configuration of the model, as attributes."""
        defaults = {"layernorm_zero_centered_gamma": False}
        return SimpleNamespace(**{**defaults, **self._model.hf_class.nemo_fixed, **self._arguments})

    @property
    def fields(self) -> ModelFields | None:
        """The fields that the model is built from; None where only NeMo's own classes can build it."""
        hf_class = self._model.hf_class
        if hf_class.nemo_model not in MODEL_CLASSES:
            return None
        fields = {**hf_class.nemo_fixed, **self._arguments}
        fields["activation_func"] = ACTIVATION_FUNCTIONS[fields["activation_func"]]
        return ModelFields(
            hf_class.nemo_model, f"{hf_class.nemo_module}.{self._model.nemo_class}", fields, self._load_tokenizer
        )

    def _load_tokenizer(self) -> Tokenizer:
        # A copy, since the special tokens that NeMo adds are none of the directory's.
        return Tokenizer(with_nemos_special_tokens(copy.deepcopy(self._tokenizer)))

    @contextmanager
    def model_config(self) -> Iterator[Any]:
        """Gives, within a ``with`` block, the fiddle config of NeMo's model and tokenizer, free to be changed.

        The tokenizer's files that it names exist only within the block.
        """
        with tempfile.TemporaryDirectory() as scratch:
            files = str(Path(scratch, "nemo_tokenizer"))
            self._tokenizer.save_pretrained(files)
            yield _nemo_model(self._model, copy.deepcopy(self._arguments), files)

    def write_context(self, directory: Path) -> None:
        """Makes the ``context/`` directory of a NeMo checkpoint."""
        from nemo_ptq.checkpoint.writer import write_context  # imports torch's distributed checkpoints

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
    from nemo_ptq.checkpoint.writer import write_weights  # imports torch's distributed checkpoints

    directory, checkpoint = Path(source), Path(output)
    _check_paths(directory, checkpoint, overwrite)
    model = HuggingFaceModel(directory)
    if model.spec.long_rope is not None:
        raise PtqError(
            f"{source} has longrope, and {WITHOUT_LONG_ROPE}: give jobs the Hugging Face directory, which they take as "
            "it is"
        )
    with reserved(checkpoint.absolute()):
        _check_paths(directory, checkpoint, overwrite)  # again: another process may have made it
        with atomic_directory(checkpoint.absolute()) as staging:
            write_weights(staging / "weights", model.parts, model.spec.state_space)
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


def _nemo_arguments(model: HuggingFaceDescription, tokens: int) -> tuple[dict[str, Any], int]:
    """The arguments of NeMo's configuration class, and the number of rows of its embedding.

    Args:
        model: The model.
        tokens: Number of the tokenizer's tokens: usually fewer than the embedding's rows; more where tokens were added
            without training the model on them.
    """
    rows, dtype = model.settings["vocab_size"], getattr(torch, model.dtype)
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
    return arguments, padded


def _nemo_model(model: HuggingFaceDescription, arguments: dict[str, Any], tokenizer: str) -> Any:
    """The fiddle config of NeMo's model, which imports NeMo."""
    import_nemo()
    import fiddle as fdl
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    hf_class = model.hf_class
    module = importlib.import_module(hf_class.nemo_module)
    return fdl.Config(
        getattr(module, hf_class.nemo_model.rpartition(".")[2]),
        config=fdl.Config(getattr(module, model.nemo_class), **arguments),
        tokenizer=fdl.Config(AutoTokenizer, pretrained_model_name=tokenizer),
    )


def _round_up(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor
