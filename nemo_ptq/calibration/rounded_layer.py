# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A linear layer while its block is rounded: what enters it is kept, compared and summed up; then it is served.

Megatron's modules do the computing; hooks see their inputs.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch

from nemo_ptq.calibration.methods import LinearShard
from nemo_ptq.calibration.observing import State, is_of_expert
from nemo_ptq.calibration.residual import Residual
from nemo_ptq.calibration.statistics import PairedMoments
from nemo_ptq.calibration.streams import BlockRunner
from nemo_ptq.quantization.activations import activation_scale, rounded_activation, rounded_by_scale
from nemo_ptq.quantization.schemes import Scheme

# The place of a batch from outside the calibration streams: its layers' inputs are not kept.
ELSEWHERE = -1

# What a layer does with its input: keep it as the unquantized model's, nothing, compare it as the quantized model's
# with the one kept, or compute with it as a server does.
EXACT, IDLE, COMPARE, SERVE = "exact", "idle", "compare", "serve"


class RoundedLayer:
    """A linear layer while its block is learned: its inputs are observed, and rounded afterwards.

    Args:
        module: The layer.
        linear: This rank's shard of it.
        runner: Knows where kept states wait.
        is_moved: Whether its weight is moved toward the unquantized model's output.
        residual: The residual stream that its output is added to, where it makes up for the stream's errors.
        ended: The module whose last layer it is, if any. For a batch whose input to the layer in the quantized model is
            known, that module computes nothing else.

    Attributes:
        module: As given.
        linear: As given.
        place: Which batch runs through the block.
        moments: Sums over its inputs, from when it compares until it is rounded.
        mode: What it does.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        linear: LinearShard,
        runner: BlockRunner,
        is_moved: bool,
        residual: Residual | None = None,
        ended: torch.nn.Module | None = None,
    ) -> None:
        self.module, self.linear, self._runner, self._residual, self.mode = module, linear, runner, residual, IDLE
        self._weight = module.get_parameter("weight")
        # The two models may send a token to different experts.
        self._compares = is_moved and not is_of_expert(linear.name)
        # (..., local in-features) by a batch's place: its input in the unquantized model until that is compared, then
        # in the quantized one, where that is kept.
        self._entered: dict[int, torch.Tensor] = {}
        self.place = 0
        self._held_out: Collection[int] = ()
        self._scale: torch.Tensor | None = None
        self._input_scale: torch.Tensor | None = None
        self._scheme: Scheme | None = None
        self._hook = module.register_forward_pre_hook(self._enter)
        self._ended = ended
        if ended is not None:
            self._compute_all = ended.forward
            ended.forward = self._compute

    def compare(self, held_out: Collection[int] = ()) -> None:
        """Compares inputs with those that are kept, from now on.

        Args:
            held_out: Batches whose tokens are only counted.
        """
        self._held_out = held_out
        outputs, local = self.linear.weight.shape
        whole = local * self.linear.input_ranks.size
        self.mode = COMPARE
        self.moments = PairedMoments(
            local, whole, self.linear.weight.device, self._compares, None if self._residual is None else outputs
        )

    def serve(self, state: State, scheme: Scheme) -> None:
        """Scales and rounds inputs from now on, and the moments of earlier inputs likewise.

        Args:
            state: The block's calibration state.
            scheme: How the layer is stored.
        """
        amax, scale = (
            state.get(f"{self.linear.name}.input_quantizer.{entry}") for entry in ("amax", "pre_quant_scale")
        )
        self.mode, self._scheme = SERVE, scheme
        if amax is not None:
            self._input_scale = activation_scale(amax, scheme).to(self.linear.weight.device)
        if scale is not None:
            scale = scale.to(self.linear.weight.device)
            local = self.linear.input_ranks.shard(scale)
            self._scale = local.to(self.linear.weight.dtype)
            self.moments.smooth(local, scale)
        if self._residual is not None:
            self._residual.restore()

    def smoothed(self) -> torch.Tensor:
        """Returns the layer's own weight, divided by the pre-quantization scale: float32."""
        weight = self.linear.weight.float()
        return weight if self._scale is None else weight / self._scale.float()

    def replace_weight(self, weight: torch.Tensor) -> None:
        """Computes with another weight, which is multiplied with scaled inputs."""
        self._set_weight(torch.nn.Parameter(weight.to(self._weight.dtype), requires_grad=False))

    def forget(self, places: Iterable[int]) -> None:
        """Drops the kept inputs of some batches: the layers before it have changed since."""
        for place in places:
            self._entered.pop(place, None)

    def restore(self) -> None:
        """Leaves the layer as it was."""
        self._hook.remove()
        self._entered.clear()
        if self._ended is not None:
            del self._ended.forward
        if self._residual is not None:
            self._residual.restore()
        self._set_weight(self._weight)

    def _set_weight(self, weight: torch.nn.Parameter) -> None:
        self.module.register_parameter("weight", weight)

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces the forward pass of the module whose last layer it is."""
        if self.mode != SERVE or self.place not in self._entered:
            return self._compute_all(*args, **kwargs)
        return self.module(self._entered[self.place].to(self._runner.device))

    def _enter(self, _: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        inputs = args[0]
        if self.mode == EXACT and self._compares:
            self._keep(inputs)
            if self._residual is not None:
                self._residual.keep()
        elif self.mode == COMPARE:
            exact = self._entered.pop(self.place, None)
            self._observe(inputs.reshape(-1, inputs.shape[-1]), exact)
            if self._ended is not None:
                self._keep(inputs)
        elif self.mode == SERVE:
            if self._ended is not None and self.place != ELSEWHERE and self.place not in self._entered:
                self._keep(inputs)
            return self._served(inputs), *args[1:]
        return None

    def _keep(self, inputs: torch.Tensor) -> None:
        self._entered[self.place] = self._runner.parked(inputs)

    def _observe(self, inputs: torch.Tensor, exact: torch.Tensor | None) -> None:
        if self.place in self._held_out:
            self.moments.tokens += inputs.shape[0]
            return
        residual = None
        if exact is not None:
            exact = exact.to(inputs.device).reshape(inputs.shape)
            if self._residual is not None:
                residual, counts = self._residual.compare(self.place)
                inputs, exact, residual = inputs * counts, exact * counts, residual * counts
        self.moments.observe(inputs, self.linear.input_ranks.gather(inputs), exact, residual)

    def _served(self, inputs: torch.Tensor) -> torch.Tensor:
        """The input as a server multiplies it with the weight."""
        scaled = inputs if self._scale is None else inputs * self._scale
        assert self._scheme is not None
        if self._input_scale is None:
            return rounded_activation(scaled, None, self._scheme) if self._scheme.dynamic_inputs else scaled
        return rounded_by_scale(scaled, self._input_scale, self._scheme)
