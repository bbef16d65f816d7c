# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Batches that rounding is not fitted to, and errors on them: quality "max"."""

from dataclasses import dataclass

import torch

from nemo_ptq.parallel.ranks import Parallelism

# One batch in this many is held out.
_EVERY = 8


def held_out_places(batches: int) -> frozenset[int]:
    """Returns which batches are held out: the last of every eight; of fewer, the last one; of a single one, none."""
    if batches < 2:
        return frozenset()
    return frozenset(range(_EVERY - 1, batches, _EVERY)) or frozenset({batches - 1})


def sample_errors(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Returns the error of each sample: the mean, over its tokens, of the squared error relative to the token's square.

    The norms that read a block's output divide by the root mean square of each token.

    Args:
        found: (sequence, batch, hidden size), any floating-point type.
        exact: The correct output, of the same shape and type.

    Returns:
        float32 (batch).
    """
    exact = exact.float()
    square = exact.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((found.float() - exact).square().sum(-1) / square).mean(0)


@dataclass(frozen=True)
class HeldOutError:
    """The error of a block, or of the model, on the samples that are held out.

    Attributes:
        mean: Mean over the samples.
        worst: The largest error of a sample.
    """

    mean: float
    worst: float

    @classmethod
    def of(cls, samples: torch.Tensor, parallelism: Parallelism) -> "HeldOutError":
        """Merges the errors of all samples; every rank that computed it calls it.

        Args:
            samples: float32 (samples): the errors of this rank's samples, of which there may be none. If no rank has
                any, the merged error is 0.
            parallelism: This rank's place.
        """
        # Ranks that share a block have computed equal values, up to the order of their sums, and must decide alike.
        sums = torch.stack([samples.sum(), torch.tensor(float(len(samples)), device=samples.device)])
        total, count = parallelism.tensor.max(parallelism.data.sum(sums)).tolist()
        largest = torch.cat([samples, samples.new_zeros(1)]).amax()
        return cls(total / max(count, 1.0), float(parallelism.tensor.max(parallelism.data.max(largest))))

    def __str__(self) -> str:
        return f"{self.mean:.4f} (worst {self.worst:.4f})"

    def is_less(self, other: "HeldOutError") -> bool:
        """Whether this error is the smaller one: the worst sample counts as much as the mean."""
        return self.mean + self.worst < other.mean + other.worst
