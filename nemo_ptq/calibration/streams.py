# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Hidden states on their way through the blocks of a Megatron model, batch by batch and stage by stage."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from nemo_ptq.checkpoint.blocks import Block
from nemo_ptq.parallel.ranks import Parallelism


@dataclass
class Stream:
    """Batches that walk through the model together.

    Attributes:
        tokens: int64 (batch, sequence) each, without padding.
        hidden: (sequence, batch, hidden size) each, where the stream stands; empty before the embedding.
    """

    tokens: Sequence[torch.Tensor]
    hidden: list[torch.Tensor] = field(default_factory=list)


class BlockRunner:
    """Computes one block of a model at a time.

    Args:
        module: Megatron's GPTModel, or this rank's stage of it.
        device: Where it computes.
        parallelism: This rank's place.
        states_device: Where hidden states wait between blocks.
    """

    def __init__(
        self, module: Any, device: torch.device, parallelism: Parallelism, states_device: torch.device
    ) -> None:
        self.module, self.device, self.states_device = module, device, states_device
        self._parallelism = parallelism
        self._rotary: dict[int, Any] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the hidden states."""
        return self.module.config.params_dtype

    def receive(self, stream: Stream) -> None:
        """Takes over a stream's hidden states from the pipeline stage before this one."""
        config = self.module.config
        for tokens in stream.tokens:
            shape = (tokens.shape[1], tokens.shape[0], config.hidden_size)
            states = torch.empty(shape, dtype=config.params_dtype, device=self.device)
            dist.recv(states, self._parallelism.previous)
            stream.hidden.append(self.parked(states))

    def send(self, stream: Stream) -> None:
        """Hands a stream's hidden states to the pipeline stage after this one, and forgets them."""
        for states in stream.hidden:
            dist.send(states.to(self.device).contiguous(), self._parallelism.following)
        stream.hidden = []

    @torch.no_grad()
    def advance(self, block: Block, stream: Stream) -> None:
        """Moves a stream through the embedding or a layer."""
        if block.index == 0:
            stream.hidden = [self.parked(self.embed(tokens)) for tokens in stream.tokens]
            return
        for place in range(len(stream.hidden)):
            self.advance_batch(block, stream, place)

    def advance_batch(self, block: Block, stream: Stream, place: int) -> None:
        """Moves one batch of a stream through a layer."""
        stream.hidden[place] = self.parked(self.layer(block, stream.hidden[place]))

    def parked(self, states: torch.Tensor) -> torch.Tensor:
        """Puts hidden states where they wait; in main memory into page-locked pages, from which copies are fast."""
        if not states.is_cuda or self.states_device.type == "cuda":
            return states.to(self.states_device)
        return torch.empty(states.shape, dtype=states.dtype, pin_memory=True).copy_(states)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeds int64 (batch, sequence), as (sequence, batch, hidden size)."""
        tokens = tokens.to(self.device)
        return _unwrapped(self.module._preprocess(tokens, _positions(tokens))[0])

    def layer(self, block: Block, states: torch.Tensor) -> torch.Tensor:
        """Computes a transformer layer: (sequence, batch, hidden size) in and out."""
        states = states.to(self.device)
        layer = self.module.decoder.layers[block.place]
        found = layer(hidden_states=states, attention_mask=None, rotary_pos_emb=self._rotary_of(states))
        return found[0] if isinstance(found, tuple) else found  # layers with a state space return one value

    @torch.no_grad()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Returns this tensor-parallel rank's logits (batch, sequence, padded vocabulary / TP) of a last stage."""
        module = self.module
        states = module.decoder.final_layernorm(states.to(self.device))
        tied = module.share_embeddings_and_output_weights
        weight = module.shared_embedding_or_output_weight() if tied else None
        return module.output_layer(states, weight=weight)[0].transpose(0, 1).contiguous()

    def _rotary_of(self, states: torch.Tensor) -> Any:
        """The rotary embedding of a sequence: the same for all layers and batches of one length."""
        length = states.shape[0]
        if length not in self._rotary:
            tokens = torch.zeros(states.shape[1], length, dtype=torch.int64, device=self.device)
            self._rotary[length] = self.module._preprocess(tokens, _positions(tokens), decoder_input=states)[1]
        return self._rotary[length]


def _positions(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


def _unwrapped(states: Any) -> torch.Tensor:
    """Megatron hands its embedding over in a wrapper while it infers."""
    return states.unwrap() if hasattr(states, "unwrap") else states
