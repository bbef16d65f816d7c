# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The main job as a script for torchrun and srun, with the flags of NeMo's `scripts/llm/ptq.py`.

torchrun --nproc_per_node 2 -m nemo_ptq.script --nemo_checkpoint=CKPT --calibration_tp=2 --export_path=OUT
srun --nodes 2 --ntasks-per-node 8 python -m nemo_ptq.script --calibration_tp=8 --calibration_pp=2 ...
"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.errors import ConfigError, PtqError, did_you_mean
from nemo_ptq.launch.arguments import option_values, read_command_line, task_arguments
from nemo_ptq.launch.start import start
from nemo_ptq.options import OPTIONS, below
from nemo_ptq.parallel.environment import Launch, read_launch
from nemo_ptq.plan import plan_job, show_plan
from nemo_ptq.plan.rules import check_job

# Seconds that other nodes leave rank 0 for its report: a launcher ends all ranks as soon as one exits.
_PATIENCE = 10.0


@dataclass(frozen=True)
class Flag:
    """A flag of the script.

    Attributes:
        option: The option that it sets, by its full name.
        names: Its spellings; the first is what messages call it.
        value: What it sets the option to, for a flag without a value of its own.
    """

    option: str
    names: tuple[str, ...]
    value: bool | None = None


FLAGS = (
    Flag("nemo_checkpoint", ("--nemo_checkpoint", "-nc", "--model_path", "-mp")),
    Flag("tokenizer_path", ("--tokenizer",)),
    Flag("legacy_ckpt", ("--legacy_ckpt",), True),
    Flag("calibration_state", ("--calibration_state",)),
    Flag("tracking", ("--tracking",)),
    Flag("calibration_tp", ("--calibration_tp", "-ctp", "--calib_tp")),
    Flag("calibration_pp", ("--calibration_pp", "-cpp", "--calib_pp")),
    Flag("calibration_ep", ("--calibration_ep", "-cep")),
    Flag("num_layers_in_first_pipeline_stage", ("--num_layers_in_first_pipeline_stage",)),
    Flag("num_layers_in_last_pipeline_stage", ("--num_layers_in_last_pipeline_stage",)),
    Flag("plan_only", ("--plan_only",), True),
    Flag("plan_device", ("--plan_device",)),
    Flag("devices", ("--devices",)),
    Flag("num_nodes", ("--num_nodes", "-nodes")),
    Flag("quantization_config.algorithm", ("--algorithm", "-algo")),
    Flag("quantization_config.awq_block_size", ("--awq_block_size", "-awq_bs")),
    Flag("quantization_config.sq_alpha", ("--sq_alpha",)),
    Flag("quantization_config.enable_kv_cache", ("--enable_kv_cache",), True),
    Flag("quantization_config.enable_kv_cache", ("--disable_kv_cache",), False),
    Flag("quantization_config.kv_cache_qformat", ("--kv_cache_qformat",)),
    Flag("quantization_config.calibration_dataset", ("--calibration_dataset", "-calib_ds")),
    Flag("quantization_config.calibration_dataset_size", ("--calibration_dataset_size", "-calib_size")),
    Flag("quantization_config.calibration_batch_size", ("--batch_size", "-bs")),
    Flag("quantization_config.calibration_seq_len", ("--seq_len", "-sl")),
    Flag("quantization_config.evaluation_dataset_size", ("--evaluation_dataset_size",)),
    Flag("quantization_config.layerwise", ("--layerwise",), True),
    Flag("quantization_config.layerwise", ("--resident",), False),
    Flag("export_config.path", ("--export_path", "-out", "--output_path")),
    Flag("export_config.overwrite", ("--overwrite",), True),
    Flag("export_config.resume", ("--resume",), True),
    Flag("export_config.export_format", ("--export_format",)),
    Flag("export_config.dtype", ("--dtype", "-dt")),
    Flag("export_config.decoder_type", ("--decoder_type",)),
    Flag("export_config.inference_tp", ("--inference_tp", "-itp", "--tensor_parallelism_size")),
    Flag("export_config.inference_pp", ("--inference_pp", "-ipp", "--pipeline_parallelism_size")),
    Flag("export_config.generate_sample", ("--generate_sample",), True),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError([message])


def read_flags(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Turns the script's flags into the arguments of :func:`nemo_ptq.plan.rules.check_job`.

    Args:
        arguments: The command line after the script's name.

    Returns:
        The arguments, whose values are left to the checks of the job, and a line for each flag that does not exist.

    Raises:
        ConfigError: If a flag lacks its value, or has one although it takes none.
    """
    values, problems = _flag_values(arguments)
    return task_arguments(_with_path(values)), problems


def read_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """Reads the arguments of a job in either spelling: `name=value` as for `nemo llm ptq`, or the script's flags.

    Args:
        arguments: The command line. A word that is neither names the checkpoint; what is said to NeMo-Run itself, as
            `run.name=value`, is left out.

    Returns:
        The arguments of :func:`nemo_ptq.plan.rules.check_job`.

    Raises:
        ConfigError: With a line for each argument that does not exist.
    """
    named = [argument for argument in arguments if re.match(r"[\w.]+=", argument)]
    flags = [argument for argument in arguments if argument not in named]
    checkpoint = {"nemo_checkpoint": flags.pop(0)} if flags and not flags[0].startswith("-") else {}
    line = read_command_line(named, ())
    pairs, foreign = option_values(line)
    given, wrong_flags = _flag_values(flags)
    problems = [*line.problems, *foreign, *wrong_flags]
    if problems:
        raise ConfigError(problems)
    return task_arguments(_with_path({**given, **checkpoint, **pairs}))


def _flag_values(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The values of flags by their options' full names, and a line for each flag that does not exist."""
    parser = _Parser(
        prog="python -m nemo_ptq.script",
        description="Quantizes a NeMo 2.0 checkpoint and exports it for inference. Start it with torchrun or srun.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for flag in FLAGS:
        described = in_flags(OPTIONS[flag.option].describe())
        if flag.value is None:
            parser.add_argument(*flag.names, dest=flag.option, metavar="VALUE", help=described)
        else:
            meaning = described if flag.value else f"not: {described}"
            parser.add_argument(*flag.names, dest=flag.option, action="store_const", const=flag.value, help=meaning)
    given, unknown = parser.parse_known_args(arguments)
    names = [name for flag in FLAGS for name in flag.names]
    problems = [
        f"{argument} is not a flag{did_you_mean(argument.partition('=')[0], names)}"
        # What follows an unknown flag may be its value.
        for argument in [word for word in unknown if word.startswith("-")] or unknown
    ]
    values = {
        option: OPTIONS[option].kind.read(value) if isinstance(value, str) else value
        for option, value in vars(given).items()
    }
    return values, problems


def _with_path(values: dict[str, Any]) -> dict[str, Any]:
    """Adds the path that NeMo's script gives an export without one."""
    algorithm = QuantizationConfig(**below("quantization_config.", values)).algorithm_name
    tp, pp = (values.get(f"export_config.inference_{size}", 1) for size in ("tp", "pp"))
    return {"export_config.path": f"qnemo_{algorithm}_tp{tp}_pp{pp}", **values}


def in_flags(problem: str, flags: Sequence[Flag] = FLAGS) -> str:
    """Puts the flags of a command, this script's if none are given, in place of the options that a problem names."""
    for flag in reversed(flags):  # --enable_kv_cache after --disable_kv_cache
        shown = re.escape(flag.option) + ("(=true)?" if flag.value else "(=false)" if flag.value is False else "")
        problem = re.sub(rf"(?<![\w./-]){shown}(?![\w./-])", flag.names[0], problem)
    return problem


def _report(problems: Sequence[str], launch: Launch) -> None:
    """Prints problems once, although all ranks find them."""
    if launch.local_rank == 0:
        if not launch.is_first:
            # Normally rank 0 found the same and ends us now; otherwise it is this node's own problem.
            time.sleep(_PATIENCE)
        for problem in problems:
            print(f"Error: {in_flags(problem)}", file=sys.stderr, flush=True)
    else:
        time.sleep(2 * _PATIENCE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script on this rank.

    Args:
        arguments: The command line; None takes this process's.

    Returns:
        The exit status: 0, 1 if the job failed, 2 if the command line is wrong.
    """
    launch = read_launch()
    launcher = launch.launcher or "torchrun"
    problems: list[str] = []
    try:
        task, problems = read_flags(sys.argv[1:] if arguments is None else arguments)
        if task.get("plan_only") and not problems:
            plan = plan_job(task, world_size=launch.world_size, launcher=launcher)
            if launch.is_first:
                show_plan(plan)
            return 0 if plan.ok else 1
        job = check_job(**task, world_size=launch.world_size, launcher=launcher)
    except ConfigError as error:
        problems += error.problems
    if problems:
        _report(problems, launch)
        return 2

    try:
        start(job)
    except PtqError as error:
        print(f"Error on rank {launch.rank}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
