# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How good a quantized model is: perplexity, and divergence from the model it was made of, with confidence intervals.

Documents are the unit of resampling: tokens of one document are far from independent, documents nearly are.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nemo_ptq.errors import PtqError
from nemo_ptq.verify.forward import CPU, stream_logits
from nemo_ptq.verify.intervals import Interval, bootstrap_interval

# Positions whose next-token distributions are in memory at a time.
_WINDOW = 128


@dataclass(frozen=True)
class DocumentScore:
    """Sums over the predicted tokens of one document (or batch of equally long documents).

    Attributes:
        tokens: Number of predictions.
        nll: Negative log-likelihood of the true next tokens, in nats.
        baseline_nll: The same for the baseline.
        kl_divergence: KL(baseline || model), in nats.
        agreements: Predictions where both models rank the same token first.
    """

    tokens: int
    nll: float
    baseline_nll: float
    kl_divergence: float
    agreements: int


@dataclass(frozen=True)
class Evaluation:
    """What the comparison of two models on the same documents says.

    Attributes:
        perplexity: Of the model.
        baseline_perplexity: Of the baseline.
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
    """Compares the two models' logits, both (batch, seq, vocab), on int64 (batch, seq) tokens.

    Works on a few positions at a time: over a large vocabulary their distributions take more memory than a layer.
    """
    windows = range(0, max(tokens.shape[1] - 1, 1), _WINDOW)
    # The last position of a window predicts a token of the next one.
    cuts = [slice(start, start + _WINDOW + 1) for start in windows]
    scores = [_score(baseline[:, cut], logits[:, cut], tokens[:, cut]) for cut in cuts]
    return DocumentScore(*(sum(figure) for figure in zip(*map(astuple, scores), strict=True)))


def _score(baseline: torch.Tensor, logits: torch.Tensor, tokens: torch.Tensor) -> DocumentScore:
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


def compare(
    baseline: Iterable[torch.Tensor], logits: Iterable[torch.Tensor], documents: Sequence[torch.Tensor]
) -> list[DocumentScore]:
    """Scores two streams of logits against each other, one document in memory at a time.

    Args:
        baseline: (batch, seq, vocab) logits for each document.
        logits: The same of the model that is judged.
        documents: int64 (batch, seq) tokens of each document.

    Raises:
        ValueError: The streams yield another number of documents.
    """
    return [
        score_document(truth, judged, tokens) for truth, judged, tokens in zip(baseline, logits, documents, strict=True)
    ]


def perplexity(directory: Path | str, documents: Sequence[torch.Tensor], device: torch.device = CPU) -> float:
    """Perplexity of a qnemo directory: exp of the mean negative log-likelihood over all predicted tokens.

    Args:
        directory: A qnemo directory.
        documents: int64 (seq,) or (batch, seq) tokens each, at least one of them with two tokens in a row.
        device: Where to compute.

    Raises:
        PtqError: Nothing to predict, or as in :func:`nemo_ptq.verify.forward.stream_logits`.
    """
    batches = [tokens[None] if tokens.ndim == 1 else tokens for tokens in documents]
    total, count = 0.0, 0
    for logits, tokens in zip(stream_logits(directory, batches, device), batches, strict=True):
        nll = next_token_nll(logits, tokens)
        total, count = total + nll.double().sum().item(), count + nll.numel()
    if count == 0:
        raise PtqError("perplexity needs at least one document of two tokens or more")
    return float(np.exp(total / count))
