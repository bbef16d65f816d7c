# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The quality benchmark on a tiny Llama: its blocks are transformers' model, and its losses are paired."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.llama import Llama
from benchmarks.quality import QUALITIES, Benchmark, read_tokens, read_windows
from nemo_ptq.calibration.streams import Stream
from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.config import QuantizationConfig


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
        initializer_range=0.1,  # so that there is something to lose
    )
    return LlamaForCausalLM(config).eval()


def tokens(samples: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(96, (samples, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def benchmark(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    directory = tmp_path_factory.mktemp("llama")
    model.save_pretrained(directory)
    with torch.inference_mode():
        return Benchmark.of(model, read_metadata(Path(directory)), tokens(48, 32, 1).split(4), list(tokens(6, 64, 2)))


def test_the_blocks_compute_what_transformers_computes(model: Any) -> None:
    llama, batch = Llama(model), tokens(3, 32, 1)
    stream = Stream([batch])
    with torch.inference_mode():
        for block in llama.blocks:
            llama.advance(block, stream)
        torch.testing.assert_close(llama.logits(stream.hidden[0]), model(batch).logits, rtol=1e-4, atol=1e-4)


def test_the_model_itself_loses_nothing(model: Any, benchmark: Benchmark) -> None:
    with torch.inference_mode():
        loss = benchmark.loss(lambda number: model(benchmark.windows[number][None]).logits[0])
    assert loss.top_1 == 1.0
    assert abs(loss.increase) < 1e-5 and abs(loss.divergence) < 1e-5


# INT8 is so fine that what it loses on a model without outliers is a matter of chance.
_COARSE = {"fp8": [""], "int4_awq": [""], "nvfp4": ["", ", weights alone"]}


@pytest.mark.parametrize("algorithm", _COARSE)
def test_what_takes_more_passes_diverges_less(algorithm: str, model: Any, benchmark: Benchmark) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = {}
    with torch.inference_mode():
        for quality in QUALITIES:
            quantization = QuantizationConfig(algorithm, quality=quality, awq_block_size=64)
            losses[quality], seconds = benchmark.quantize(quantization)
            assert seconds > 0
    assert all(list(losses[quality]) == _COARSE[algorithm] for quality in QUALITIES)
    for kind in _COARSE[algorithm]:
        assert 0 < losses["balanced"][kind].divergence < losses["fast"][kind].divergence
        assert 0 < losses["max"][kind].divergence < losses["fast"][kind].divergence
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Letters:
    """A tokenizer of letters; 0 begins a text."""

    bos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [*([0] if add_special_tokens else []), *map(ord, text)]}


def test_samples_are_texts_that_are_long_enough() -> None:
    assert read_tokens(Letters(), ["a" * 30, "short", "b" * 30], 2, 16) == [[0, *[ord(x)] * 15] for x in "ab"]
    with pytest.raises(SystemExit, match="1 texts of 16 tokens: give more text, or ask for less than 2"):
        read_tokens(Letters(), ["a" * 30], 2, 16)


def test_windows_are_of_texts_put_together() -> None:
    windows = read_windows(Letters(), ["a" * 15, "b" * 15], 2, 12)
    assert [window.tolist() for window in windows] == [
        [0, *[ord("a")] * 11],
        [0, *[ord("a")] * 4, *[ord("b")] * 7],
    ]
    with pytest.raises(SystemExit, match="2 windows of 12 tokens"):
        read_windows(Letters(), ["a" * 15, "b" * 15], 3, 12)
