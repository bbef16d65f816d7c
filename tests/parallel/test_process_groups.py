# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Where ranks meet, which device they take, and that Megatron is left as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ptq.errors import PtqError
from nemo_ptq.parallel.environment import Launch
from nemo_ptq.parallel.process_groups import _rendezvous, first_host, pick_device
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("login1", "login1"),
        ("gpu-01.cluster", "gpu-01.cluster"),
        ("a,b,c", "a"),
        ("gpu[03-04,7],login1", "gpu03"),
        ("gpu[7]", "gpu7"),
        ("gpu[7,9-12]", "gpu7"),
        ("rack[1-2]node[03-08],x", "rack1node03"),
        ("gpu[001-128]-ib", "gpu001-ib"),
    ],
)
def test_first_host_of_a_node_list(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


@pytest.mark.parametrize("node_list", ["", ",a", "[1-2"])
def test_what_is_no_node_list_is_refused(node_list: str) -> None:
    with pytest.raises(PtqError, match="set MASTER_ADDR"):
        first_host(node_list)


@pytest.mark.parametrize(
    ("environment", "address", "port"),
    [
        ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}, "10.0.0.1", 29500),
        ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1", "SLURM_JOB_NODELIST": "a[1-2]"}, "10.0.0.1", 1),
        ({"SLURM_JOB_NODELIST": "a[1-2]", "MASTER_PORT": "29500"}, "a1", 29500),
        ({"SLURM_JOB_NODELIST": "a[1-4]", "SLURM_STEP_NODELIST": "a[3-4]", "MASTER_PORT": "2"}, "a3", 2),
        ({"MASTER_PORT": "29500"}, "127.0.0.1", 29500),
    ],
)
def test_rendezvous_follows_the_launcher(environment: dict[str, str], address: str, port: int) -> None:
    assert _rendezvous(environment) == (address, port)


def test_tasks_of_a_slurm_step_meet_and_other_steps_do_not() -> None:
    ports = []
    for step in ("0", "1"):
        environment = {"SLURM_JOB_NODELIST": "a[1-2]", "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": step}
        per_task = {_rendezvous({**environment, "SLURM_PROCID": task, "SLURMD_NODENAME": f"a{task}"}) for task in "12"}
        (place,) = per_task
        ports.append(place[1])
    assert ports[0] != ports[1]
    assert all(20000 <= port < 30000 for port in ports)


def test_a_port_that_is_no_number_is_refused() -> None:
    with pytest.raises(PtqError, match="MASTER_PORT=http must be the number"):
        _rendezvous({"MASTER_PORT": "http"})


def test_the_cpu_is_taken_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(Launch(rank=5, world_size=8, local_rank=5)) == torch.device("cpu")


def test_each_local_rank_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device(Launch(rank=7, world_size=8, local_rank=3)) == torch.device("cuda", 3)
    with pytest.raises(PtqError, match="local rank 4 has no GPU: this node has 4"):
        pick_device(Launch(rank=4, world_size=8, local_rank=4))


def test_a_task_of_slurm_may_have_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    assert pick_device(Launch(rank=7, world_size=8, local_rank=3)) == torch.device("cuda", 0)


def look_around_megatron() -> tuple[bool, list[Any]]:
    """What Megatron finds inside of megatron_on, and whether all is as before afterwards."""
    from megatron.core.transformer.moe import moe_utils

    from nemo_ptq.parallel.process_groups import megatron_on

    def state() -> list[Any]:
        names = (torch.cuda.current_device, torch.cuda.synchronize, torch.Tensor.cuda)
        return [*names, getattr(moe_utils, "te_general_gemm", "undefined")]

    before = state()
    with megatron_on(torch.device("cpu")):
        torch.cuda.synchronize()
        found = [
            str(torch.cuda.current_device()),
            torch.zeros(2, device=torch.cuda.current_device()).device.type,
            torch.zeros(2).cuda().device.type,
            hasattr(moe_utils, "te_general_gemm"),
        ]
    return state() == before, found


def test_megatron_finds_a_cpu_in_place_of_cuda() -> None:
    assert run_ranks(look_around_megatron, 1) == [(True, ["cpu", "cpu", "cpu", True])]


def describe_groups(tp: int, pp: int, ep: int) -> dict[str, int]:
    import torch.distributed as dist
    from megatron.core import parallel_state

    from nemo_ptq.parallel.environment import read_launch
    from nemo_ptq.parallel.process_groups import process_groups

    cpu = torch.device("cpu")
    with process_groups(read_launch(), cpu, tensor_parallel=tp, pipeline_parallel=pp, expert_parallel=ep):
        found = {
            "world": dist.get_world_size(),
            "tp": parallel_state.get_tensor_model_parallel_world_size(),
            "pp": parallel_state.get_pipeline_model_parallel_world_size(),
            "dp": parallel_state.get_data_parallel_world_size(),
            "ep": parallel_state.get_expert_model_parallel_world_size(),
            "random": int(torch.randint(1 << 30, ())),
        }
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    return found


@pytest.mark.parametrize(("tp", "pp", "ep", "dp"), [(1, 1, 1, 4), (2, 1, 1, 2), (2, 2, 1, 1), (1, 2, 2, 2)])
def test_groups_are_opened_and_closed(tp: int, pp: int, ep: int, dp: int) -> None:
    ranks = run_ranks(describe_groups, 4, tp, pp, ep)
    assert len({rank.pop("random") for rank in ranks}) == 1, "the ranks have different seeds"
    assert ranks == [{"world": 4, "tp": tp, "pp": pp, "dp": dp, "ep": ep}] * 4


def open_twice(path: Path) -> int:
    """The groups of one process may be opened again: an error inside closes them."""
    try:
        describe_and_fail()
    except RuntimeError as error:
        path.write_text(str(error))
    return describe_groups(1, 1, 1)["world"]


def describe_and_fail() -> None:
    from nemo_ptq.parallel.environment import read_launch
    from nemo_ptq.parallel.process_groups import process_groups

    with process_groups(read_launch(), torch.device("cpu")):
        raise RuntimeError("the reason")


def test_an_error_closes_the_groups(tmp_path: Path) -> None:
    assert run_ranks(open_twice, 1, tmp_path / "error") == [1]
    assert (tmp_path / "error").read_text() == "the reason"
