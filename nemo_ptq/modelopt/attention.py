# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's half of the core attention on plain torch: quantizers of the KV cache. Importing this registers it."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry, TensorQuantizer
from modelopt.torch.utils.distributed import ParallelState

from nemo_ptq.checkpoint.layer_spec import TorchCoreAttention


@QuantModuleRegistry.register({TorchCoreAttention: "TorchCoreAttention"})
class QuantTorchCoreAttention(QuantModule):
    """:class:`TorchCoreAttention` with ModelOpt's KV-cache quantizers, applied after the rotary embedding."""

    def _setup(self) -> None:
        for name in ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer"):
            setattr(self, name, TensorQuantizer())
        self.parallel_state = ParallelState(
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_tensor_model_parallel_group(),
        )

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """As the module it wraps, on quantized queries, keys and values."""
        return super().forward(
            self.q_bmm_quantizer(query), self.k_bmm_quantizer(key), self.v_bmm_quantizer(value), *args, **kwargs
        )

    # A checkpoint holds these quantizers under the names, and in the form, that Transformer Engine's attention gives
    # them. torch asks the class whether there is an extra state; ModelOpt then answers for the object.

    def get_extra_state(self) -> None:
        """Makes torch ask for ModelOpt's state of the quantizers."""

    def set_extra_state(self, state: Any) -> None:
        """Makes torch hand over ModelOpt's state of the quantizers."""

    def modelopt_post_restore(self, prefix: str = "") -> None:
        """Moves the restored amaxes to the model's device; they are the same on every rank."""
        self.to(device=self.device)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The amaxes and ModelOpt's state, for a checkpoint."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {}, sharded_offsets
        )
