# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Perplexity and samples of a Megatron model, at any parallelism."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.families import TOKENS, make_tokenizer
from tests.ranks import run_ranks

BATCHES = [
    torch.randint(0, TOKENS, size, generator=torch.Generator().manual_seed(7)) for size in ((3, 20), (2, 11), (1, 1))
]


def transformers_perplexity(directory: Path) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)
    total = count = 0.0
    with torch.no_grad():
        for tokens in BATCHES:
            losses = model(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
            total, count = total - float(losses.double().sum()), count + losses.numel()
    return math.exp(total / count)


def megatron_perplexity(checkpoint: Path, tp: int, pp: int) -> float:
    from nemo_ptq.engine.evaluation import perplexity
    from tests import steps

    with steps.loaded(checkpoint, tp, pp) as model:
        steps.in_float32(model)
        return perplexity(model, BATCHES)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_perplexity_is_that_of_transformers_on_every_rank(
    tp: int, pp: int, checkpoint_of: Callable[[str], Path]
) -> None:
    checkpoint = checkpoint_of("llama31")
    expected = transformers_perplexity(checkpoint.with_name("llama31.hf"))
    assert run_ranks(megatron_perplexity, tp * pp, checkpoint, tp, pp) == pytest.approx([expected] * tp * pp, rel=1e-4)


def continue_prompt(checkpoint: Path, tp: int, pp: int) -> list[int]:
    from nemo_ptq.engine.evaluation import generate
    from tests import steps

    with steps.loaded(checkpoint, tp, pp) as model:
        steps.in_float32(model)
        return generate(model, [5, 6, 7], count=6)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_prompts_are_continued_greedily(tp: int, pp: int, checkpoint_of: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = checkpoint_of("llama2")
    model = AutoModelForCausalLM.from_pretrained(checkpoint.with_name("llama2.hf"), torch_dtype=torch.float32)
    expected = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert run_ranks(continue_prompt, tp * pp, checkpoint, tp, pp) == [expected[0].tolist()] * tp * pp


class Sentencepiece:
    """Looks tokens up, as NeMo's tokenizer of sentencepiece's does."""

    pieces = ("a", "b")

    def ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [{2: "<mask>"}[token] if token >= len(self.pieces) else self.pieces[token] for token in ids]

    def ids_to_text(self, ids: list[int]) -> str:
        return "".join(self.ids_to_tokens(ids))


def test_a_sample_goes_without_tokens_that_have_no_text(tmp_path: Path) -> None:
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    from nemo_ptq.checkpoint.tokenizers import Tokenizer
    from nemo_ptq.engine.evaluation import text_of

    make_tokenizer(tmp_path)
    nemos = AutoTokenizer(str(tmp_path))
    tokens = nemos.text_to_ids("def add(a, b)")
    padding = nemos.vocab_size + 5
    for tokenizer in (nemos, Tokenizer(nemos.tokenizer)):
        with pytest.raises(TypeError):
            tokenizer.ids_to_text([*tokens, padding])
        assert text_of(tokenizer, [*tokens[:2], padding, *tokens[2:], padding]) == "def add(a, b)"
    assert text_of(Sentencepiece(), [1, 7, 0, 2]) == "ba<mask>"
