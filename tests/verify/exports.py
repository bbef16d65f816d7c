# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Exports of one calibration in every format, and what the reader must compute of each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.verify import dequantize as dq
from nemo_ptq.verify.forward_pass import CPU, open_model, run_layers
from nemo_ptq.verify.linear import Linear, Stack, StoredLinear, Tensors
from nemo_ptq.verify.model_config import ModelConfig
from nemo_ptq.verify.weights import Weights
from tests.export.hugging_face import TOKENS

LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
NORMS = ("input_layernorm", "post_layernorm")


@dataclass(frozen=True)
class Cell:
    """What is exported.

    Attributes:
        model: Name of the tiny model.
        algorithm: How it is quantized.
        formats: The formats, each to the subdirectory of its name.
        kv_cache: Whether its KV cache is quantized.
        tp: Tensor parallelism of the calibration.
    """

    model: str
    algorithm: str
    formats: tuple[str, ...]
    kv_cache: bool = False
    tp: int = 2


def export_cells(checkpoint: Path, cells: Sequence[Cell], directory: Path) -> None:
    """Calibrates once for each cell, and exports to ``directory / algorithm / format``, on this rank."""
    from tests import steps

    for cell in cells:
        quantization = QuantizationConfig(cell.algorithm, enable_kv_cache=cell.kv_cache)
        directory_of = partial(Path, directory, cell.algorithm)
        steps.run_jobs(
            [
                steps.job_of(checkpoint, quantization, directory_of(name), (cell.tp, 1), formats=name)
                for name in cell.formats
            ]
        )


@dataclass(frozen=True)
class Expected:
    """A trtllm directory's model, with what another format stores otherwise.

    The gains of norms are rounded where they are not kept minus one, and where pre-quantization scales go into them.
    In ModelOpt's unified format FP8 weights are rounded to bfloat16 before they are to FP8, since their scale is no
    array there.

    Attributes:
        exported: The trtllm directory.
        other: The other format, for its norms.
        original: For the unified format the checkpoint, with the weights before they were quantized.
    """

    exported: Weights
    other: Weights
    original: Weights | None = None

    @property
    def config(self) -> ModelConfig:
        return self.exported.config

    def tensor(self, name: str) -> torch.Tensor:
        is_norm = name.rpartition(".")[0].endswith(("layernorm", "ln_f"))
        return (self.other if is_norm else self.exported).tensor(name)

    def linear(self, name: str, device: torch.device) -> Stack:
        (stored,) = self.exported.linear(name, device)
        if self.other.linear(name, device)[0].prequant_scale is None:
            stored = replace(stored, prequant_scale=None)
        return (stored if self.original is None else _rounded_twice(stored, self.original.linear(name, device)),)

    def experts(self, name: str, device: torch.device) -> list[Stack]:
        stacks = self.exported.experts(name, device)
        if self.original is None:
            return stacks
        pairs = zip(stacks, self.original.experts(name, device), strict=True)
        return [(_rounded_twice(stored, original),) for (stored,), original in pairs]

    def kv_cache(self, layer: int, device: torch.device) -> tuple[Tensors, Tensors] | None:
        return self.exported.kv_cache(layer, device)


def _rounded_twice(stored: StoredLinear, original: Stack) -> StoredLinear:
    if stored.weight.dtype != torch.float8_e4m3fn:
        return stored
    assert isinstance(stored.dequantize, partial)
    scale = stored.dequantize.keywords["scale"].reshape(())
    weight = whole(original).weight.bfloat16() / scale
    return replace(stored, weight=weight.to(torch.float8_e4m3fn), dequantize=partial(dq.dequantize_fp8, scale=scale))


def whole(stack: Stack) -> Linear:
    """One layer of several that have the same input and treat it in the same way."""
    linears = [stored.dequantized() for stored in stack]
    biases = [linear.bias for linear in linears if linear.bias is not None]
    weight = torch.cat([linear.weight for linear in linears])
    return replace(linears[0], weight=weight, bias=torch.cat(biases) if biases else None)


def gains(exported: Weights, other: Weights) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Gains of another format's norms, and what of the trtllm directory they are but for rounding."""
    before_mlp = "pre_feedforward_layernorm" if exported.config.post_norms else "post_layernorm"
    for layer in range(exported.config.num_hidden_layers):
        for norm, linear in (("input_layernorm", "attention.qkv"), (before_mlp, "mlp.fc")):
            prefix = f"transformer.layers.{layer}."
            found, gain = (weights.tensor(f"{prefix}{norm}.weight").float() for weights in (other, exported))
            if exported.config.moe is None or linear != "mlp.fc":
                scale = exported.linear(prefix + linear, CPU)[0].prequant_scale
                is_folded = scale is not None and other.linear(prefix + linear, CPU)[0].prequant_scale is None
                gain = gain * scale if is_folded else gain
            yield found, gain
    found, gain = (weights.tensor("transformer.ln_f.weight").float() for weights in (other, exported))
    yield found, gain


def model_logits(weights: Weights) -> torch.Tensor:
    """float32 (batch, sequence, vocabulary)."""
    return run_layers(weights, [TOKENS]).logits(0)


def open_all(directory: Path, formats: Sequence[str]) -> dict[str, Weights]:
    """Opens the formats of a cell."""
    return {format: open_model(directory / format) for format in formats}
