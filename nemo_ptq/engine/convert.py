# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Converts checkpoints to another kind, unquantized: layer by layer, in one process, without building a model.

The output is read back, and every tensor compared with the one it was made from.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from nemo_ptq.checkpoint.adapters.adapter import check_adapter, read_adapter
from nemo_ptq.checkpoint.adapters.merging import merged_parts
from nemo_ptq.checkpoint.adapters.peft_adapter import PeftAdapter
from nemo_ptq.checkpoint.huggingface.description import describe
from nemo_ptq.checkpoint.huggingface.hf_weights import load_tokenizer
from nemo_ptq.checkpoint.huggingface.megatron_parts import megatron_parts
from nemo_ptq.checkpoint.links import links_out_of
from nemo_ptq.checkpoint.megatron.directories import is_megatron
from nemo_ptq.checkpoint.metadata import is_hugging_face, read_metadata
from nemo_ptq.checkpoint.parts import TensorPart
from nemo_ptq.checkpoint.settings import read_context
from nemo_ptq.checkpoint.staging import atomic_directory, place_problem, reserved
from nemo_ptq.checkpoint.torch_dist import checkpoint_parts
from nemo_ptq.config import ExportConfig
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.errors import PtqError, VerificationError
from nemo_ptq.export.calibrated import CalibratedLayers
from nemo_ptq.export.exports import Exports
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.export.manifest_writer import write_manifest
from nemo_ptq.export.nemo_context import write_context
from nemo_ptq.export.shard_map import on_one_rank
from nemo_ptq.export.source import Source
from nemo_ptq.models.mapping import EMBEDDING, OUTPUT
from nemo_ptq.models.registry import Family, family_of
from nemo_ptq.models.spec import WITHOUT_LONG_ROPE, ModelSpec
from nemo_ptq.verify.checks import verify
from nemo_ptq.versions import producer

_VOCABULARY = (f"{EMBEDDING}.weight", f"{OUTPUT}.weight")


@dataclass(frozen=True)
class _Model:
    """A model to be converted.

    Attributes:
        path: The checkpoint.
        spec: The model's description.
        config: NeMo's configuration of it, as attributes.
        parts: Every part of every tensor, under Megatron's names.
        has_vocab_size: Whether the configuration names the vocabulary's size.
        load_tokenizer: Returns Hugging Face's tokenizer; None where there is none.
    """

    path: Path
    spec: ModelSpec
    config: Any
    parts: Sequence[TensorPart]
    has_vocab_size: bool
    load_tokenizer: Callable[[], Any]

    @property
    def family(self) -> Family:
        return family_of(self.spec.config_class.rpartition(".")[2])

    @property
    def dtype(self) -> torch.dtype:
        return next(part.dtype for part in self.parts if part.key == _VOCABULARY[0])


class _AsStored(ExportConfig):
    """Asks for the data type of the checkpoint, by torch's name."""

    @property
    def torch_dtype_name(self) -> str:
        return str(self.dtype)


def convert(
    source: Path, output: Path, name: str, tokenizer: Path | None, reporter: Reporter, adapter: Path | None = None
) -> None:
    """Converts a checkpoint.

    Args:
        source: A NeMo 2.0 checkpoint, a Hugging Face directory, or a checkpoint of Megatron-LM or Megatron-Bridge.
        output: Directory to make. It appears whole or not at all.
        name: The kind of checkpoint to make, one of :data:`TARGETS`.
        tokenizer: Hugging Face directory with the tokenizer, in place of the checkpoint's own.
        reporter: Shows progress.
        adapter: A LoRA adapter that is merged into the weights; None for none.

    Raises:
        PtqError: If the source or the adapter cannot be read, the output's kind cannot hold the model, or the output
            exists.
        VerificationError: If a tensor of the output differs from the source's.
    """
    if name not in TARGETS:
        raise PtqError(f"--format {name} is not known: choose one of {', '.join(TARGETS)}")
    target = TARGETS[name]
    _check_output(source, output)
    if link := next(links_out_of(source), None):
        raise PtqError(f"the link {link} leads out of {source}: put the file itself in its place, or remove the link")
    with reporter.step("load"):
        model = _open(source, adapter)
        own = model.load_tokenizer() if tokenizer is None else load_tokenizer(tokenizer)
    if own is None and target.needs_tokenizer:
        raise PtqError(
            f"{source} has no tokenizer that can be loaded: give --tokenizer the Hugging Face directory of the "
            "tokenizer that the model was trained with"
        )
    with reserved(output), atomic_directory(output) as staging:
        with reporter.step("convert"):
            target.write(model, staging, own, tokenizer is not None)
        with reporter.step("verify"):
            read_metadata(staging)  # looks at all that the files say of themselves
            count = _check_same(model, target.read(staging))
            write_manifest(staging, {}, {"format": name, "producer": producer(), "arguments": {}})
            _verify(staging)
    reporter.say(f"{output} is ready: {count} tensors, each equal to that of {source}")


def _check_output(source: Path, output: Path) -> None:
    if problem := place_problem(output):
        raise PtqError(f"{output} {problem}")
    if output.exists():
        raise PtqError(f"{output} exists: choose another output")
    if source.resolve() == output.resolve() or source.resolve() in output.resolve().parents:
        raise PtqError(f"{output} is inside of the source {source}: choose another output")


def _open(path: Path, adapter: Path | None) -> _Model:
    spec = read_metadata(path)
    name = spec.config_class.rpartition(".")[2]
    try:
        family_of(name)
    except PtqError as error:
        raise PtqError(
            f"{path} is of {spec.config_class}, a class that is not NeMo's: if it changes nothing but settings of one "
            "of NeMo's, name that class in context/io.json and context/model.yaml of a copy"
        ) from error
    if spec.is_quantized:
        raise PtqError(f"{path} holds ModelOpt's quantizers: give the model as it was before quantization")
    if adapter is None:
        return _open_model(path, spec, None)
    check_adapter(adapter, path, spec, is_hugging_face(path))
    found = read_adapter(adapter)
    if isinstance(found, PeftAdapter):
        return _open_model(path, spec, found)
    model = _open_model(path, spec, None)
    return replace(model, parts=merged_parts(model.parts, found))


def _open_model(path: Path, spec: ModelSpec, adapter: PeftAdapter | None) -> _Model:
    if is_hugging_face(path):
        from nemo_ptq.checkpoint.huggingface.importer import HuggingFaceModel

        imported = HuggingFaceModel(path, adapter)
        return _Model(path, spec, imported.config, imported.parts, True, lambda: load_tokenizer(path))
    if is_megatron(path):
        from nemo_ptq.checkpoint.megatron.model import MegatronModel

        trained = MegatronModel(path)
        files = trained.tokenizer
        named = trained.has_vocab_size
        return _Model(path, spec, trained.config, trained.parts, named, lambda: files and load_tokenizer(files))
    context = read_context(path)
    is_known, has_vocab_size = context.is_known, context.has_vocab_size
    context.config.generation_config = context.load_generation_config() if is_known else None
    load = context.load_tokenizer if is_known else lambda: None
    return _Model(path, spec, context.config, checkpoint_parts(path), has_vocab_size, load)


def _write_hugging_face(model: _Model, directory: Path, tokenizer: Any, replaced: bool) -> None:
    if model.family.hugging_face is None:
        raise PtqError(f"{model.family.without_hugging_face}: choose --format nemo or megatron")
    by_name = {part.live_name: part for part in model.parts}
    layers = CalibratedLayers(
        lambda name: by_name[name].read() if name in by_name else None,
        {},
        {},
        bool(model.config.layernorm_zero_centered_gamma),
    )
    source = Source(
        layers=layers,
        rank=0,
        tensor_rank=0,
        tensor_ranks=1,
        shard_map=on_one_rank({name.rpartition(".")[0] for name in by_name}, {}, frozenset()),
        shape=model.spec,
        family=model.family,
        config=model.config,
        has_vocab_size=model.has_vocab_size,
        tokenizer=SimpleNamespace(tokenizer=tokenizer),
        tokenizer_is_replaced=replaced,
        checkpoint=model.path,
        settings=_AsStored(path=str(directory), dtype=str(model.dtype).removeprefix("torch.")),
    )
    FORMATS["hf"].check_model(model.spec, model.family, source.tokenizer)
    with Exports(source, {"hf": directory}, None) as exports:
        for index in range(model.spec.num_layers + 2):
            exports.visit(index, None, {})
    exports.write_documents({"hf": directory})


def _write_nemo(model: _Model, directory: Path, tokenizer: Any, replaced: bool) -> None:
    from nemo_ptq.checkpoint.writer import write_weights  # imports Megatron

    if model.spec.long_rope is not None:
        raise PtqError(f"--format nemo is not for models with longrope: {WITHOUT_LONG_ROPE}; use hf")
    write_weights(directory / "weights", model.parts, model.spec.state_space)
    write_context(model.path, directory / "context", SimpleNamespace(tokenizer=tokenizer), replaced)


def _write_megatron(model: _Model, directory: Path, tokenizer: Any, replaced: bool) -> None:
    from nemo_ptq.checkpoint.megatron.writer import write_megatron  # imports Megatron

    write_megatron(directory, model.spec, model.config, model.parts, tokenizer)


def _read_hugging_face(directory: Path) -> Sequence[TensorPart]:
    described = describe(directory)
    return megatron_parts(described, described.settings["vocab_size"])


def _read_megatron(directory: Path) -> Sequence[TensorPart]:
    from nemo_ptq.checkpoint.megatron.model import MegatronModel

    return MegatronModel(directory).parts


@dataclass(frozen=True)
class _Target:
    """A kind of checkpoint that others can be converted to.

    Attributes:
        write: Writes a model into a directory, given Hugging Face's tokenizer and whether that replaces the
            checkpoint's own.
        read: Returns every part of every tensor of what was written.
        needs_tokenizer: Whether it must have a tokenizer.
    """

    write: Callable[[_Model, Path, Any, bool], None]
    read: Callable[[Path], Sequence[TensorPart]]
    needs_tokenizer: bool = True


TARGETS: Mapping[str, _Target] = {
    "hf": _Target(_write_hugging_face, _read_hugging_face),
    "nemo": _Target(_write_nemo, checkpoint_parts),
    "megatron": _Target(_write_megatron, _read_megatron, needs_tokenizer=False),
}
"""The kinds of checkpoints that others can be converted to, by the names of ``--format``."""


def _check_same(model: _Model, written: Sequence[TensorPart]) -> int:
    """Compares the written tensors with those of the model, and returns their number.

    Raises:
        VerificationError: If one is missing, or differs.
    """
    found = {part.live_name: part for part in written}
    expected = {part.live_name: part for part in model.parts}
    if missing := sorted(expected.keys() - found.keys()):
        raise VerificationError(f"the output lacks {len(missing)} tensors, {missing[0]} among them, and was removed")
    for name, part in expected.items():
        source, copy = part.read(), found[name].read()
        if part.key in _VOCABULARY:  # padding is left out
            source = source[: len(copy)]
        if not torch.equal(source.to(copy.dtype), copy):
            raise VerificationError(f"{name} of the output differs from that of {model.path}: the output was removed")
    return len(expected)


def _verify(directory: Path) -> None:
    if failed := [check for check in verify(directory) if not check.ok]:
        reasons = "; ".join(f"{check.name}: {check.detail}" for check in failed)
        raise VerificationError(f"what was written does not pass its verification, and was removed: {reasons}")
