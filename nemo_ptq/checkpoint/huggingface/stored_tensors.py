# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Finds the tensors of a Hugging Face directory, and checks that NeMo's can be made from them.

Only the headers of safetensors files are read, without torch; PyTorch's own files, which few models still have, need
torch.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nemo_ptq.checkpoint.huggingface.hf_files import weight_files
from nemo_ptq.checkpoint.known_tensors import DTYPES
from nemo_ptq.errors import PtqError
from nemo_ptq.models.hf_settings import shown
from nemo_ptq.models.hugging_face import HuggingFaceClass, Settings
from nemo_ptq.models.mapping import EMBEDDING, OUTPUT, WeightRule
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.untrusted import FileError, check_regular

# Data types by the names that safetensors files have for them.
_SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"} | {
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}
# Other names of data types.
_OTHER_NAMES = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}
# Buffers that old files carry and no model loads.
_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: Where it is.
        dtype: Name of its torch data type.
        shape: Its shape.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PlannedPart:
    """One layer's (or expert's) part of a Megatron tensor, and the tensors that it is made of.

    Attributes:
        rule: The rule for the tensor.
        names: Names of the tensors that it is made of, each once, in the order of the rule's sources.
        position: (index, size) along each stacked axis.
        layer: Its layer, where layers differ, so that NeMo does not stack them.
    """

    rule: WeightRule
    names: tuple[str, ...]
    position: tuple[tuple[int, int], ...]
    layer: int | None = None

    @property
    def key(self) -> str:
        """Its name in a NeMo checkpoint, without the "module." prefix."""
        if self.layer is None:
            return self.rule.target
        return self.rule.target.replace("decoder.layers.", f"decoder.layers.{self.layer}.", 1)

    @property
    def module(self) -> str:
        """Megatron's name of the module in the whole model."""
        layer = [self.layer] if self.layer is not None else []
        numbers = zip(("layer", "expert"), [*layer, *(number for number, _ in self.position)], strict=False)
        return self.rule.module.format(**dict(numbers))


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a Hugging Face directory by name; none of them is read.

    Raises:
        PtqError: If there are no weights, files that the index lists are missing, a file is damaged, or a tensor is in
            two of them.
    """
    found: dict[str, StoredTensor] = {}
    for file in weight_files(directory):
        tensors = tensors_in(file)
        if twice := sorted(found.keys() & tensors.keys()):
            raise PtqError(
                f"{twice[0]} is in {found[twice[0]].file.name} and in {file.name}, and readers differ in which they "
                "take: remove the file that is not the model's, or copy the model again"
            )
        found |= tensors
    return found


def tensors_in(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one file by name; none of them is read.

    Raises:
        PtqError: If the file is damaged.
    """
    return _safetensors(file) if file.suffix == ".safetensors" else _pytorch(file)


def _safetensors(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(check_regular(file), framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
            return {
                name: StoredTensor(
                    file, _SAFETENSORS.get(dtype := str(part.get_dtype()), dtype), tuple(part.get_shape())
                )
                for name, part in slices.items()
            }
    except (OSError, SafetensorError, FileError) as error:
        reason = error.reason if isinstance(error, FileError) else str(error).partition("\n")[0]
        raise PtqError(f"{file} cannot be read as tensors ({reason}); is it whole, or a Git LFS pointer?") from error


def _pytorch(file: Path) -> dict[str, StoredTensor]:
    from nemo_ptq.checkpoint.huggingface.hf_weights import load_tensors

    return {
        name: StoredTensor(file, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in load_tensors(file).items()
    }


def planned_parts(hf_class: HuggingFaceClass, settings: Settings, model: ModelSpec) -> Sequence[PlannedPart]:
    """Returns the parts of all Megatron tensors, and the tensors that they are made of.

    Args:
        hf_class: The model's class.
        settings: From :meth:`~nemo_ptq.models.hugging_face.HuggingFaceClass.read`.
        model: The model that they describe.
    """
    parts = (part for rule in _rules(hf_class, settings) for part in _numbered(rule, settings))
    if model.state_space is None:
        return list(parts)
    return [_unstacked(part) for part in parts if model.has(part.module)]


def _unstacked(part: PlannedPart) -> PlannedPart:
    """A part of a layer that is unlike others."""
    return replace(part, position=(), layer=part.position[0][0]) if part.position else part


def _rules(hf_class: HuggingFaceClass, settings: Settings) -> Sequence[WeightRule]:
    if hf_class.can_tie and settings["tie_word_embeddings"]:
        return hf_class.rules
    head = hf_class.embedding if settings["tie_word_embeddings"] else f"{hf_class.output_layer}.weight"
    return (*hf_class.rules, WeightRule(f"{OUTPUT}.weight", {"": head}))


def _numbered(rule: WeightRule, settings: Settings) -> Iterator[PlannedPart]:
    sizes = {"layer": settings["num_hidden_layers"], "expert": settings.get("num_local_experts", 0)}
    sources = tuple(dict.fromkeys(rule.sources.values()))
    axes = [axis for axis in sizes if f"{{{axis}}}" in sources[0]]
    for index in product(*(range(sizes[axis]) for axis in axes)):
        numbers = dict(zip(axes, index, strict=True))
        names = tuple(source.format(**numbers) for source in sources)
        yield PlannedPart(rule, names, tuple((number, sizes[axis]) for axis, number in numbers.items()))


def check_tensors(
    hf_class: HuggingFaceClass, settings: Settings, model: ModelSpec, stored: Mapping[str, StoredTensor]
) -> None:
    """Refuses weights that a model cannot be made from.

    Args:
        hf_class: The model's class.
        settings: The settings of its config.json.
        model: The model that they describe.
        stored: The tensors in the files.

    Raises:
        PtqError: If a tensor is missing or would be lost, has a data type that no weights have, or another shape than
            config.json says.
    """
    if settings["num_hidden_layers"] > len(stored):
        raise PtqError(
            f"config.json has {settings['num_hidden_layers']} layers, and the weights have only {len(stored)} tensors: "
            "give the config.json of these weights"
        )
    parts = planned_parts(hf_class, settings, model)
    used = {name for part in parts for name in part.names}
    if missing := sorted(used - stored.keys()):
        way_out = "is a file missing?"
        if missing == [f"{hf_class.output_layer}.weight"]:
            way_out = "is a file missing, or has config.json lost its tie_word_embeddings true?"
        lacking = missing[0] if len(missing) == 1 else f"{len(missing)} tensors, {missing[0]} among them"
        raise PtqError(f"the weights lack {lacking}; {way_out}")
    copies = {f"{hf_class.output_layer}.weight"} if settings["tie_word_embeddings"] else set()
    lost = sorted(name for name in stored.keys() - used - copies if not _BUFFERS.search(name))
    if lost:
        raise PtqError(f"NeMo has no place for {len(lost)} tensors of the weights, {lost[0]} among them")
    if others := sorted(name for name in used if stored[name].dtype not in DTYPES):
        raise PtqError(
            f"{len(others)} tensors are of a data type that is not supported, {others[0]} of {stored[others[0]].dtype} "
            f"among them: give the model in {', '.join(DTYPES)}"
        )
    rows = stored[hf_class.embedding].shape[0]
    if rows != settings["vocab_size"]:
        raise PtqError(
            f"the embedding has {rows} rows, but config.json has vocab_size {settings['vocab_size']}: give the "
            "config.json of these weights"
        )
    for part in parts:
        for name, shape in _shapes(part, model, rows).items():
            if stored[name].shape != shape:
                raise PtqError(
                    f"{name} has shape {stored[name].shape}, and the sizes in config.json make it {shape}: give the "
                    "config.json of these weights"
                )


def _shapes(part: PlannedPart, model: ModelSpec, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that a part is made of, by their names."""
    hidden = model.hidden_size
    outside = {
        EMBEDDING: (vocab_size, hidden),
        OUTPUT: (vocab_size, hidden),
        "embedding.position_embeddings": (model.seq_length, hidden),
        "decoder.final_layernorm": (hidden,),
    }
    if part.rule.module in outside:
        return dict.fromkeys(part.names, outside[part.rule.module])
    module = model.module(part.module)
    tail = () if part.rule.field == "bias" else module.shape[1:]
    found: dict[str, tuple[int, ...]] = {}
    for source, name in zip(dict.fromkeys(part.rule.sources.values()), part.names, strict=True):
        outputs = sum(module.outputs(rows) for rows, other in part.rule.sources.items() if other == source)
        found[name] = (outputs, *tail)
    return found


def weights_dtype(settings: Settings, embedding: StoredTensor) -> str:
    """Returns the data type of a model: the one in its config.json, else that of its embedding.

    Raises:
        PtqError: If it is not one of a model's, or config.json has two.
    """
    found = [given for key in ("dtype", "torch_dtype") if (given := settings.get(key))] or ["auto"]
    names = [_OTHER_NAMES.get(name, name) for name in (str(given).removeprefix("torch.") for given in found)]
    if len(set(names)) > 1:
        raise PtqError(
            f"config.json has dtype {shown(found[0])} and torch_dtype {shown(found[1])}, which are one setting: leave "
            "the one that the weights have"
        )
    given, name = found[0], embedding.dtype if names[0] == "auto" else names[0]
    if name not in DTYPES:
        said = f"the weights are {name}" if name == embedding.dtype else f"config.json has dtype {shown(given)}"
        raise PtqError(f"{said}: import a model in {', '.join(DTYPES)}")
    return name
