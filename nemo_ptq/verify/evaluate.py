# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Quality of a quantized model: perplexity, and divergence from the unquantized model, with confidence intervals.

Documents are the unit of resampling: tokens of one document are far from independent, documents nearly are.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nemo_ptq.errors import PtqError
from nemo_ptq.verify.forward_pass import CPU, open_model, run_layers
from nemo_ptq.verify.intervals import Interval, bootstrap_interval
from nemo_ptq.verify.manifest import MANIFEST
from nemo_ptq.verify.model_config import ModelConfig, load_json
from nemo_ptq.verify.weights import Weights

POSITIONS_AT_ONCE = 128
"""Positions whose next-token distributions are in memory at a time: vocabularies are large."""
# What a model and its baseline have in common, whatever their formats; vocabularies may be padded.
_SIZES = (
    *("decoder", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_size"),
    *("intermediate_size", "moe"),
)
# Numbers in the hidden states that go through the layers together: 128 MiB.
_MOST_STATES = 1 << 25


@dataclass(frozen=True)
class DocumentScore:
    """Sums over the predicted tokens of one document (or batch of equally long documents).

    Attributes:
        tokens: Number of predictions.
        nll: Negative log-likelihood of the true next tokens, in nats.
        baseline_nll: The same for the baseline. Without one, this and the next are 0.
        kl_divergence: KL(baseline || model), in nats.
        agreements: Predictions where both models rank the same token first.
    """

    tokens: int
    nll: float
    baseline_nll: float = 0.0
    kl_divergence: float = 0.0
    agreements: int = 0


@dataclass(frozen=True)
class Evaluation:
    """Comparison of two models on the same documents.

    Attributes:
        perplexity: Perplexity of the model.
        baseline_perplexity: Perplexity of the baseline.
        recovery: Perplexity of the baseline over that of the model.
        kl_divergence: Nats per token.
        top1_agreement: Share of predictions, between 0 and 1.
    """

    perplexity: Interval
    baseline_perplexity: Interval
    recovery: Interval
    kl_divergence: Interval
    top1_agreement: Interval


def next_token_nll(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each token given those before it.

    Args:
        logits: (batch, seq, vocab), any floating dtype.
        tokens: int64 (batch, seq).

    Returns:
        float32 (batch, seq - 1), in nats.
    """
    predictions, targets = logits[:, :-1].float(), tokens[:, 1:].to(logits.device)
    return nn.functional.cross_entropy(predictions.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def kl_divergence(baseline: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(baseline || model) of each next-token distribution.

    Args:
        baseline: (..., vocab) logits of the model that is taken for the truth.
        logits: (..., vocab) logits of the model that is judged.

    Returns:
        float32 (...), in nats.
    """
    expected, found = baseline.float().log_softmax(-1), logits.float().log_softmax(-1)
    return nn.functional.kl_div(found, expected, log_target=True, reduction="none").sum(-1)


def score_document(baseline: torch.Tensor, logits: torch.Tensor, tokens: torch.Tensor) -> DocumentScore:
    """Compares the two models' logits, both (batch, seq, vocab), on int64 (batch, seq) tokens."""
    return _add(_score(logits[:, cut], baseline[:, cut], tokens[:, cut]) for cut in _windows(tokens))


def _windows(tokens: torch.Tensor) -> list[slice]:
    """Cuts a document so that distributions over a large vocabulary fit into memory.

    The last position of a window predicts the first token of the next one.
    """
    return [
        slice(start, start + POSITIONS_AT_ONCE + 1)
        for start in range(0, max(tokens.shape[1] - 1, 1), POSITIONS_AT_ONCE)
    ]


def _add(scores: Iterable[DocumentScore]) -> DocumentScore:
    return DocumentScore(*(sum(figure) for figure in zip(*map(astuple, scores), strict=True)))


def _score(logits: torch.Tensor, baseline: torch.Tensor | None, tokens: torch.Tensor) -> DocumentScore:
    if baseline is None:
        nll = next_token_nll(logits, tokens)
        return DocumentScore(nll.numel(), nll.double().sum().item())
    # Padding of the vocabulary, which only one of them may have, is no token.
    vocab = min(logits.shape[-1], baseline.shape[-1])
    logits, baseline = logits[..., :vocab], baseline[..., :vocab]
    nll, baseline_nll = next_token_nll(logits, tokens), next_token_nll(baseline, tokens)
    judged, truth = logits[:, :-1], baseline[:, :-1]
    return DocumentScore(
        tokens=nll.numel(),
        nll=nll.double().sum().item(),
        baseline_nll=baseline_nll.double().sum().item(),
        kl_divergence=kl_divergence(truth, judged).double().sum().item(),
        agreements=int((judged.argmax(-1) == truth.argmax(-1)).sum()),
    )


def summarize(scores: Sequence[DocumentScore], confidence: float = 0.95, seed: int = 0) -> Evaluation:
    """Perplexities, KL divergence and top-1 agreement over all documents, with confidence intervals.

    Raises:
        PtqError: There are no documents.
    """
    tokens = [score.tokens for score in scores]

    def interval(sums: list[float], transform: Callable[[np.ndarray], np.ndarray] = np.asarray) -> Interval:
        return bootstrap_interval(sums, tokens, transform, confidence, seed=seed)

    return Evaluation(
        perplexity=interval([score.nll for score in scores], np.exp),
        baseline_perplexity=interval([score.baseline_nll for score in scores], np.exp),
        recovery=interval([score.baseline_nll - score.nll for score in scores], np.exp),
        kl_divergence=interval([score.kl_divergence for score in scores]),
        top1_agreement=interval([float(score.agreements) for score in scores]),
    )


def require_same_model(model: ModelConfig, baseline: ModelConfig) -> None:
    """Refuses to compare a model with another one than it was made of.

    Raises:
        PtqError: If they have not the same sizes.
    """
    for name in _SIZES:
        found, expected = getattr(model, name), getattr(baseline, name)
        if found != expected:
            raise PtqError(
                f"the baseline is another model than the exported one: its {name} is {expected}, not {found}"
            )


def require_merged_baseline(directory: Path, baseline: Path) -> None:
    """Refuses to compare a model that an adapter was merged into with the checkpoint as it was before.

    Raises:
        PtqError: If the baseline is the checkpoint that the directory was made of, with an adapter.
    """
    try:
        arguments = load_json(directory / MANIFEST)["arguments"]
        adapter, source = arguments.get("adapter"), arguments.get("nemo_checkpoint")
    except (PtqError, KeyError, AttributeError):
        return  # of no job of ours
    if adapter is not None and source is not None and Path(source).resolve() == baseline.resolve():
        raise PtqError(
            f"{directory} has the adapter {adapter} merged into it, and the baseline {baseline} has not: give the "
            f"directory that `nemo-ptq convert {baseline} MERGED --format hf --adapter {adapter}` makes"
        )


def evaluate(
    model: Weights,
    baseline: Weights | None,
    documents: Sequence[torch.Tensor],
    device: torch.device = CPU,
    follow: Callable[[int], None] = lambda tokens: None,
) -> list[DocumentScore]:
    """Scores a model on documents, against another one if there is one, in bounded memory.

    Memory holds a layer of one model in float32, a hundred megabytes of hidden states of each, and their output layers.

    Args:
        model: The model that is judged.
        baseline: The model to compare it with; None for none.
        documents: int64 (batch, seq) tokens each.
        device: Device to compute on.
        follow: Called after each layer of each group of documents, with the tokens that went through it.

    Returns:
        One score for each document, in order.
    """
    scores = []
    for group in document_groups(documents, model.config.hidden_size):
        done = partial(follow, sum(tokens.numel() for tokens in group))
        truth = None if baseline is None else run_layers(baseline, group, device, done)
        judged = run_layers(model, group, device, done)
        scores += [
            _add(
                _score(judged.logits(index, cut), None if truth is None else truth.logits(index, cut), tokens[:, cut])
                for cut in _windows(tokens)
            )
            for index, tokens in enumerate(group)
        ]
    return scores


def document_groups(documents: Sequence[torch.Tensor], hidden_size: int) -> list[list[torch.Tensor]]:
    """Puts documents into groups, in order, whose hidden states go through the layers together."""
    groups: list[list[torch.Tensor]] = []
    room = 0
    for tokens in documents:
        size = tokens.numel() * hidden_size
        if size > room:
            groups.append([])
            room = _MOST_STATES
        groups[-1].append(tokens)
        room -= size
    return groups


def perplexity(directory: Path | str, documents: Sequence[torch.Tensor], device: torch.device = CPU) -> float:
    """Perplexity of a directory: exp of the mean negative log-likelihood over all predicted tokens.

    Args:
        directory: A directory that :func:`~nemo_ptq.verify.forward_pass.open_model` can open.
        documents: int64 (seq,) or (batch, seq) tokens each, at least one of them with two tokens in a row.
        device: Device to compute on.

    Raises:
        PtqError: Nothing to predict, or as in :func:`nemo_ptq.verify.forward_pass.stream_logits`.
    """
    batches = [tokens[None] if tokens.ndim == 1 else tokens for tokens in documents]
    scores = evaluate(open_model(directory), None, batches, device)
    count = sum(score.tokens for score in scores)
    if count == 0:
        raise PtqError("perplexity needs at least one document of two tokens or more")
    return float(np.exp(sum(score.nll for score in scores) / count))


def continue_greedily(
    model: Weights, prompt: torch.Tensor, draft: torch.Tensor, device: torch.device = CPU
) -> torch.Tensor:
    """The tokens that a model ranks first after a prompt, one after the other.

    Each pass over the layers reads all weights, so it is not spent on one token: the model is run on a guess of the
    whole continuation, which is right up to the first token that it ranks otherwise, and guesses the rest anew.

    Args:
        model: The model.
        prompt: int64 (seq,).
        draft: int64 (count,): a first guess, such as another model's continuation. It changes the time, not the result.
        device: Device to compute on.

    Returns:
        int64 (count,).
    """
    found, start = draft.clone(), len(prompt) - 1
    right = 0
    while right < len(found):
        states = run_layers(model, [torch.cat((prompt, found[:-1]))[None]], device)
        ranked_first = states.logits(0, slice(start, None))[0].argmax(-1).cpu()
        agreed = int((ranked_first == found).long().cumprod(0).sum())
        # One token beyond those agreed upon follows from right ones only.
        right, found = agreed + 1, ranked_first
    return found
