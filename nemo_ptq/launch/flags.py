# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The flags of :mod:`nemo_ptq.script`, which are those of NeMo's `scripts/llm/ptq.py`, and their options."""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.errors import ConfigError, did_you_mean
from nemo_ptq.launch.arguments import option_values, read_command_line, task_arguments
from nemo_ptq.options import OPTIONS, below


@dataclass(frozen=True)
class Flag:
    """A flag of a command.

    Attributes:
        option: The option that it sets, by its full name.
        names: Its spellings; messages use the first.
        value: The value that it sets, for a flag without a value of its own.
    """

    option: str
    names: tuple[str, ...]
    value: bool | None = None


def _flags() -> Iterator[Flag]:
    for name, option in OPTIONS.items():
        if option.flags:
            yield Flag(name, option.flags, True if option.is_switch else None)
        if option.off_flags:
            yield Flag(name, option.off_flags, False)


FLAGS = tuple(_flags())
# Flags of NeMo's script that are refused, and their replacements.
_NEMOS_FLAGS = {
    "--trust_remote_code": (
        "--trust_remote_code is not a flag: code that a checkpoint brings is never run; leave it out, and "
        "give --tokenizer=DIR where it was for a tokenizer"
    )
}


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
        arguments: The command line. A word that is neither names the checkpoint; NeMo-Run's own arguments,
            `run.name=value`, are left out.

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
        _NEMOS_FLAGS.get(argument) or _not_a_flag(argument, names)
        # The word after an unknown flag may be its value.
        for argument in [word for word in unknown if word.startswith("-")] or unknown
    ]
    values = {
        option: OPTIONS[option].kind.read(value) if isinstance(value, str) else value
        for option, value in vars(given).items()
    }
    return values, problems


def _not_a_flag(argument: str, names: Sequence[str]) -> str:
    if not argument.startswith("-"):
        return f"{argument} stands without a flag: write one before it, such as --nemo_checkpoint {argument}"
    return f"{argument} is not a flag{did_you_mean(argument.partition('=')[0], names)}"


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
