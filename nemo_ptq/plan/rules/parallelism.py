# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Parallelism: it divides the model, while calibrating and in the files, and the launcher starts as many processes."""

from collections.abc import Iterable

from nemo_ptq.models.spec import ModelSpec

# Largest parallelism that a fix suggests.
_MOST_RANKS = 64
# How to set the number of processes with each launcher.
_PROCESSES = {
    "torchrun": "torchrun --nproc_per_node {0}",
    "srun": "srun --ntasks {0}",
    "nemo-ptq run": "--nproc {0}",
    "run.executor=torchrun": "run.executor.ntasks_per_node={0}",
    "run.executor=docker": "run.executor.ntasks_per_node={0}",
    "run.executor=kubeflow": "run.executor.nprocs_per_node={0}",
    "run.executor=slurm": "run.executor.nodes * run.executor.ntasks_per_node = {0}",
    None: "run.executor=torchrun run.executor.ntasks_per_node={0}, or torchrun --nproc_per_node {0}",
}


def _listed(sizes: Iterable[int]) -> str:
    *most, last = map(str, sizes)
    return " or ".join(filter(None, [", ".join(most), last]))


def _divisors(*sizes: int) -> str:
    """Lists the parallelisms that divide all sizes, for a fix."""
    return _listed(ranks for ranks in range(1, _MOST_RANKS + 1) if all(size % ranks == 0 for size in sizes))


def _indivisible(tp: int, model: ModelSpec) -> list[str]:
    """The sizes of the model that a tensor parallelism does not divide; ranks may share query groups."""
    sizes = {"attention heads": model.num_attention_heads, "ffn_hidden_size": model.ffn_hidden_size}
    if (space := model.state_space) is not None:
        sizes |= {"heads of state spaces": space.heads, "groups of state spaces": space.groups}
    wrong = [f"{size} {name}" for name, size in sizes.items() if size % tp]
    groups = model.num_query_groups
    return [*wrong, f"{groups} query groups"] if groups % tp and tp % groups else wrong


def calibration_tp_divides(calibration_tp: int, model: ModelSpec) -> str | None:
    """Every calibration rank has whole query heads and an equal part of the MLP; ranks may share a query group."""

    def wrong(tp: int) -> list[str]:
        rows = (model.num_attention_heads + 2 * model.num_query_groups) * model.head_size
        # Ranks that share a query group cut its rows anywhere; INT4 packs them in pairs.
        is_cut = tp > model.num_query_groups and rows % (2 * tp)
        pairs = [f"{rows} query-key-value rows in pairs"] if is_cut else []
        # The same holds for the smallest group of a state space's rows: a time step for each head.
        if model.state_space is not None and model.state_space.heads % (2 * tp):
            pairs.append(f"{model.state_space.heads} heads of state spaces in pairs")
        return _indivisible(tp, model) or pairs

    if found := wrong(calibration_tp):
        fitting = _listed(tp for tp in range(1, _MOST_RANKS + 1) if not wrong(tp))
        return f"calibration_tp={calibration_tp} does not divide {', '.join(found)}: use {fitting}"
    return None


def stages_are_whole(
    calibration_pp: int,
    num_layers_in_first_pipeline_stage: int | None,
    num_layers_in_last_pipeline_stage: int | None,
    model: ModelSpec,
) -> str | None:
    """The layers that the first and the last stage leave are spread evenly over the other stages."""
    uneven = {
        "num_layers_in_first_pipeline_stage": num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": num_layers_in_last_pipeline_stage,
    }
    given = {name: layers for name, layers in uneven.items() if layers is not None}
    if not given:
        if model.num_layers % calibration_pp == 0:
            return None
        return (
            f"calibration_pp={calibration_pp} does not divide {model.num_layers} layers: "
            f"use {_divisors(model.num_layers)}, or set {' or '.join(uneven)}"
        )
    stages, layers = calibration_pp - len(given), model.num_layers - sum(given.values())
    if stages < 0 or calibration_pp == 1:
        return f"{' and '.join(given)} need calibration_pp=2 or more, not {calibration_pp}: leave them out"
    if layers < stages or layers % max(stages, 1) or (stages == 0 and layers != 0):
        shown = " and ".join(f"{name}={count}" for name, count in given.items())
        return (
            f"{shown} do not fit {model.num_layers} layers in calibration_pp={calibration_pp} stages: "
            "the other stages must share what is left evenly"
        )
    return None


def experts_divide(calibration_ep: int, model: ModelSpec) -> str | None:
    """Every rank of an expert-parallel group has the same number of experts."""
    if calibration_ep > 1 and model.num_experts is None:
        return f"calibration_ep={calibration_ep} is for mixture-of-experts models, and this one has none: use 1"
    if model.num_experts is not None and model.num_experts % calibration_ep:
        fitting = _divisors(model.num_experts)
        return f"calibration_ep={calibration_ep} does not divide {model.num_experts} experts: use {fitting}"
    return None


def experts_are_sharded_once(calibration_tp: int, calibration_ep: int) -> str | None:
    """ModelOpt calibrates experts that are spread over ranks or sharded within, not both."""
    if calibration_ep > 1 and calibration_tp > 1:
        return (
            f"calibration_ep={calibration_ep} with calibration_tp={calibration_tp}: ModelOpt calibrates experts with "
            "one of the two only; use calibration_tp=1 or calibration_ep=1"
        )
    return None


def ranks_are_enough(
    world_size: int | None, launcher: str | None, calibration_tp: int, calibration_pp: int, calibration_ep: int
) -> str | None:
    """The world is TP * PP * DP, and experts are spread over data-parallel ranks."""
    needed = calibration_tp * calibration_pp * calibration_ep
    if world_size is not None and world_size % needed:
        sizes = f"calibration_tp={calibration_tp} * calibration_pp={calibration_pp}"
        if calibration_ep > 1:
            sizes += f" * calibration_ep={calibration_ep}"
        return (
            f"world size {world_size} is not a multiple of {sizes} = {needed}: start {needed} processes "
            f"({_PROCESSES[launcher].format(needed)})"
        )
    return None


def devices_match(world_size: int | None, devices: int | None, num_nodes: int | None) -> str | None:
    """The numbers of devices and nodes, if given, are what the launcher starts."""
    if world_size is None or (devices is None and num_nodes is None):
        return None
    if devices is None or num_nodes is None:
        matches = world_size % (devices or num_nodes or 1) == 0
    else:
        matches = devices * num_nodes == world_size
    if matches:
        return None
    given = " * ".join(f"{name}={value}" for name, value in (("devices", devices), ("num_nodes", num_nodes)) if value)
    return f"{given} does not match the launcher's world size of {world_size}: leave it out, or start as many processes"


def inference_tp_divides(inference_tp: int, model: ModelSpec) -> str | None:
    """Every exported rank has whole heads and an equal part of the MLP; fewer KV heads than ranks are repeated."""
    if wrong := _indivisible(inference_tp, model):
        fitting = _listed(tp for tp in range(1, _MOST_RANKS + 1) if not _indivisible(tp, model))
        return f"export_config.inference_tp={inference_tp} does not divide {', '.join(wrong)}: use {fitting}"
    return None


def inference_pp_divides(inference_pp: int, model: ModelSpec) -> str | None:
    """Every exported pipeline stage has the same number of layers."""
    if model.num_layers % inference_pp:
        fitting = _divisors(model.num_layers)
        return f"export_config.inference_pp={inference_pp} does not divide {model.num_layers} layers: use {fitting}"
    return None
