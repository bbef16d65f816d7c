# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Torch in the place of the GPU kernels that vLLM's CPU build lacks. How vLLM loads weights is not touched.

Imported by tests/serve/ask_vllm.py, whose Python has vLLM and nothing else of this project.
"""

from typing import Any

import torch
from torch.nn import functional
from vllm import _custom_ops as ops
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel
from vllm.model_executor.layers.fusion import fused_act_quant
from vllm.model_executor.layers.quantization import modelopt
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_nvfp4 as nvfp4_experts,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_fp8 as fp8_experts,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_int8 as int8_experts,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    compressed_tensors_w4a8_fp8,
    compressed_tensors_wNa16,
)
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
    dequantize_to_dtype,
    ref_nvfp4_quant_dequant,
)
from vllm.platforms.interface import PlatformEnum

FP8_MAX, INT8_MAX = 448.0, 127.0


def _scaled_fp8_quant(
    input: torch.Tensor,
    scale: torch.Tensor | None = None,
    num_token_padding: int | None = None,
    scale_ub: torch.Tensor | None = None,
    use_per_token_if_dynamic: bool = False,
    output: torch.Tensor | None = None,
    group_shape: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    values = input.float()
    if scale is None:
        magnitude = values.abs()
        amax = magnitude.amax(-1, keepdim=True) if use_per_token_if_dynamic else magnitude.max().view(1)
        scale = (amax / FP8_MAX).clamp(min=1.0 / (FP8_MAX * 512.0))
    codes = (values / scale.float()).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    if output is not None:
        output.copy_(codes)
    return codes if output is None else output, scale


def _rounded(values: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Inputs (tokens, features) as an FP8 or INT8 kernel has them; each token has its own scale where none is given."""
    largest = FP8_MAX if dtype == torch.float8_e4m3fn else INT8_MAX
    if scale is None:
        scale = values.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / largest
    codes = values.float() / scale
    if dtype == torch.float8_e4m3fn:
        return codes.clamp(-largest, largest).to(dtype).float() * scale
    return codes.round().clamp(-largest - 1, largest) * scale


class _Fp8(kernels.PerTensorTorchFP8ScaledMMLinearKernel):
    """FP8 weights and inputs, of any scales: torch's own product of FP8 is slow on a CPU."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        return True, None

    def get_output_padding(self) -> int | None:
        return None

    def apply_scaled_mm(
        self,
        *,
        A: torch.Tensor,
        B: torch.Tensor,
        out_dtype: torch.dtype,
        As: torch.Tensor,
        Bs: torch.Tensor,
        bias: torch.Tensor | None,
        output_shape: list[int],
    ) -> torch.Tensor:
        found = (A.float() @ B.float()) * As * (Bs.t() if Bs.dim() == 2 else Bs)
        return (found if bias is None else found + bias).to(out_dtype).view(*output_shape)


class _Int8(kernels.CPUInt8ScaledMMLinearKernel):
    """INT8 weights and inputs: vLLM's own kernel takes 16 bits alone."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        pass

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        weight, scales, input_scale, *_ = self._get_layer_params(layer)
        inputs = _rounded(x, torch.int8, None if input_scale is None else input_scale.max())
        return functional.linear(inputs, weight.float() * scales, bias).to(x.dtype)


class _Nvfp4(kernels.EmulationNvFp4LinearKernel):
    """NVFP4 weights and inputs: vLLM's own emulation takes inputs of two dimensions alone."""

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return super().apply_weights(layer, x.flatten(0, -2), bias).unflatten(0, x.shape[:-1])


class _Nvfp4Weights(kernels.MarlinNvFp4LinearKernel):
    """NVFP4 weights and unquantized inputs."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        pass

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        weight = dequantize_to_dtype(
            layer.weight.data, layer.weight_scale.data, layer.weight_global_scale, x.dtype, 16, swizzle=False
        )
        return functional.linear(x, weight, bias)


class _Int4(MPLinearKernel):
    """INT4 weights and unquantized inputs: vLLM's own kernel takes 16 bits alone, the other schemes' here 32."""

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        packed, scales, _ = self._get_weight_params(layer)
        codes = torch.stack([(packed.data >> shift) & 0xF for shift in range(0, 32, 4)], dim=-1).flatten(1) - 8
        blocks = codes.unflatten(1, (-1, self.config.group_size)).float() * scales.data.float()[..., None]
        self._weight = blocks.flatten(1)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return functional.linear(x.float(), self._weight, None if bias is None else bias.float()).to(x.dtype)


class _W4A8(_Int4):
    """INT4 weights and FP8 inputs. The GPU's kernel rounds the scales of the blocks to FP8 besides."""

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return super().apply_weights(layer, _rounded(x, torch.float8_e4m3fn).to(x.dtype), bias)


class _Experts:
    """What vLLM looks up of the class of experts that it would choose on a GPU."""

    @staticmethod
    def is_monolithic() -> bool:
        return False


def _expert_linear(layer: torch.nn.Module, name: str, expert: int, half: int | None, x: torch.Tensor) -> torch.Tensor:
    """One linear layer of an expert, from the parameters as vLLM's loader has filled them.

    Args:
        layer: The experts.
        name: "w13", whose halves are gate and up, or "w2".
        expert: Its index.
        half: Which half; None where it is not halved.
        x: Inputs (tokens, features).
    """

    def rows(suffix: str) -> torch.Tensor:
        tensor = getattr(layer, f"{name}_{suffix}").data[expert]
        if half is None or tensor.dim() == 0:
            return tensor
        return tensor.chunk(2)[half] if tensor.numel() > 1 else tensor

    if hasattr(layer, f"{name}_weight_packed"):  # compressed-tensors divides by its global scales
        packed, second = rows("weight_packed"), 1.0 / rows("weight_global_scale").float()
        first = getattr(layer, f"{name}_input_global_scale", None)
        divisor = None if first is None else first.data.float().min()
    elif hasattr(layer, f"{name}_weight_scale_2"):
        packed, second = rows("weight"), rows("weight_scale_2").float()
        first = getattr(layer, f"{name}_input_scale", None)
        divisor = None if first is None else 1.0 / first.data.float().max()
    else:
        weight = rows("weight")
        scale = getattr(layer, f"{name}_input_scale", None)
        inputs = _rounded(x, weight.dtype, None if scale is None else scale.data.float().max())
        return (inputs @ (weight.float() * rows("weight_scale").float()).T).to(x.dtype)
    if divisor is not None and not layer.quant_method.use_a16:
        x = ref_nvfp4_quant_dequant(x, divisor, 16)
    return functional.linear(x, dequantize_to_dtype(packed, rows("weight_scale"), second, x.dtype, 16, swizzle=False))


def _apply_experts(
    self: Any,
    layer: torch.nn.Module,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    shared_experts: Any,
    shared_experts_input: Any,
) -> torch.Tensor:
    result = torch.zeros_like(x)
    for expert in topk_ids.unique().tolist():
        tokens, slots = torch.where(topk_ids == expert)
        gate, up = (_expert_linear(layer, "w13", expert, half, x[tokens]) for half in (0, 1))
        found = _expert_linear(layer, "w2", expert, None, functional.silu(gate) * up)
        result.index_add_(0, tokens, (found * topk_weights[tokens, slots, None]).to(x.dtype))
    return result


def emulate() -> None:
    """Puts torch in the place of kernels, in float32 where vLLM is asked for that."""
    ops.scaled_fp8_quant = _scaled_fp8_quant
    fused_act_quant._FUSED_ACT_QUANT.clear()  # activation and rounding at once: another missing kernel
    kernels._POSSIBLE_FP8_KERNELS[PlatformEnum.CPU] = [_Fp8]
    kernels._POSSIBLE_INT8_KERNELS[PlatformEnum.CPU] = [_Int8]
    kernels._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CPU] = [_Nvfp4]
    kernels.MarlinNvFp4LinearKernel = _Nvfp4Weights
    CompressedTensorsConfig._is_fp8_w4a8_sm90 = staticmethod(CompressedTensorsConfig._is_fp8_w4a8)
    compressed_tensors_w4a8_fp8.choose_mp_linear_kernel = lambda config: _W4A8
    compressed_tensors_wNa16.choose_mp_linear_kernel = lambda config: _Int4
    every = classmethod(lambda cls: [torch.bfloat16, torch.half, torch.float32])
    for config in (
        modelopt.ModelOptFp8Config,
        modelopt.ModelOptNvFp4Config,
        modelopt.ModelOptMixedPrecisionConfig,
        CompressedTensorsConfig,
    ):
        config.get_supported_act_dtypes = every
    chosen = lambda *arguments, **named: (None, _Experts)  # noqa: E731
    for module in (modelopt, fp8_experts):
        module.select_fp8_moe_backend = chosen
    for module in (modelopt, nvfp4_experts):
        module.select_nvfp4_moe_backend = chosen
    int8_experts.select_int8_moe_backend = chosen
    for method in (
        modelopt.ModelOptFp8MoEMethod,
        modelopt.ModelOptNvFp4FusedMoE,
        fp8_experts.CompressedTensorsW8A8Fp8MoEMethod,
        int8_experts.CompressedTensorsW8A8Int8MoEMethod,
        nvfp4_experts.CompressedTensorsW4A4Nvfp4MoEMethod,
    ):
        method.process_weights_after_loading = lambda self, layer: None
        method.get_fused_moe_quant_config = lambda self, layer: None
        method.apply = _apply_experts
