# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The tokenizer, the optimizer, and the model that they give."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from demo.muon import Muon, orthogonalize
from demo.tokenizer import train_tokenizer
from tests.conftest import Demo


def test_tokenizer_restores_any_text() -> None:
    tokenizer = train_tokenizer(["def f(x):\n    return x\n"] * 10)
    text = "def ∂(x):\n\treturn  x\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_chat_template_names_the_roles() -> None:
    tokenizer = train_tokenizer(["text"])
    messages = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s>user: Hello\nassistant:"


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_orthogonalize_makes_singular_values_alike(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    spread = s / s.norm() > 0.05  # five iterations do not lift the smallest ones
    singular_values = torch.linalg.svdvals(orthogonalize(matrix))
    assert singular_values.max() < 1.3
    assert singular_values[spread].min() > 0.6
    alignment = torch.diagonal(u.T @ orthogonalize(matrix) @ v.T)
    assert alignment[spread].min() > 0.6


def test_muon_solves_a_linear_problem() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(8, 16, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(8, 16))
    optimizer = Muon([weight], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    assert (weight - target).norm() < 0.1 * target.norm()


def test_model_has_learned(demo: Demo) -> None:
    """A model that knows nothing but how often each token occurs has a perplexity of several hundred."""
    from transformers import LlamaForCausalLM

    from demo.train import perplexity

    tokenizer = AutoTokenizer.from_pretrained(demo.hf)
    model = LlamaForCausalLM.from_pretrained(demo.hf, dtype="auto")
    assert next(model.parameters()).dtype == torch.bfloat16
    assert 3e6 < model.num_parameters() < 10e6
    heldout = [json.loads(line)["text"] for line in demo.heldout.read_text().splitlines()]
    assert perplexity(model, tokenizer, heldout) < 80
