# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""AWQ for ModelOpt configurations of the user's own: our search on a model with ModelOpt's quantizers.

Layers are visited one after the other, each fed with the unquantized outputs of the one before, and only one layer's
Gram matrices exist at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from modelopt.torch.quantization.model_calib import enable_stats_collection, max_calibrate
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer
from modelopt.torch.quantization.utils.core_utils import is_quantized_linear, is_quantized_row_parallel_linear

from nemo_ptq.calibration.awq import search_scale
from nemo_ptq.calibration.statistics import Moments
from nemo_ptq.errors import PtqError
from nemo_ptq.modelopt.smoothing import smooth
from nemo_ptq.parallel.attributes import replaced
from nemo_ptq.parallel.ranks import ALONE, Parallelism, this_rank


class _AwqLinear:
    """One quantized linear layer while AWQ is at work on it."""

    def __init__(self, name: str, module: Any, parallelism: Parallelism) -> None:
        self.module = module
        self.shares_inputs = is_quantized_row_parallel_linear(module)
        self.ranks, self.data = parallelism.sharing(name), parallelism.holding(name)
        self.input_ranks = self.ranks if self.shares_inputs else ALONE
        quantizer = module.weight_quantizer
        self.block_size = (quantizer[0] if isinstance(quantizer, SequentialQuantizer) else quantizer).block_sizes[-1]
        self.quantizes_input = module.input_quantizer.is_enabled
        module.input_quantizer.disable()
        features = module.weight.shape[1]
        self.moments = Moments(features, features * self.input_ranks.size, module.weight.device)

    def observe(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Forward pre-hook."""
        local = inputs[0].reshape(-1, inputs[0].shape[-1])
        self.moments.observe(local, self.input_ranks.gather(local))

    def finish(self, alpha_step: float) -> None:
        """Searches the scale and folds it into the weight and the input quantizer, as ModelOpt keeps them."""
        module = self.module
        self.moments.merge(self.ranks, self.data, self.shares_inputs)
        module.weight_quantizer.enable()
        scale = search_scale(module.weight, self.moments, self.block_size, alpha_step, self.ranks, self.shares_inputs)
        if self.quantizes_input:
            quantizer = module.input_quantizer
            quantizer._amax_for_smoothing = self.moments.amax.cpu()
            quantizer.axis = None
            quantizer.amax = self.moments.amax.amax().to(module.weight.dtype)
            quantizer.enable()
        smooth(module, 1 / scale)
        del self.moments


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
                stack.enter_context(replaced(layer, "forward", skip))
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
    parallelism = this_rank()
    for layer in layers:
        linears = [
            _AwqLinear(name, linear, parallelism) for name, linear in layer.named_modules() if linear in quantized
        ]
        _calibrate_layer(layer, linears, calls, alpha_step)


def _calibrate_layer(layer: Any, linears: list[_AwqLinear], calls: list[dict[str, Any]], alpha_step: float) -> None:
    """Calibrates one transformer layer, and replaces the hidden states in ``calls`` by the layer's outputs."""
    core_attention = layer.self_attention.core_attention
    enable_stats_collection(core_attention)
    with ExitStack() as stack:
        for awq in linears:
            stack.callback(awq.module.register_forward_pre_hook(awq.observe).remove)
        for call in calls:
            call["hidden_states"] = layer(**call)[0]
    max_calibrate(core_attention, lambda _: None)
    for awq in linears:
        awq.finish(alpha_step)
