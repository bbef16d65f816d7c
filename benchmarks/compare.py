# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Compares the tensors of two exports: `python -m benchmarks.compare DIRECTORY OTHER`.

Exports of one calibrated model are the same byte for byte. Calibrations at different tensor parallelism add up in
different orders, so that amaxes, and what was rounded with them, may differ by a rounding.
"""

import argparse
import sys

import torch

from nemo_ptq.verify.trtllm.trtllm_reader import Checkpoint, open_checkpoint


def difference(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Returns the share of elements that differ, and their largest difference relative to the largest element."""
    left, right = found.float(), expected.float()
    if not left.numel():
        return 0.0, 0.0
    largest = right.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((left != right).float().mean()), float((left - right).abs().max() / largest)


def report(found: Checkpoint, expected: Checkpoint) -> bool:
    """Prints one line for each kind of tensor; returns whether both have the same tensors, shapes and dtypes."""
    if set(found.names()) != set(expected.names()):
        print(f"only in one of them: {', '.join(sorted(set(found.names()) ^ set(expected.names())))}")
        return False
    kinds: dict[str, tuple[int, float, float]] = {}
    for name in found.names():
        left, right = found.tensor(name), expected.tensor(name)
        if (left.shape, left.dtype) != (right.shape, right.dtype):
            print(f"{name}: {left.dtype} {tuple(left.shape)} and {right.dtype} {tuple(right.shape)}")
            return False
        kind = name.rpartition(".")[2]
        tensors, share, largest = kinds.get(kind, (0, 0.0, 0.0))
        new_share, new_largest = difference(left, right)
        kinds[kind] = tensors + 1, max(share, new_share), max(largest, new_largest)
    for kind, (tensors, share, largest) in sorted(kinds.items()):
        print(
            f"{kind}: {tensors} tensors; up to {share:.2%} of one differ, by up to {largest:.1e} of its largest element"
        )
    return True


def main() -> int:
    """Reads the command line and compares; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("other")
    arguments = parser.parse_args()
    return 0 if report(open_checkpoint(arguments.directory), open_checkpoint(arguments.other)) else 1


if __name__ == "__main__":
    sys.exit(main())
