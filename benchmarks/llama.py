# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model of the Llama kind as the block pipeline sees models: Megatron's module names, in plain torch.

Calibration runs on it without NeMo, Megatron and process groups, and computes what it computes in a job.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nemo_ptq.calibration.streams import BlockRunner, Stream
from nemo_ptq.checkpoint.blocks import Block
from nemo_ptq.parallel.ranks import Parallelism


class Linear(nn.Module):
    """A linear layer that returns its output and its bias apart, as Megatron's do: there is none."""

    def __init__(self, *weights: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat(weights), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(..., in) to (..., out)."""
        return F.linear(inputs, self.weight), None


class CoreAttention(nn.Module):
    """Causal attention: queries, keys and values (batch, heads, sequence, head size)."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(batch, heads, sequence, head size) of the queries' heads."""
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


class Layer(nn.Module):
    """One transformer layer.

    Args:
        layer: transformers' LlamaDecoderLayer.
        config: transformers' LlamaConfig.
        rope: Its rotary embedding.
    """

    def __init__(self, layer: Any, config: Any, rope: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.pre_mlp_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.linear_qkv = Linear(*(getattr(attention, f"{kind}_proj").weight for kind in "qkv"))
        self.core_attention = CoreAttention()
        self.linear_proj = Linear(attention.o_proj.weight)
        self.linear_fc1 = Linear(mlp.gate_proj.weight, mlp.up_proj.weight)
        self.linear_fc2 = Linear(mlp.down_proj.weight)
        self._rope, self._head_size = [rope], attention.head_dim
        self._heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(sequence, batch, hidden size) in and out."""
        states = states + self._attention(self.input_layernorm(states))
        gate, up = self.linear_fc1(self.pre_mlp_layernorm(states))[0].chunk(2, -1)
        return states + self.linear_fc2(F.silu(gate) * up)[0]

    def _attention(self, states: torch.Tensor) -> torch.Tensor:
        length, batch, _ = states.shape
        mixed = self.linear_qkv(states)[0].unflatten(-1, (-1, self._head_size)).permute(1, 2, 0, 3)
        query, key, value = mixed.split(self._heads, 1)
        cosine, sine = self._rope[0](states, torch.arange(length, device=states.device)[None])
        query, key = (heads * cosine[None] + _turned(heads) * sine[None] for heads in (query, key))
        found = self.core_attention(query, key, value)
        return self.linear_proj(found.permute(2, 0, 1, 3).reshape(length, batch, -1))[0]


def _turned(heads: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, -1)
    return torch.cat([-second, first], -1)


class Llama(BlockRunner):
    """The model in blocks, and what computes them.

    Args:
        model: transformers' LlamaForCausalLM, on any one device.

    Attributes:
        blocks: The embedding and the layers.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model, model.device, Parallelism(), model.device)
        self._layers = [Layer(layer, model.config, model.model.rotary_emb) for layer in model.model.layers]
        self.blocks = [Block(0, -1, {})]
        for place, layer in enumerate(self._layers):
            names = {
                "linear_qkv": "self_attention.",
                "core_attention": "self_attention.",
                "linear_proj": "self_attention.",
                "linear_fc1": "mlp.",
                "linear_fc2": "mlp.",
                "input_layernorm": "",
                "pre_mlp_layernorm": "",
            }
            modules = {f"decoder.layers.{place}.{path}{name}": getattr(layer, name) for name, path in names.items()}
            self.blocks.append(Block(place + 1, place, modules))

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights and the calibration's hidden states."""
        return self.module.dtype

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """See :meth:`BlockRunner.embed`."""
        # Products of matrices that are not contiguous take a CPU many times as long.
        return self.module.model.embed_tokens(tokens.to(self.device)).transpose(0, 1).contiguous()

    def layer(self, block: Block, states: torch.Tensor) -> torch.Tensor:
        """See :meth:`BlockRunner.layer`."""
        return self._layers[block.place](states)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """(sequence, batch, hidden size) to float32 (batch, sequence, vocabulary)."""
        states = self.module.model.norm(states.float())
        return F.linear(states, self.module.lm_head.weight.float()).transpose(0, 1)


def float32_stream(llama: Llama, tokens: Sequence[torch.Tensor]) -> Stream:
    """Returns token batches behind the embedding, in float32: what is evaluated on."""
    return Stream(tokens, [llama.embed(batch).float() for batch in tokens])
