# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""AWQ's scale search from second moments: one pass over the data, then no data at all.

AWQ (Lin et al., https://arxiv.org/abs/2306.00978) scales input channel j by s_j = x_j^a / w_j^(1-a) before rounding the
weight to INT4 and looks for the exponent ``a`` that changes the layer's output least. ModelOpt's awq_lite multiplies
every calibration batch with eleven candidate weights. The same loss needs only the Gram matrix of the inputs:

    || X D^T ||^2 = tr(D G D^T),   D = W - Q(W s) / s,   G = X^T X

so G is accumulated once and the search costs the same for any number of tokens. Layers are visited one after the
other, each fed with the unquantized outputs of the one before, and only one layer's Gram matrices exist at a time.

Under tensor parallelism all ranks take one decision from summed statistics, so the result does not depend on how the
layer is sharded (awq_lite lets every rank choose for itself).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from modelopt.torch.quantization.model_calib import enable_stats_collection, max_calibrate
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer
from modelopt.torch.quantization.utils.core_utils import is_quantized_linear, is_quantized_row_parallel_linear

from nemo_ptq.errors import PtqError
from nemo_ptq.quantization.smoothing import smooth

_SCALE_RANGE = (1e-4, 1e4)
_TINY = torch.finfo(torch.float32).tiny
# Column stripes of the halved Gram matrix that are multiplied one by one; more save more of the zeros, up to a half.
_STRIPES = 8


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiplies two matrices of any one floating-point type, and sums in float32.

    A GPU takes bfloat16 at its full rate, a tenfold of float32's, and loses nothing by it: the operands are exact. Of
    the processors only the GPU has this product.
    """
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _halved(gram: torch.Tensor, first_row: int) -> torch.Tensor:
    """Folds the upper triangle of a symmetric matrix into the lower: D G and D half(G) have the same product with D.

    Args:
        gram: (rows, n), consecutive rows of an (n, n) matrix; changed in place, since it is the largest thing around.
        first_row: Which of its rows they begin with.
    """
    gram.tril_(first_row).mul_(2)
    gram.diagonal(first_row).mul_(0.5)
    return gram


def _terms(matrix: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Splits a float32 matrix for :func:`_product`: two bfloat16 terms hold 16 of its 24 bits.

    On the CPU, which multiplies in float32 anyway, the matrix stays what it is.
    """
    if not matrix.is_cuda:
        return (matrix,)
    high = matrix.to(dtype)
    return high, (matrix - high.float()).to(dtype)


@dataclass
class InputStatistics:
    """Sums over all calibration tokens of one linear layer's input.

    Attributes:
        gram: float32 (local in-features, in-features): this rank's rows of X^T X.
        abs_sum: float32 (local in-features): sum of |x|.
        amax: float32 (local in-features): largest |x|.
        tokens: How many tokens entered.
    """

    gram: torch.Tensor
    abs_sum: torch.Tensor
    amax: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def zeros(cls, local_features: int, features: int, device: torch.device) -> "InputStatistics":
        """Returns statistics of no token."""
        return cls(
            torch.zeros(local_features, features, device=device),
            torch.zeros(local_features, device=device),
            torch.zeros(local_features, device=device),
            torch.zeros((), device=device),
        )

    def add(self, local: torch.Tensor, full: torch.Tensor) -> None:
        """Adds tokens.

        Args:
            local: (tokens, local in-features): the channels that this rank's weight multiplies.
            full: (tokens, in-features): all channels; ``local`` itself where the input is not sharded.
        """
        if not local.shape[0]:  # an idle expert
            return
        magnitude = local.abs()
        self.gram += _product(local.T, full)
        self.abs_sum += magnitude.sum(0, dtype=torch.float32)
        self.amax = torch.maximum(self.amax, magnitude.amax(0).float())
        self.tokens += local.shape[0]

    def merge(self, group: dist.ProcessGroup) -> None:
        """Adds up the statistics of the data-parallel ranks in ``group``."""
        for total in (self.gram, self.abs_sum, self.tokens):
            dist.all_reduce(total, group=group)
        dist.all_reduce(self.amax, dist.ReduceOp.MAX, group=group)


def relative_magnitude(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """Sums, over the rows, each weight's magnitude relative to the largest in its block.

    Args:
        weight: (out-features, in-features), in-features a multiple of ``block_size``.
        block_size: Weights that share one INT4 scale.

    Returns:
        float32 (in-features).
    """
    blocks = weight.float().abs().unflatten(1, (-1, block_size))
    return (blocks / (blocks.amax(-1, keepdim=True) + _TINY)).flatten(1).sum(0)


def smoothing_scale(
    activation: torch.Tensor, weight: torch.Tensor, exponent: float, extremes: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Returns the factors by which the weight's input channels are multiplied before rounding.

    Args:
        activation: float32 (local in-features): mean magnitude of each input channel.
        weight: float32 (local in-features): mean relative magnitude of each weight column.
        exponent: Between 0, which looks at the weight alone, and 1, which looks at the activation alone.
        extremes: Gives (largest, smallest) over the channels of all ranks that share the layer.

    Returns:
        float32 (local in-features), with the geometric middle of the extremes at 1.
    """
    scale = (activation.pow(exponent) / (weight.pow(1 - exponent) + _TINY)).clamp(*_SCALE_RANGE)
    return scale / extremes(scale).prod().sqrt()


class _AwqLinear:
    """One quantized linear layer while AWQ is at work on it."""

    def __init__(self, linear: Any) -> None:
        self.linear = linear
        self.shares_inputs = is_quantized_row_parallel_linear(linear)
        tensor_parallel = linear.parallel_state.tensor_parallel_group
        self.group = tensor_parallel.group if tensor_parallel.is_initialized() else None
        self.ranks = tensor_parallel.world_size() if self.group is not None else 1
        quantizer = linear.weight_quantizer
        self.rounding: TensorQuantizer = quantizer[0] if isinstance(quantizer, SequentialQuantizer) else quantizer
        self.block_size = self.rounding.block_sizes[-1]
        self.quantizes_input = linear.input_quantizer.is_enabled
        linear.input_quantizer.disable()
        local_features = linear.weight.shape[1]
        is_sharded = self.group is not None and self.shares_inputs
        shard, shards = (tensor_parallel.rank(), self.ranks) if is_sharded else (0, 1)
        features, self.first_input = local_features * shards, local_features * shard
        self.statistics = InputStatistics.zeros(local_features, features, linear.weight.device)

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sums over the ranks that share this layer."""
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value

    def _gather_inputs(self, value: torch.Tensor) -> torch.Tensor:
        """Joins the last dimension over the ranks that share this layer's inputs."""
        if self.group is None or not self.shares_inputs:
            return value
        shards = [torch.empty_like(value) for _ in range(self.ranks)]
        dist.all_gather(shards, value.contiguous(), group=self.group)
        return torch.cat(shards, dim=-1)

    def observe(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Forward pre-hook."""
        local = inputs[0].reshape(-1, inputs[0].shape[-1])
        self.statistics.add(local, self._gather_inputs(local))

    def _extremes(self, scale: torch.Tensor) -> torch.Tensor:
        found = torch.stack([scale.max(), -scale.min()])
        if self.group is not None and self.shares_inputs:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return found.abs()

    def _loss(self, scale: torch.Tensor, gram: tuple[torch.Tensor, ...]) -> float:
        """Squared change of the layer's output over all calibration tokens, were the weight rounded under ``scale``.

        Args:
            scale: float32 (local in-features).
            gram: The terms of the halved Gram matrix, each (local in-features, in-features).
        """
        weight = self.linear.weight
        scaled = torch.mul(weight, scale, out=torch.empty_like(weight))
        # Computed in float32, then rounded, the same on both sides of the product: the loss moves by less than 1e-4.
        error = torch.addcmul(weight, self.rounding(scaled), (1 / scale).to(weight.dtype), value=-1)
        whole = self._gather_inputs(error)
        loss = torch.zeros((), dtype=torch.float64, device=weight.device)
        width = -(-whole.shape[1] // _STRIPES)
        for start in range(0, whole.shape[1], width):
            stripe = slice(start, start + width)
            # Above the diagonal the halved matrix is zero.
            top = max(start - self.first_input, 0)
            if top >= error.shape[1]:
                break
            for term in gram:
                loss += (_product(error[:, top:], term[top:, stripe]) * whole[:, stripe]).sum(dtype=torch.float64)
        return float(self._sum(loss))

    def search(self, alpha_step: float) -> torch.Tensor:
        """Returns the smoothing scale, float32 (local in-features), whose rounding changes the output least."""
        weight, statistics = self.linear.weight, self.statistics
        activation = statistics.abs_sum / statistics.tokens
        rows = weight.shape[0] * (1 if self.shares_inputs else self.ranks)
        magnitude = relative_magnitude(weight, self.block_size)
        if not self.shares_inputs:
            magnitude = self._sum(magnitude)
        exponents = torch.arange(0, 1 + alpha_step, alpha_step).tolist()
        gram = _terms(_halved(statistics.gram, self.first_input), weight.dtype)
        scales = (smoothing_scale(activation, magnitude / rows, exponent, self._extremes) for exponent in exponents)
        return min(((self._loss(scale, gram), scale) for scale in scales), key=lambda pair: pair[0])[1]

    def finish(self, alpha_step: float) -> None:
        """Searches the scale and folds it into the weight and the input quantizer, as ModelOpt keeps them."""
        linear = self.linear
        data_parallel = linear.parallel_state.data_parallel_group
        if data_parallel.is_initialized():
            self.statistics.merge(data_parallel.group)
        linear.weight_quantizer.enable()
        scale = self.search(alpha_step) if self.statistics.tokens > 0 else torch.ones_like(self.statistics.abs_sum)
        if self.quantizes_input:
            quantizer = linear.input_quantizer
            quantizer._amax_for_smoothing = self.statistics.amax.cpu()
            quantizer.axis = None
            quantizer.amax = self.statistics.amax.amax().to(linear.weight.dtype)
            quantizer.enable()
        smooth(linear, 1 / scale)
        del self.statistics


@contextmanager
def unquantized(module: torch.nn.Module) -> Iterator[None]:
    """Turns every quantizer of a module off for a while; pre-quantization scales still apply."""
    enabled = [child for child in module.modules() if isinstance(child, TensorQuantizer) and child.is_enabled]
    for quantizer in enabled:
        quantizer.disable()
    yield
    for quantizer in enabled:
        quantizer.enable()


@contextmanager
def _capture_inputs(layers: torch.nn.ModuleList, pass_through: bool) -> Iterator[list[dict[str, Any]]]:
    """Records what the first layer is called with, while a forward loop runs.

    Args:
        layers: This stage's transformer layers.
        pass_through: Leave the layers out, for a stage whose outputs nobody needs.
    """
    calls: list[dict[str, Any]] = []

    def record(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert not args, "Megatron's TransformerBlock passes keyword arguments only"
        calls.append(kwargs)

    def skip(hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return hidden_states, None

    with ExitStack() as stack:
        hook = layers[0].register_forward_pre_hook(record, with_kwargs=True)
        stack.callback(hook.remove)
        if pass_through:
            for layer in layers:
                stack.enter_context(patch.object(layer, "forward", skip))
        yield calls


@torch.no_grad()
def calibrate_awq(module: GPTModel, forward_loop: Callable[[GPTModel], None], alpha_step: float = 0.1) -> None:
    """Calibrates a model into which ModelOpt has inserted INT4 weight quantizers.

    Args:
        module: This rank's part of the model; its quantizers are set and its weights smoothed in place.
        forward_loop: Runs the calibration data through the module it is given, once.
        alpha_step: Distance between the exponents tried, from 0 to 1.
    """
    layers = module.decoder.layers
    quantized = {
        linear for linear in module.modules() if is_quantized_linear(linear) and linear.weight_quantizer.is_enabled
    }
    outside = quantized.difference(layers.modules())
    if outside:
        raise PtqError(
            "AWQ quantizes the linear layers of the transformer blocks only, and the configuration enables the weight "
            f"quantizers of {len(outside)} more: disable those of output_layer and the embeddings"
        )
    # What one stage hands to the next is as unquantized as what one layer hands to the next.
    with unquantized(module), _capture_inputs(layers, parallel_state.is_pipeline_last_stage()) as calls:
        forward_loop(module)
    for linear in quantized:
        linear.weight_quantizer.disable()
    for layer in layers:
        linears = [_AwqLinear(linear) for linear in layer.modules() if linear in quantized]
        _calibrate_layer(layer, linears, calls, alpha_step)


def _calibrate_layer(layer: Any, linears: list[_AwqLinear], calls: list[dict[str, Any]], alpha_step: float) -> None:
    """Calibrates one transformer layer, and replaces the hidden states in ``calls`` by the layer's outputs."""
    core_attention = layer.self_attention.core_attention
    enable_stats_collection(core_attention)
    with ExitStack() as stack:
        for awq in linears:
            stack.callback(awq.linear.register_forward_pre_hook(awq.observe).remove)
        for call in calls:
            call["hidden_states"] = layer(**call)[0]
    max_calibrate(core_attention, lambda _: None)
    for awq in linears:
        awq.finish(alpha_step)
