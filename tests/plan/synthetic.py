# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with random weights, large enough that the weights dominate a job's memory."""

from math import prod
from pathlib import Path

from tests.families import make_tokenizer

SIZES = {
    # name: layers, hidden size, ffn_hidden_size
    "38M": (2, 768, 2048),
    "147M": (8, 1024, 3584),
    "433M": (12, 1536, 5376),
    "4 layers": (4, 768, 2048),
    "64 layers": (64, 768, 2048),
}
_HEADS, _GROUPS, _VOCAB = 16, 8, 16384


def make_llama(name: str, directory: Path) -> Path:
    """Makes a NeMo checkpoint of Llama's shape; random numbers repeat, since nobody looks at them.

    Args:
        name: Key of :data:`SIZES`.
        directory: Where to.
    """
    import fiddle as fdl
    import torch
    from nemo.collections import llm
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    from nemo_ptq.checkpoint.parts import TensorPart
    from nemo_ptq.checkpoint.writer import write_context, write_weights

    num_layers, hidden, ffn = SIZES[name]
    head = hidden // _HEADS
    numbers = torch.randn(1 << 20, generator=torch.Generator().manual_seed(1)).mul(0.02).bfloat16()

    def part(key: str, shape: tuple[int, ...], *position: tuple[int, int]) -> TensorPart:
        def read() -> torch.Tensor:
            if len(shape) == 1:
                return torch.ones(shape, dtype=torch.bfloat16)
            size = prod(shape)
            return numbers.repeat(-(-size // len(numbers)))[:size].reshape(shape)

        return TensorPart(key, shape, torch.bfloat16, read, position)

    layer = {
        "self_attention.linear_qkv.layer_norm_weight": (hidden,),
        "self_attention.linear_qkv.weight": ((_HEADS + 2 * _GROUPS) * head, hidden),
        "self_attention.linear_proj.weight": (hidden, _HEADS * head),
        "mlp.linear_fc1.layer_norm_weight": (hidden,),
        "mlp.linear_fc1.weight": (2 * ffn, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }
    write_weights(
        directory / "weights",
        [
            part("embedding.word_embeddings.weight", (_VOCAB, hidden)),
            *(
                part(f"decoder.layers.{key}", shape, (index, num_layers))
                for index in range(num_layers)
                for key, shape in layer.items()
            ),
            part("decoder.final_layernorm.weight", (hidden,)),
            part("output_layer.weight", (_VOCAB, hidden)),
        ],
    )
    tokenizer = directory.with_name(f"{directory.name}.tokenizer") / "nemo_tokenizer"
    make_tokenizer(tokenizer)
    config = fdl.Config(
        llm.Llama3Config8B,
        num_layers=num_layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=_HEADS,
        num_query_groups=_GROUPS,
        kv_channels=head,
        seq_length=2048,
    )
    model = fdl.Config(
        llm.LlamaModel, config=config, tokenizer=fdl.Config(AutoTokenizer, pretrained_model_name=str(tokenizer))
    )
    write_context(directory / "context", model)
    return directory
