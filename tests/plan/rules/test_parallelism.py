# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The rules about parallelism and processes."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.plan.rules.parallelism import (
    calibration_tp_divides,
    devices_match,
    experts_are_sharded_once,
    experts_divide,
    inference_pp_divides,
    inference_tp_divides,
    ranks_are_enough,
    stages_are_whole,
)
from tests.plan.models import LLAMA_8B
from tests.plan.rules.examples import MIXTRAL, STARCODER, expect


@pytest.mark.parametrize(
    ("model", "tp", "fix"),
    [
        (LLAMA_8B, 1, None),
        (LLAMA_8B, 8, None),
        (LLAMA_8B, 3, "use 1, 2, 4, 8, 16 or 32"),
        (LLAMA_8B, 16, None),
        (replace(LLAMA_8B, num_query_groups=12, num_attention_heads=48), 8, "12 query groups: use 1, 2 or 4"),
        (replace(LLAMA_8B, ffn_hidden_size=14340), 8, "14340 ffn_hidden_size: use 1, 2 or 4"),
        (STARCODER, 2, None),
        (replace(STARCODER, num_attention_heads=4, head_size=3), 4, "18 query-key-value rows in pairs: use 1"),
    ],
)
def test_calibration_tp(model: ModelSpec, tp: int, fix: str | None) -> None:
    expect(calibration_tp_divides(tp, model), fix)


@pytest.mark.parametrize(
    ("pp", "first", "last", "message"),
    [
        (1, None, None, None),
        (4, None, None, None),
        (3, None, None, "does not divide 32 layers: use 1, 2, 4, 8, 16 or 32, or set num_layers_in_first"),
        (3, 10, None, None),
        (3, 10, 12, None),
        (2, 20, 12, None),
        (3, 11, None, "num_layers_in_first_pipeline_stage=11 do not fit 32 layers in calibration_pp=3 stages"),
        (2, 20, 20, "do not fit"),
        (2, 10, 12, "do not fit"),
        (4, 16, 16, "do not fit"),
        (1, 32, None, "need calibration_pp=2 or more, not 1: leave them out"),
        (1, 16, 16, "need calibration_pp=2 or more"),
    ],
)
def test_pipeline_stages(pp: int, first: int | None, last: int | None, message: str | None) -> None:
    expect(stages_are_whole(pp, first, last, LLAMA_8B), message)


@given(
    pp=st.integers(1, 8),
    first=st.none() | st.integers(1, 16),
    last=st.none() | st.integers(1, 16),
    layers=st.integers(1, 32),
)
def test_stages_that_are_accepted_hold_all_layers(pp: int, first: int | None, last: int | None, layers: int) -> None:
    given_layers = [count for count in (first, last) if count is not None]
    others = pp - len(given_layers)
    accepted = stages_are_whole(pp, first, last, replace(LLAMA_8B, num_layers=layers)) is None
    possible = any(sum(given_layers) + others * each == layers for each in range(1 if others else 0, layers + 1))
    assert accepted == (possible and others >= 0 and (pp > 1 or not given_layers))


@pytest.mark.parametrize(
    ("model", "ep", "message"),
    [
        (LLAMA_8B, 1, None),
        (LLAMA_8B, 2, "is for mixture-of-experts models"),
        (MIXTRAL, 8, None),
        (MIXTRAL, 3, "does not divide 8 experts: use 1, 2, 4 or 8"),
    ],
)
def test_calibration_ep(model: ModelSpec, ep: int, message: str | None) -> None:
    expect(experts_divide(ep, model), message)


def test_experts_are_spread_or_sharded() -> None:
    assert experts_are_sharded_once(2, 1) is None
    assert experts_are_sharded_once(1, 2) is None
    expect(experts_are_sharded_once(2, 2), "use calibration_tp=1 or calibration_ep=1")


@pytest.mark.parametrize(
    ("world", "tp", "pp", "ep", "message"),
    [
        (4, 2, 2, 1, None),
        (8, 2, 2, 1, None),
        (None, 2, 2, 1, None),
        (1, 2, 1, 1, "calibration_tp=2 * calibration_pp=1 = 2: start 2 processes"),
        (6, 2, 2, 1, "world size 6 is not a multiple of"),
        (2, 2, 1, 2, "calibration_tp=2 * calibration_pp=1 * calibration_ep=2 = 4"),
    ],
)
def test_world_size(world: int | None, tp: int, pp: int, ep: int, message: str | None) -> None:
    expect(ranks_are_enough(world, None, tp, pp, ep), message)


@pytest.mark.parametrize(
    ("launcher", "fix"),
    [
        ("torchrun", "start 4 processes (torchrun --nproc_per_node 4)"),
        ("srun", "(srun --ntasks 4)"),
        ("nemo-ptq run", "(--nproc 4)"),
        ("run.executor=torchrun", "(run.executor.ntasks_per_node=4)"),
        ("run.executor=slurm", "(run.executor.nodes * run.executor.ntasks_per_node = 4)"),
        (None, "(run.executor=torchrun run.executor.ntasks_per_node=4, or torchrun --nproc_per_node 4)"),
    ],
)
def test_the_fix_is_for_the_launcher_in_use(launcher: str | None, fix: str) -> None:
    problem = ranks_are_enough(3, launcher, 2, 2, 1)
    assert problem is not None
    assert problem.endswith(fix)


@pytest.mark.parametrize(
    ("world", "devices", "nodes", "message"),
    [
        (16, 8, 2, None),
        (16, 8, None, None),
        (16, None, 2, None),
        (None, 3, 5, None),
        (16, 8, 1, "devices=8 * num_nodes=1 does not match the launcher's world size of 16"),
        (16, 3, None, "devices=3 does not match"),
        (16, None, 3, "num_nodes=3 does not match"),
    ],
)
def test_devices_and_nodes(world: int | None, devices: int | None, nodes: int | None, message: str | None) -> None:
    expect(devices_match(world, devices, nodes), message)


@pytest.mark.parametrize(
    ("model", "tp", "message"),
    [
        (LLAMA_8B, 8, None),
        (LLAMA_8B, 16, None),  # KV heads are repeated
        (
            LLAMA_8B,
            3,
            "does not divide 32 attention heads, 14336 ffn_hidden_size, 8 query groups: use 1, 2, 4, 8, 16 or 32",
        ),
        (STARCODER, 4, None),
        (replace(LLAMA_8B, num_attention_heads=48, num_query_groups=12), 8, "12 query groups"),
    ],
)
def test_inference_tp(model: ModelSpec, tp: int, message: str | None) -> None:
    expect(inference_tp_divides(tp, model), message)


def test_inference_pp() -> None:
    assert inference_pp_divides(4, LLAMA_8B) is None
    expect(inference_pp_divides(5, LLAMA_8B), "inference_pp=5 does not divide 32 layers: use 1, 2, 4, 8")
