# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""From texts to batches: every sample once, cut at tokens, never padded."""

import threading
from collections import Counter
from collections.abc import Iterator
from itertools import islice, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_ptq.calibration import hub, tokens
from nemo_ptq.calibration.chats import Chat, Sample
from nemo_ptq.calibration.datasets import ON_HUB, check_available, interleaved, read_samples, split_samples
from nemo_ptq.calibration.tokens import (
    check_in_vocabulary,
    first_tokens,
    make_batches,
    share,
    tokenize,
    tokenize_all,
)
from nemo_ptq.config import read_sources
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


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub answers."""
    monkeypatch.setattr(hub, "answers", lambda: True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)


@pytest.mark.usefixtures("reachable")
def test_hub_data_sets_give_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str, split: str) -> Iterator[dict[str, str]]:
        asked.append((name, config, split))
        yield from ({"text": text, "article": text} for text in ("", "one", " \n", "two", "three"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_samples("wikitext", 2) == ["one", "two"]
    assert read_samples("cnn_dailymail", 2) == ["", "one"]
    assert asked == [("wikitext", "wikitext-103-v1", "train"), ("cnn_dailymail", "3.0.0", "train")]


@pytest.mark.usefixtures("reachable")
def test_any_data_set_of_the_hub_gives_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((*arguments, options))
        return [{"text": "title", "body": "one"}, {"text": "title", "body": CHAT}, {"text": "title", "body": 3}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_samples("owner/name:validation,config=en,column=body", 2) == ["one", CHAT]
    assert read_samples("owner/name", 2) == ["title", "title"]
    assert asked == [
        ("owner/name", "en", {"split": "validation", "streaming": True}),
        ("owner/name", None, {"split": "train", "streaming": True}),
    ]
    with pytest.raises(
        PtqError, match="owner/name:train, row 3: body is of type int, and must be a text, or a list of messages"
    ):
        read_samples("owner/name,column=body", 3)


def test_a_machine_without_a_network_knows_it_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded = []
    monkeypatch.setattr(hub, "answers", lambda: False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **_: loaded.append(names) or [{"article": "cached"}])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "")
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", False)
    for name in ("cnn_dailymail", "owner/name"):
        with pytest.raises(PtqError) as caught:
            read_samples(name, 2)
        assert str(caught.value) == (
            f"quantization_config.calibration_dataset={name} is not available: the Hugging Face hub does not answer, "
            f"and {tmp_path} does not hold it; quantization_config.calibration_dataset=builtin needs no network, and "
            "neither does a local .jsonl, .json, .txt or .parquet file"
        )
        with pytest.raises(PtqError, match="is not available"):
            check_available(read_sources(f"builtin;{name}"))
    assert not loaded
    (tmp_path / "abisee___cnn_dailymail").mkdir()
    check_available(read_sources("cnn_dailymail;builtin"))
    assert read_samples("cnn_dailymail", 2) == ["cached"]
    assert loaded == [("abisee/cnn_dailymail", "3.0.0")]
    assert datasets.config.HF_HUB_OFFLINE  # what is in the cache is not asked for
    monkeypatch.setattr(hub, "answers", lambda: True)
    with pytest.raises(PtqError, match="is not available: HF_HUB_OFFLINE is set"):
        read_samples("owner/name", 2)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    check_available(read_sources("owner/name"))  # where the library looks first


def test_a_hub_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, done = threading.Event(), threading.Event()
    monkeypatch.setattr(hub, "_ask", lambda: asked.set() or done.wait())
    monkeypatch.setattr(hub, "_PATIENCE", 0.1)
    try:
        assert hub.answers.__wrapped__() is False
        assert asked.is_set()
    finally:
        done.set()


def test_sources_take_turns_by_their_weights(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name}\n" * 6)
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    assert "".join(read_samples(f"{a},weight=3;{b}", 8)) == "aabaaaba"
    assert "".join(read_samples(f"{a};{b}", 100)) == "abababababab"


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=4), st.integers(1, 60))
def test_each_source_gives_its_share(weights: list[float], taken: int) -> None:
    items = list(islice(interleaved([repeat(place) for place in range(len(weights))], weights), taken))
    counts = Counter(items)
    for place, weight in enumerate(weights):
        assert abs(counts[place] - taken * weight / sum(weights)) <= len(weights)


def test_the_built_in_passages_are_a_mixture() -> None:
    samples = read_samples("builtin", 1000)
    assert len(samples) == len({str(sample) for sample in samples}) >= 100
    texts = [sample for sample in samples if isinstance(sample, str)]
    assert min(map(len, texts)) > 100
    for some in (samples[:16], samples[-16:]):
        chats = [sample for sample in some if isinstance(sample, Chat)]
        code = [text for text in some if isinstance(text, str) and ("def " in text or "{" in text)]
        foreign = [text for text in some if isinstance(text, str) and sum(map(str.isalpha, text)) - _ascii(text) > 5]
        assert chats and code and foreign and len(some) > len(chats) + len(code) + len(foreign)
    assert all(chat.may_be_plain for chat in samples if isinstance(chat, Chat))


def _ascii(text: str) -> int:
    return sum(character.isalpha() for character in text if character.isascii())


def test_some_built_in_passages_are_always_held_out() -> None:
    samples = read_samples("builtin", 1000)
    assert split_samples("builtin", samples[:28], 20) == (samples[:20], samples[20:28])
    calibration, rest = split_samples("builtin", samples, 512)
    assert (calibration, rest) == (samples[:-16], samples[-16:])


@pytest.mark.usefixtures("reachable")
@pytest.mark.parametrize("name", ON_HUB)
@pytest.mark.parametrize("error", [ConnectionError("offline mode"), ValueError("not in the cache"), OSError("full")])
def test_a_hub_that_is_not_there_is_explained(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(PtqError, match=rf"'{name}' could not be loaded .*{error}.*builtin needs no network"):
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


def test_chats_need_a_template(tmp_path: Path) -> None:
    tokenizer = load(make_hugging_face(tmp_path, adds_bos=False))
    tokenizer.tokenizer.chat_template = None
    with pytest.raises(
        PtqError, match=r"sample 2 of calibration_dataset=DATA: .* no chat template; give texts instead"
    ):
        tokenize_all(tokenizer, ["text", CHAT], 8, "DATA")
    plain = tokenize(tokenizer, "User: def add(a, b)\n\nAssistant: return a + b", 100)
    assert tokenize(tokenizer, Chat(CHAT, may_be_plain=True), 100) == plain


def load(directory: Path) -> Any:
    """The tokenizer as an export's evaluation has it, without NeMo."""
    from transformers import AutoTokenizer

    return SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(directory))


def test_long_texts_are_cut_before_they_are_tokenized(tmp_path: Path) -> None:
    tokenizer = load(make_hugging_face(tmp_path, adds_bos=True)).tokenizer
    seen = []

    def encode(text: str) -> list[int]:
        seen.append(len(text))
        return tokenizer(text)["input_ids"]

    text = "the quick brown fox jumps over the lazy dog. " * 5000
    whole = tokenizer(text)["input_ids"]
    for seq_len in (1, 7, 128):
        assert first_tokens(encode, text, seq_len) == whole[:seq_len]
    assert max(seen) < 4000
    for odd in ("", "x" * 20000, "\n" * 20000, "   a" * 9000, "é" * 9000):
        assert first_tokens(encode, odd, 100) == tokenizer(odd)["input_ids"][:100]


TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}"
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ message.role }}={{ message.content }}{% for call in message.tool_calls or [] %}"
    "{{ call.function.arguments['a'] }}{% endfor %};{% endfor %}"
)


def test_templates_get_tools_and_say_what_they_refuse(tmp_path: Path) -> None:
    tokenizer = load(make_hugging_face(tmp_path, adds_bos=False))
    tokenizer.tokenizer.chat_template = TOOL_TEMPLATE

    def written(chat: Sample) -> str:
        return tokenizer.tokenizer.decode(tokenize(tokenizer, chat, 1000))

    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 2}}}]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert written(Chat([CHAT[0], call], tools)) == "f;user=def add(a, b);assistant=2;"
    system = {"role": "system", "content": "Be brief."}
    assert written([system, *CHAT]) == "user=Be brief.\n\ndef add(a, b);assistant=return a + b;"
    with pytest.raises(PtqError) as caught:
        tokenize_all(tokenizer, [CHAT, [*CHAT, system]], 8, "DATA")
    assert str(caught.value) == (
        "sample 2 of calibration_dataset=DATA: the tokenizer's chat template refuses a chat of user, assistant, system "
        "(no system here): take it out of the data, give it the turns that the template wants, or give texts instead"
    )
    assert tokenize(tokenizer, [], 8) == []


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 3000000000 }}",
        "{{ '%3000000000d' % 1 }}",
    ],
)
def test_a_template_without_end_is_ended(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_TEMPLATE_SECONDS", 0.2)
    tokenizer = load(make_hugging_face(tmp_path, adds_bos=False))
    tokenizer.tokenizer.chat_template = template
    with pytest.raises(PtqError, match=r"chat template takes more than 0\.2 s or 1 GiB for a chat of user, "):
        tokenize(tokenizer, CHAT, 8)


def test_tokens_have_rows() -> None:
    check_in_vocabulary([[3, 9], []], 10, "DATA")
    with pytest.raises(PtqError, match=r"the tokenizer gives token 9 for calibration_dataset=DATA.*only 9 rows"):
        check_in_vocabulary([[3], [9, 4]], 9, "DATA")


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
