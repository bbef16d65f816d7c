# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""From texts to batches: every sample once, cut at tokens, never padded."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_ptq.calibration.datasets import DATASETS, read_samples
from nemo_ptq.calibration.text_files import Sample
from nemo_ptq.calibration.tokens import make_batches, share, tokenize
from nemo_ptq.errors import PtqError
from tests.families import make_tokenizer
from tests.ranks import run_ranks

CHAT = [{"role": "user", "content": "def add(a, b)"}, {"role": "assistant", "content": "return a + b"}]


def write(path: Path, samples: int) -> str:
    path.write_text("".join(f"sample {index}\n" for index in range(samples)))
    return str(path)


def test_the_first_samples_are_taken(tmp_path: Path) -> None:
    assert read_samples(write(tmp_path / "data.txt", 5), 3) == ["sample 0", "sample 1", "sample 2"]


def test_a_small_data_set_is_taken_whole(tmp_path: Path) -> None:
    assert len(read_samples(write(tmp_path / "data.txt", 5), 512)) == 5


def test_hub_data_sets_give_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str, split: str) -> Iterator[dict[str, str]]:
        asked.append((name, config, split))
        yield from ({"text": text, "article": text} for text in ("", "one", " \n", "two", "three"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_samples("wikitext", 2) == ["one", "two"]
    assert read_samples("cnn_dailymail", 2) == ["", "one"]
    assert asked == [("wikitext", "wikitext-103-v1", "train"), ("cnn_dailymail", "3.0.0", "train")]


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("error", [ConnectionError("offline mode"), ValueError("not in the cache"), OSError("full")])
def test_a_hub_that_is_not_there_is_explained(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(PtqError, match=rf"'{name}' could not be loaded .*{error}.*give a local \.jsonl"):
        read_samples(name, 2)


def make_sentencepiece(directory: Path) -> Path:
    from sentencepiece import SentencePieceTrainer

    text = directory / "text.txt"
    text.write_text("def add(a, b): return a + b\nthe quick brown fox jumps over the lazy dog\n" * 20)
    SentencePieceTrainer.train(
        input=str(text), model_prefix=str(directory / "tokenizer"), vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    return directory / "tokenizer.model"


def make_hugging_face(directory: Path, adds_bos: bool) -> Path:
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    make_tokenizer(directory)
    if adds_bos:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
        tokenizer.save_pretrained(directory)
    return directory


def tokenize_in_nemo(path: Path, samples: list[Sample], seq_len: int) -> tuple[list[list[int]], dict[str, Any]]:
    """Tokenizes with NeMo's tokenizer around files; also tells what that tokenizer says by itself."""
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

    tokenizer = (AutoTokenizer if path.is_dir() else SentencePieceTokenizer)(str(path))
    facts = {
        "bos": tokenizer.bos_id,
        "ids": [tokenizer.text_to_ids(sample) for sample in samples if isinstance(sample, str)],
        "chat": tokenizer.text_to_ids("user: def add(a, b)\nassistant: return a + b\n"),
    }
    return [tokenize(tokenizer, sample, seq_len) for sample in samples], facts


def test_texts_are_cut_at_tokens(tmp_path: Path) -> None:
    texts: list[Sample] = ["def add(a, b): return a + b", "fox", "the dog " * 500]
    make_hugging_face(tmp_path, adds_bos=False)
    ((found, facts),) = run_ranks(tokenize_in_nemo, 1, tmp_path, texts, 8)
    assert found == [ids[:8] for ids in facts["ids"]]
    assert [len(ids) for ids in found] == [8, len(facts["ids"][1]), 8]


def test_special_tokens_are_kept(tmp_path: Path) -> None:
    make_hugging_face(tmp_path, adds_bos=True)
    ((found, facts),) = run_ranks(tokenize_in_nemo, 1, tmp_path, ["def add(a, b)"], 4)
    assert found == [[facts["bos"], *facts["ids"][0]][:4]]


def test_sentencepiece_texts_begin_with_bos(tmp_path: Path) -> None:
    ((found, facts),) = run_ranks(tokenize_in_nemo, 1, make_sentencepiece(tmp_path), ["def add(a, b)"], 4)
    assert facts["bos"] == 1
    assert found == [[1, *facts["ids"][0]][:4]]


def test_chats_go_through_the_template(tmp_path: Path) -> None:
    make_hugging_face(tmp_path, adds_bos=False)
    ((found, facts),) = run_ranks(tokenize_in_nemo, 1, tmp_path, [CHAT], 1000)
    assert found == [facts["chat"]]
    ((cut, _),) = run_ranks(tokenize_in_nemo, 1, tmp_path, [CHAT], 5)
    assert cut == [facts["chat"][:5]]


def refused_chat(path: Path) -> str:
    try:
        tokenize_in_nemo(path, [CHAT], 8)
    except PtqError as error:
        return str(error)
    return "tokenized"


def test_chats_need_a_template(tmp_path: Path) -> None:
    (message,) = run_ranks(refused_chat, 1, make_sentencepiece(tmp_path))
    assert "the tokenizer has no chat template; give texts instead, or tokenizer_path=" in message


@given(st.lists(st.integers(), min_size=1, max_size=50), st.integers(1, 8))
def test_data_parallel_ranks_share_the_samples(samples: list[int], ranks: int) -> None:
    shares = [list(share(samples, rank, ranks)) for rank in range(ranks)]
    assert all(shares)
    if len(samples) >= ranks:
        assert Counter(sample for mine in shares for sample in mine) == Counter(samples)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


sequences = st.lists(st.lists(st.integers(0, 1000), max_size=6), max_size=40)


@given(sequences, st.integers(1, 7))
def test_batches_hold_every_token_once_and_no_other(tokens: list[list[int]], batch_size: int) -> None:
    batches = make_batches(tokens, batch_size)
    assert all(1 <= len(batch) <= batch_size and batch.shape[1] > 0 for batch in batches)
    assert Counter(tuple(row) for batch in batches for row in batch.tolist()) == Counter(
        map(tuple, filter(None, tokens))
    )
    # At most one batch of each length is not full.
    partial = [batch.shape[1] for batch in batches if len(batch) < batch_size]
    assert len(partial) == len(set(partial))


def test_the_last_batch_counts() -> None:
    batches = make_batches([[index] * 4 for index in range(10)], 4)
    assert [tuple(batch.shape) for batch in batches] == [(4, 4), (4, 4), (2, 4)]
