# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory as the forward pass sees it: unquantized, ModelOpt's, or compressed-tensors'."""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from nemo_ptq.errors import PtqError
from nemo_ptq.verify import dequantize as dq
from nemo_ptq.verify.huggingface.architectures import Architecture
from nemo_ptq.verify.huggingface.hf_directory import HuggingFaceDirectory
from nemo_ptq.verify.linear import Stack, StoredLinear, Tensors, stored_linear
from nemo_ptq.verify.model_config import ModelConfig

_CACHES = {"FP8": dq.fake_quantize_fp8, "NVFP4": dq.fake_quantize_nvfp4}


@dataclass(frozen=True)
class HuggingFaceWeights:
    """A Hugging Face directory under the names of a qnemo directory.

    Attributes:
        directory: The files.
        architecture: The model's architecture.
        config: The model's sizes.
    """

    directory: HuggingFaceDirectory
    architecture: Architecture
    config: ModelConfig

    def tensor(self, name: str) -> torch.Tensor:
        """Reads an unquantized tensor; gains of norms as they multiply."""
        module, _, kind = name.rpartition(".")
        (stored,) = self._modules(module)
        found = self.directory.tensor(f"{stored}.{kind}")
        is_gain = module.endswith(("layernorm", "ln_f")) and kind == "weight"
        return found.float() + 1.0 if is_gain and self.architecture.zero_centered else found

    def linear(self, name: str, device: torch.device) -> Stack:
        """Reads a linear layer, all of its parts."""
        stack = tuple(self._stored(module, device) for module in self._modules(name))
        if name.endswith("attention.qkv") and self._has_fused_heads:
            return tuple(stored.with_rows(self._sort_heads) for stored in stack)
        if name.endswith(("mlp.fc", "mlp.gate")) and self.architecture.has_fused_gate:
            half = int(name.endswith("mlp.gate"))
            return tuple(stored.with_rows(lambda rows: rows.chunk(2)[half]) for stored in stack)
        return stack

    def experts(self, name: str, device: torch.device) -> list[Stack]:
        """Reads the same linear layer of every expert."""
        assert self.config.moe is not None
        return [
            tuple(self._stored(module, device) for module in self._modules(name, expert))
            for expert in range(self.config.moe.num_experts)
        ]

    def kv_cache(self, layer: int, device: torch.device) -> tuple[Tensors, Tensors] | None:
        """Returns functions that round a layer's keys and values as its cache does."""
        quantization = self.directory.quantization
        if quantization is None or quantization.kv_cache is None:
            return None
        modules = self._modules(f"transformer.layers.{layer}.attention.qkv")
        if len(modules) != 3:
            raise PtqError(
                f"{self.directory.path}: the scales of a KV cache belong to k_proj and v_proj, and it has none"
            )
        key, value = (
            partial(
                _CACHES[quantization.kv_algorithm],
                scale=self.directory.tensor(quantization.kv_cache(module)).to(device),
            )
            for module in modules[1:]
        )
        return key, value

    def _modules(self, name: str, expert: int = 0) -> tuple[str, ...]:
        parts = name.removeprefix("transformer.").split(".")
        layer = int(parts[1]) if parts[0] == "layers" else 0
        module = ".".join(parts[2:] if parts[0] == "layers" else parts)
        return tuple(stored.format(layer=layer, expert=expert) for stored in self.architecture.names[module])

    def _stored(self, module: str, device: torch.device) -> StoredLinear:
        quantization, files = self.directory.quantization, self.directory.files

        def read(field: str) -> torch.Tensor | None:
            # What else is asked for is in some formats, or with some layers, only.
            is_needed = field not in ("bias", "pre_quant_scale") or f"{module}.{field}" in files
            return self.directory.tensor(f"{module}.{field}").to(device) if is_needed else None

        way = None if quantization is None else quantization.way_of(module)
        return stored_linear(None if way is None else way.algorithm, read)

    @cached_property
    def _has_fused_heads(self) -> bool:
        """Whether rows come by head: query, key and value of the first, of the second, and so on."""
        return self.directory.config.get("multi_query", True) is False

    def _sort_heads(self, rows: torch.Tensor) -> torch.Tensor:
        by_head = rows.unflatten(0, (self.config.num_attention_heads, 3, self.config.head_size))
        return by_head.transpose(0, 1).flatten(0, 2)


def open_hugging_face(path: Path) -> HuggingFaceWeights:
    """Opens a Hugging Face directory; nothing but config.json is read, and no code from it is run.

    Raises:
        PtqError: If the architecture is not one of :data:`ARCHITECTURES`, or its quantization is not known.
    """
    directory = HuggingFaceDirectory(path)
    architecture = directory.architecture
    directory.quantization  # noqa: B018 - says what is wrong with it before anything is computed
    return HuggingFaceWeights(directory, architecture, directory.model_config)
