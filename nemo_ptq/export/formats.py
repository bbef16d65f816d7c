# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The export formats: one record each, with what it can carry and what writes it.

A format of packed tensors is a record that is given to :func:`register`, a layout table
(:class:`~nemo_ptq.export.layout.Layout`) that :class:`~nemo_ptq.export.stream.LayoutWriter` streams, and the documents
beside the tensors. Imports nothing heavy, since the command line reads this table: records name code by dotted path.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nemo_ptq.config import FP8_CACHE, KV_CACHE_FORMATS, NO_QUANT
from nemo_ptq.errors import PtqError
from nemo_ptq.plugins import locate

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from nemo_ptq.checkpoint.loading import LoadedModel
    from nemo_ptq.export.source import PackedExport, Source
    from nemo_ptq.job import Job
    from nemo_ptq.models.registry import Family
    from nemo_ptq.models.spec import ModelSpec


@dataclass(frozen=True)
class Format:
    """An export format.

    Attributes:
        name: Name in options.
        summary: Description in a few words.
        packed_export: Dotted path of what makes a :class:`~nemo_ptq.export.source.PackedExport` of a
            :class:`~nemo_ptq.export.source.Source`; None where it is not made of packed tensors, block by block.
        model_check: Dotted path of what refuses a model with a PtqError, called with its shape, its family and NeMo's
            tokenizer; None where its readers load whatever NeMo has built.
        model_obstacle: Dotted path of what says, of a model's shape alone, why it is not for the format, or None; a
            plan calls it.
        state_adapter: Dotted path of what makes the calibration state that the format can hold of a state, the model's
            shape and the least activation amax; None where that is the state as it is.
        model_writer: Dotted path of what writes the whole calibrated model, where it is not packed.
        refused: Schemes of algorithms that it cannot carry, with the reason and what to do instead.
        without_kv_cache_alone: Why it cannot carry a quantized KV cache without quantized weights, and what to do
            instead; None where it can.
        cache_formats: Formats that a KV cache can be quantized to in it.
        experts: Schemes that it carries for a mixture of experts.
        only_dtype: The data type that unquantized tensors must have, by torch's name; None if the user may choose.
        folder: Directory of its weights, where it holds the whole model.
        is_tensorrt_llm: Whether its readers are TensorRT-LLM's, with a decoder type and kernels of its own.
        has_parallelism: Whether its files are cut for the tensor and pipeline parallelism of the server.
        mixes_schemes: Whether it can hold layers that are quantized in several ways.
        mixes: Names of the algorithms whose layers servers load side by side in one model.
        is_hugging_face: Whether it is a Hugging Face directory, for a family that has a class there.
        servers: Names of the servers that it is made for: of these a job says if they do not load what it makes.
    """

    name: str
    summary: str
    packed_export: str | None = None
    model_check: str | None = None
    model_obstacle: str | None = None
    state_adapter: str | None = None
    model_writer: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    without_kv_cache_alone: str | None = None
    cache_formats: tuple[str, ...] = (FP8_CACHE,)
    experts: tuple[str, ...] = ("fp8",)
    only_dtype: str | None = None
    folder: str = ""
    is_tensorrt_llm: bool = False
    has_parallelism: bool = False
    mixes_schemes: bool = False
    mixes: tuple[str, ...] = ()
    is_hugging_face: bool = False
    servers: tuple[str, ...] = ()

    @property
    def is_packed(self) -> bool:
        """Whether it is made of packed tensors, while the blocks of the model walk by."""
        return self.packed_export is not None

    @property
    def adapts_state(self) -> bool:
        """Whether it has a calibration state of its own."""
        return self.state_adapter is not None

    def prepare(self, source: "Source") -> "PackedExport":
        """Returns what the directory is made of; every rank calls it with the calibrated model.

        Raises:
            PtqError: If the format cannot represent how the model is quantized.
        """
        assert self.packed_export is not None, self.name
        return locate(self.packed_export)(source)

    def check_model(self, shape: "ModelSpec", family: "Family", tokenizer: Any) -> None:
        """Refuses a model before anything is calibrated.

        Raises:
            PtqError: If the format cannot hold it, or its readers would compute something else from it.
        """
        if self.model_check is not None:
            locate(self.model_check)(shape, family, tokenizer)

    def obstacle(self, shape: "ModelSpec") -> str | None:
        """Says why a model is not for the format, as far as its shape tells; None where nothing is known against it."""
        return None if self.model_obstacle is None else locate(self.model_obstacle)(shape)

    def write_model(self, model: "LoadedModel", job: "Job", directory: "Path") -> "list[Path]":
        """Writes the whole model; every rank calls it.

        Args:
            model: This rank's part of it, with ModelOpt's quantizers.
            job: The job that exports it.
            directory: An existing directory that all ranks see.

        Returns:
            The files that this rank has written.
        """
        assert self.model_writer is not None, self.name
        return locate(self.model_writer)(model, job, directory)

    def adapt(
        self, state: "Mapping[str, torch.Tensor]", shape: "ModelSpec", amax_floor: float | None
    ) -> "Mapping[str, torch.Tensor]":
        """Returns the calibration state that the format can hold.

        Args:
            state: Entries of one or more whole layers.
            shape: The model.
            amax_floor: Lower bound of activation amaxes; None for none.
        """
        return state if self.state_adapter is None else locate(self.state_adapter)(state, shape, amax_floor)


# Of formats that hold the whole model with ModelOpt's quantizers.
_CALIBRATED_ONLY = {
    "fp8_dynamic": "it holds calibrated quantizers; use export_format=compressed_tensors",
    "int8_dynamic": "it holds calibrated quantizers; use export_format=compressed_tensors",
    "w4a16_nvfp4": "it holds calibrated quantizers; use export_format=hf",
}
_WITHOUT_KV_CACHE_ALONE = "{} resumes from quantized weights; use export_format=compressed_tensors or trtllm"

_BUILT_IN = (
    Format(
        "trtllm",
        "a qnemo directory: a TensorRT-LLM checkpoint and NeMo's tokenizer",
        packed_export="nemo_ptq.export.trtllm.trtllm_writer:qnemo_export",
        model_check="nemo_ptq.export.trtllm.trtllm_config:check_exportable",
        refused={
            "fp8_dynamic": "it is written with calibrated activations only; use export_format=compressed_tensors",
            "int8_dynamic": "it is written with calibrated activations only; use export_format=compressed_tensors",
            "w4a16_nvfp4": "TensorRT-LLM's engines round activations along; use export_format=hf",
        },
        is_tensorrt_llm=True,
        has_parallelism=True,
        servers=("tensorrt_llm_engines",),
    ),
    Format(
        "hf",
        "ModelOpt's unified Hugging Face checkpoint",
        packed_export="nemo_ptq.export.huggingface.unified:unified_export",
        model_check="nemo_ptq.export.huggingface.hf_documents:check_exportable",
        refused={
            "int8_sq": "ModelOpt's unified checkpoint has no SmoothQuant; use export_format=compressed_tensors",
            "int8_dynamic": "ModelOpt's unified checkpoint has no such INT8; use export_format=compressed_tensors",
        },
        without_kv_cache_alone="its readers want quantized weights; use export_format=compressed_tensors or trtllm",
        cache_formats=KV_CACHE_FORMATS,
        experts=("fp8", "nvfp4", "w4a16_nvfp4"),
        mixes_schemes=True,
        mixes=("fp8", "nvfp4"),
        is_hugging_face=True,
        servers=("vllm", "tensorrt_llm", "sglang"),
    ),
    Format(
        "compressed_tensors",
        "a Hugging Face directory in the format of the compressed-tensors library",
        packed_export="nemo_ptq.export.huggingface.compressed_tensors:compressed_tensors_export",
        model_check="nemo_ptq.export.huggingface.hf_documents:check_exportable",
        state_adapter="nemo_ptq.export.folding:foldable",
        experts=("fp8", "int4_awq", "nvfp4", "fp8_dynamic", "int8_dynamic", "w4a16_nvfp4"),
        mixes_schemes=True,
        # Those that round without pre-quantization scales: such are folded into other layers, whose rows need scales.
        mixes=("fp8", "int4_awq", "nvfp4", "int8_dynamic"),
        is_hugging_face=True,
        servers=("vllm", "sglang", "transformers"),
    ),
    Format(
        "nemo",
        "a NeMo 2.0 checkpoint with ModelOpt's quantizers, for training or another export",
        model_writer="nemo_ptq.export.nemo.nemo_writer:write_nemo",
        refused=_CALIBRATED_ONLY,
        without_kv_cache_alone=_WITHOUT_KV_CACHE_ALONE.format("NeMo"),
        only_dtype="bfloat16",
        folder="weights",
    ),
    Format(
        "megatron",
        "Megatron-LM's checkpoint with ModelOpt's quantizers, for its training or another export",
        model_check="nemo_ptq.export.megatron.megatron_writer:check_exportable",
        model_obstacle="nemo_ptq.checkpoint.megatron.arguments:unknown_to_megatron",
        model_writer="nemo_ptq.export.megatron.megatron_writer:write_megatron_lm",
        refused={
            **_CALIBRATED_ONLY,
            NO_QUANT: "it holds calibrated quantizers; use nemo-ptq convert --format megatron",
        },
        without_kv_cache_alone=_WITHOUT_KV_CACHE_ALONE.format("Megatron-LM"),
        only_dtype="bfloat16",
        folder="release",
    ),
)

FORMATS: dict[str, Format] = {format.name: format for format in _BUILT_IN}
"""The formats that `export_config.export_format` names, in the order in which messages list them."""


def register(format: Format) -> None:
    """Adds a format; a plugin (:mod:`nemo_ptq.plugins`) calls it when it is imported.

    What the files hold is checked by :mod:`nemo_ptq.verify`, which has a table of its own.

    Raises:
        PtqError: If there is a format of that name.
    """
    if format.name in FORMATS:
        raise PtqError(f"there is an export format {format.name} already: give yours another name")
    FORMATS[format.name] = format


def schemes_problem(schemes: Collection[str], formats: Sequence[str]) -> str | None:
    """Says which of the formats cannot hold layers that are quantized in these schemes, after what quantizes them so.

    Args:
        schemes: Names of schemes.
        formats: Names of formats.
    """
    for format in map(FORMATS.__getitem__, formats):
        if len(schemes) > 1 and format.is_packed and not format.mixes_schemes:
            return (
                f"quantizes layers in {len(schemes)} ways ({', '.join(sorted(schemes))}), and "
                f"export_format={format.name} holds one way and unquantized layers: use export_format=hf or "
                "compressed_tensors"
            )
        for scheme in sorted(schemes):
            if reason := format.refused.get(scheme):
                return f"quantizes layers as {scheme}, which export_format={format.name} cannot hold: {reason}"
    return None
