# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The quality benchmark on a tiny Llama: its walk is the model's own forward pass, and its losses are paired."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality import METHODS, loss_of, quantize_models, read_tokens, reference_states


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def tokens(samples: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(96, (samples, length), generator=torch.Generator().manual_seed(seed))


def quantized(model: Any, *names: str) -> dict[str, Any]:
    batches = list(tokens(48, 32, 1).split(4))
    with torch.inference_mode():
        return quantize_models(model, batches, {name: METHODS[name] for name in names}, lambda _: None)


def test_a_method_that_changes_nothing_gives_the_model_back(model: Any) -> None:
    given = {}

    def keep(weight: torch.Tensor, inputs: Any) -> tuple[torch.Tensor, Any]:
        given[weight.shape] = [torch.equal(a, b) for a, b in zip(inputs.exact, inputs.given, strict=True)]
        return weight, lambda values: values

    batches = list(tokens(8, 32, 1).split(4))
    with torch.inference_mode():
        same = quantize_models(model, batches, {"keep": keep}, lambda _: None)["keep"]
        assert torch.equal(same(batches[0]).logits, model(batches[0]).logits)
    # Queries, keys and values; the attention's output; gate and up; down.
    assert given == {shape: [True, True] for shape in ((128, 64), (64, 64), (256, 64), (64, 128))}


def test_every_method_stays_near_the_model_and_leaves_it_alone(model: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    windows = list(tokens(4, 64, 2))
    with torch.inference_mode():
        states = reference_states(model, windows)
        for name, copy in quantized(model, *METHODS).items():
            loss, _ = loss_of(copy, states, windows)
            assert abs(loss.increase) < 0.1 and 0 < loss.divergence < 0.01, name
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_rounding_toward_the_model_diverges_less_than_rounding_to_nearest(model: Any) -> None:
    windows = list(tokens(8, 64, 2))
    with torch.inference_mode():
        states = reference_states(model, windows)
        for name in ("int4", "nvfp4"):
            copies = quantized(model, f"{name} max", f"{name} target")
            plain, target = (loss_of(copies[f"{name} {how}"], states, windows)[0] for how in ("max", "target"))
            assert target.divergence < plain.divergence


def test_the_model_itself_loses_nothing(model: Any) -> None:
    windows = list(tokens(3, 64, 2))
    with torch.inference_mode():
        loss, reference = loss_of(model, reference_states(model, windows), windows)
    assert loss.top_1 == 1.0
    assert abs(loss.increase) < 1e-6 and abs(loss.divergence) < 1e-6
    assert reference == pytest.approx(4.56, abs=0.1)  # ln 96: it knows nothing


class Letters:
    """A tokenizer of letters; 0 begins a text."""

    bos_token_id = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [0, *map(ord, text)]}


def test_windows_are_of_texts_that_do_not_calibrate() -> None:
    texts = ["a" * 30, "short", "b" * 30, *(letter * 20 for letter in "cdefgh")]
    batches, windows = read_tokens(Letters(), texts, 2, 16, 3, 12)
    assert torch.cat(batches).tolist() == [[0, *[ord("a")] * 15], [0, *[ord("b")] * 15]]
    assert [len(window) for window in windows] == [12, 12, 12]
    assert all(window[0] == 0 for window in windows)
    assert not {ord("a"), ord("b")} & set(torch.cat(windows).tolist())


def test_too_little_text_is_refused() -> None:
    with pytest.raises(SystemExit, match="1 documents of 16 tokens"):
        read_tokens(Letters(), ["a" * 30], 2, 16, 3, 12)
