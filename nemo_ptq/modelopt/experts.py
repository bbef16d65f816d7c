# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts in calibration: how many tokens each expert saw, and amaxes for those that saw none.

An idle expert has no activation amax of its own. It gets the largest amax of its siblings, which no token that could
have reached it exceeds; its weight amaxes come from its weights, as everywhere.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from modelopt.torch.quantization.nn import TensorQuantizer

from nemo_ptq.calibration.observing import TokenCounts
from nemo_ptq.calibration.pipeline import gather_counts
from nemo_ptq.parallel.ranks import this_rank


def _mixtures(module: GPTModel) -> Iterator[tuple[int, MoELayer]]:
    for layer in module.decoder.layers:
        if isinstance(layer.mlp, MoELayer):
            yield layer.layer_number - 1, layer.mlp


@contextmanager
def counting_tokens(module: GPTModel) -> Iterator[TokenCounts]:
    """Counts, within a ``with`` block, the tokens that reach each of this rank's experts.

    Args:
        module: This rank's part of the model; dense models give an empty count.
    """
    counts: TokenCounts = Counter()

    def count(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], key: tuple[int, int]) -> None:
        counts[key] += inputs[0].shape[0]

    with ExitStack() as stack:
        for layer, mixture in _mixtures(module):
            for expert, index in zip(mixture.experts.local_experts, mixture.local_expert_indices, strict=True):
                counts[layer, index] = 0
                hook = expert.linear_fc1.register_forward_pre_hook(partial(count, key=(layer, index)))
                stack.callback(hook.remove)
        yield counts


def cover_idle_experts(module: GPTModel) -> None:
    """Gives each expert without an activation amax the largest of its siblings', over all expert-parallel ranks.

    Runs while ModelOpt collects statistics, after the last batch: ranks with and without amaxes would otherwise not
    meet in the synchronisation that follows.
    """
    group = parallel_state.get_expert_model_parallel_group()
    nothing = torch.zeros((), dtype=module.config.params_dtype, device=next(module.parameters()).device)
    for _, mixture in _mixtures(module):
        for linear in ("linear_fc1", "linear_fc2"):
            quantizers = [getattr(expert, linear).input_quantizer for expert in mixture.experts.local_experts]
            _share_range([quantizer for quantizer in quantizers if quantizer.is_enabled], nothing, group)


def _share_range(quantizers: list[TensorQuantizer], nothing: torch.Tensor, group: dist.ProcessGroup) -> None:
    """``nothing`` is a zero in the activations' dtype: ModelOpt's synchronisation wants one dtype on all ranks."""
    amaxes = [quantizer._calibrator.compute_amax() for quantizer in quantizers]
    largest = torch.stack([nothing, *(value.detach().reshape(()) for value in amaxes if value is not None)]).max()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    for quantizer, value in zip(quantizers, amaxes, strict=True):
        if value is None:
            quantizer._calibrator.collect(largest)


def with_idle_experts_covered(
    forward_loop: Callable[[GPTModel], None], report: Callable[[TokenCounts], None]
) -> Callable[[GPTModel], None]:
    """Wraps a forward loop so that every expert leaves it with an activation amax.

    Args:
        forward_loop: Runs the calibration data through the model.
        report: Called on every rank with how many tokens each expert of the whole model saw.
    """

    def loop(module: GPTModel) -> None:
        with counting_tokens(module) as counts:
            forward_loop(module)
        cover_idle_experts(module)
        report(gather_counts(counts, this_rank()))

    return loop
