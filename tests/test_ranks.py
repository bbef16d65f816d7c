# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The helper that other tests trust: a failing rank must fail the test."""

import os
import signal
import sys
import time

import pytest

from tests.ranks import RankFailed, run_ranks


def _sum_of_ranks(offset: float) -> tuple[str, float]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.full((100_000,), dist.get_rank() + offset)
    dist.all_reduce(value)
    return os.environ["RANK"], value.unique().item()


def test_results_come_back_in_order_of_rank() -> None:
    assert run_ranks(_sum_of_ranks, 2, 0.5) == [("0", 2.0), ("1", 2.0)]


def test_ranks_are_fresh_processes() -> None:
    first, second = run_ranks(os.getpid, 2), run_ranks(os.getpid, 2)
    assert len({os.getpid(), *first, *second}) == 5


def _is_imported(name: str) -> bool:
    return name in sys.modules


def test_imports_are_paid_for_once() -> None:
    assert run_ranks(_is_imported, 1, "nemo.collections.llm") == [True]


def _raise_on_rank_1() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ValueError("the reason")
    dist.barrier()


def test_error_of_one_rank_is_shown() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1 failed:.*_raise_on_rank_1.*ValueError: the reason"):
        run_ranks(_raise_on_rank_1, 2)


def _die_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_death_of_one_rank_ends_the_others() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed, match="rank 1 died"):
        run_ranks(_die_on_rank_1, 2)
    assert time.monotonic() - start < 30


def _hang_on_rank_0() -> None:
    if os.environ["RANK"] == "0":
        time.sleep(60)


def test_rank_that_hangs_is_named() -> None:
    with pytest.raises(RankFailed, match=r"rank 0 did not end within 2 s"):
        run_ranks(_hang_on_rank_0, 2, timeout=2)
