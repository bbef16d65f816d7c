# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Perplexity, divergence and agreement on distributions whose answers are known."""

import json
import math
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_ptq.errors import PtqError
from nemo_ptq.verify.evaluate import (
    DocumentScore,
    continue_greedily,
    document_groups,
    evaluate,
    kl_divergence,
    next_token_nll,
    perplexity,
    require_merged_baseline,
    require_same_model,
    score_document,
    summarize,
)
from nemo_ptq.verify.forward_pass import open_model, run_layers, stream_logits
from nemo_ptq.verify.intervals import bootstrap_interval
from nemo_ptq.verify.manifest import MANIFEST

from .conftest import Pristine
from .qnemo_writer import Recipe
from .reference import VOCAB, build


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(5))


def test_a_uniform_model_has_the_vocabularys_size_as_perplexity() -> None:
    nll = next_token_nll(torch.zeros(2, 9, 50), torch.zeros(2, 9, dtype=torch.int64))
    assert nll.shape == (2, 8)
    assert torch.allclose(nll.mean().exp(), torch.tensor(50.0))


def test_each_position_predicts_the_next_token() -> None:
    tokens = torch.tensor([[2, 0, 1]])
    logits = torch.full((1, 3, 4), -100.0)
    logits[0, 0, 0] = logits[0, 1, 1] = logits[0, 2, 3] = 100.0  # The last position predicts nothing that is known.
    assert next_token_nll(logits, tokens).tolist() == [[0.0, 0.0]]


def test_divergence_by_hand() -> None:
    truth, found = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert kl_divergence(truth, found).item() == pytest.approx(expected, rel=1e-6)


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(-50, 50))
def test_divergence_is_positive_zero_for_equals_and_blind_to_shifts(seed: int, shift: float) -> None:
    truth, found = random_logits(4, 7, seed=seed), random_logits(4, 7, seed=seed + 1)
    assert (kl_divergence(truth, found) > 0).all()
    torch.testing.assert_close(kl_divergence(truth, truth + shift), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(kl_divergence(truth + shift, found), kl_divergence(truth, found), atol=1e-4, rtol=1e-4)


def test_scores_of_a_document() -> None:
    tokens = random_tokens(2, 6)
    truth, found = random_logits(2, 6, VOCAB), random_logits(2, 6, VOCAB, seed=1)
    found[:, :2] = truth[:, :2]
    score = score_document(truth, found, tokens)
    assert score.tokens == 10
    assert 4 <= score.agreements < 10
    assert score.nll == pytest.approx(next_token_nll(found, tokens).sum().item(), rel=1e-5)
    assert score.baseline_nll == pytest.approx(next_token_nll(truth, tokens).sum().item(), rel=1e-5)
    assert score.kl_divergence == pytest.approx(kl_divergence(truth, found)[:, :-1].sum().item(), rel=1e-5)


def test_a_model_compared_with_itself(pristine: Pristine) -> None:
    model = open_model(pristine("llama3", Recipe(tp=2)))
    documents = [random_tokens(1, length) for length in (4, 9, 17)]
    evaluation = summarize(evaluate(model, model, documents))
    assert evaluation.perplexity == evaluation.baseline_perplexity
    assert evaluation.recovery.low == evaluation.recovery.value == 1
    assert evaluation.kl_divergence.value == evaluation.kl_divergence.high == 0
    assert evaluation.top1_agreement.low == evaluation.top1_agreement.value == 1


def test_another_model_is_no_baseline(pristine: Pristine) -> None:
    llama, gemma = (open_model(pristine(family, Recipe(tp=2))).config for family in ("llama3", "gemma"))
    require_same_model(llama, llama)
    with pytest.raises(PtqError, match="another model than the exported one: its decoder is gemma, not llama"):
        require_same_model(llama, gemma)


def test_windows_and_groups_change_nothing(pristine: Pristine, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = (open_model(pristine("llama3", recipe)) for recipe in (Recipe(tp=2), Recipe("fp8")))
    documents = [random_tokens(1, length) for length in (4, 50, 17)]
    expected = [
        score_document(truth, judged, tokens)
        for truth, judged, tokens in zip(
            stream_logits(model.path, documents), stream_logits(other.path, documents), documents, strict=True
        )
    ]
    monkeypatch.setattr("nemo_ptq.verify.evaluate.POSITIONS_AT_ONCE", 7)
    monkeypatch.setattr("nemo_ptq.verify.evaluate._MOST_STATES", 30 * model.config.hidden_size)
    seen: list[int] = []
    found = evaluate(other, model, documents, follow=seen.append)
    for ours, theirs in zip(found, expected, strict=True):
        assert astuple(ours) == pytest.approx(astuple(theirs), rel=1e-5, abs=1e-6)
    # Two models through three groups: what fits goes together, in order.
    assert seen == [length for length in (4, 50, 17) for _ in range(2 * model.config.num_hidden_layers)]


def test_documents_are_grouped_in_order() -> None:
    documents = [torch.zeros(1, length, dtype=torch.int64) for length in (400, 600, 1, 5000, 10)]
    groups = document_groups(documents, hidden_size=(1 << 25) // 1000)
    assert [[tokens.shape[1] for tokens in group] for group in groups] == [[400, 600], [1], [5000], [10]]


def test_without_a_baseline_there_is_a_perplexity(pristine: Pristine) -> None:
    directory = pristine("llama3", Recipe(tp=2))
    documents = [random_tokens(1, 12), random_tokens(1, 5)]
    scores = evaluate(open_model(directory), None, documents)
    assert summarize(scores).perplexity.value == pytest.approx(perplexity(directory, documents))


@pytest.mark.parametrize("recipe", [Recipe(tp=2), Recipe("fp8")])
@pytest.mark.parametrize("draft", [torch.zeros(9, dtype=torch.int64), random_tokens(9)])
def test_guesses_do_not_change_what_is_generated(recipe: Recipe, draft: torch.Tensor, pristine: Pristine) -> None:
    model = open_model(pristine("llama3", recipe))
    tokens = prompt = random_tokens(6)
    for _ in range(len(draft)):
        following = run_layers(model, [tokens[None]]).logits(0)[0, -1].argmax()
        tokens = torch.cat((tokens, following[None]))
    assert continue_greedily(model, prompt, draft).tolist() == tokens[len(prompt) :].tolist()


def test_documents_weigh_by_their_tokens() -> None:
    scores = [DocumentScore(90, 90.0, 0.0, 9.0, 45), DocumentScore(10, 0.0, 0.0, 1.0, 10)]
    evaluation = summarize(scores)
    assert evaluation.perplexity.value == pytest.approx(math.exp(0.9))
    assert evaluation.baseline_perplexity.value == 1
    assert evaluation.kl_divergence.value == pytest.approx(0.1)
    assert evaluation.top1_agreement.value == pytest.approx(0.55)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Documents of random length with exponential losses around a mean of 2: about 95 of 100 intervals hold the 2."""
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        lengths = generator.integers(5, 50, size=60)
        sums = [generator.exponential(2.0, size=length).sum() for length in lengths]
        interval = bootstrap_interval(sums, list(lengths), resamples=400, seed=seed)
        assert interval.low < interval.value < interval.high
        covered += interval.low <= 2.0 <= interval.high
    assert 88 <= covered <= 99


def test_intervals_are_reproducible_and_narrow_with_more_documents() -> None:
    generator = np.random.default_rng(0)
    sums = list(generator.exponential(size=400))
    few, many = (bootstrap_interval(sums[:count], [1.0] * count) for count in (25, 400))
    assert few == bootstrap_interval(sums[:25], [1.0] * 25)
    assert (many.high - many.low) < (few.high - few.low) / 2


def test_one_document_has_an_interval_of_width_zero() -> None:
    interval = bootstrap_interval([3.0], [2.0], np.exp)
    assert interval.low == interval.value == interval.high == pytest.approx(math.exp(1.5))


@pytest.mark.parametrize("numerators, denominators", [([], []), ([1.0], [1.0, 2.0])])
def test_intervals_of_nothing_are_refused(numerators: list[float], denominators: list[float]) -> None:
    with pytest.raises(PtqError, match="numerators"):
        bootstrap_interval(numerators, denominators)


def test_perplexity_of_a_directory_is_that_of_the_original(pristine: Pristine) -> None:
    documents = [random_tokens(20), random_tokens(3, 11), random_tokens(1)]
    reference, total, count = build("llama3"), 0.0, 0
    for tokens in documents[:2]:
        batch = tokens if tokens.ndim == 2 else tokens[None]
        with torch.no_grad():
            logits = reference(batch).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        count += batch[:, 1:].numel()
    found = perplexity(pristine("llama3", Recipe(tp=2)), documents)
    assert found == pytest.approx(math.exp(total / count), rel=1e-5)


def test_perplexity_of_nothing_is_refused(pristine: Pristine) -> None:
    with pytest.raises(PtqError, match="two tokens or more"):
        perplexity(pristine("llama3", Recipe(tp=2)), [random_tokens(1)])


def test_a_baseline_lacks_the_adapter_that_was_merged(tmp_path: Path) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    (tmp_path / "out" / "ptq").mkdir(parents=True)
    arguments = {"nemo_checkpoint": str(base), "adapter": "/lora"}
    (tmp_path / "out" / MANIFEST).write_text(json.dumps({"arguments": arguments}))
    with pytest.raises(PtqError, match=r"has the adapter /lora merged into it, .* --format hf --adapter /lora"):
        require_merged_baseline(tmp_path / "out", base)
    require_merged_baseline(tmp_path / "out", other)
    (tmp_path / "out" / MANIFEST).write_text(json.dumps({"arguments": {"nemo_checkpoint": str(base)}}))
    require_merged_baseline(tmp_path / "out", base)
