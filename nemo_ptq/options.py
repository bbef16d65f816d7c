# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Every option of the main job: its full name, and which values it takes. All front doors read this one table.

Those of the two configs are declared by their fields (:class:`nemo_ptq.config.Setting`), and those of the task here:
NeMo-Run, which the task needs, takes seconds to import.
"""

import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from textwrap import wrap
from typing import Any, get_args, get_type_hints

from nemo_ptq.calibration.datasets import DATASETS
from nemo_ptq.checkpoint.allowed_names import read_names
from nemo_ptq.config import (
    DTYPES,
    KV_CACHE_FORMATS,
    QUALITIES,
    ExportConfig,
    QuantizationConfig,
    Setting,
    is_algorithm_file,
    read_list,
    read_sources,
)
from nemo_ptq.errors import did_you_mean
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.export.servers import SERVERS
from nemo_ptq.models.registry import ARCHITECTURES
from nemo_ptq.quantization.algorithms import ALGORITHMS, SELECTABLE


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        rule: The condition on a value, as text to follow "must be"; {names} stands for the names.
        accepts: Whether a value is valid.
        convert: Makes a value of its text, or raises ValueError.
        known: The values that have names. Registries are read at each call, since plugins add to them.
        optional: Whether None is a value.
        names_code: Whether values are names of functions or classes.
        why_not: Says what is wrong with a text that looks like a value; None where it does not know.
        meant: Other common names of values, in lower case, and their names here.
    """

    rule: str
    accepts: Callable[[Any], bool]
    convert: Callable[[str], Any] = str
    known: Collection[str] = ()
    optional: bool = False
    names_code: bool = False
    why_not: Callable[[str], str | None] = lambda text: None
    meant: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The values that have names."""
        return tuple(self.known)

    def with_names(self, text: str) -> str:
        """Puts the names into a text, with commas between."""
        return text.replace("{names}", ", ".join(self.known))

    def read(self, text: str) -> Any:
        """Converts text from a command line into a value; text that is not valid is returned unchanged."""
        if self.optional and text.lower() in ("none", "null"):
            return None
        try:
            return self.convert(text)
        except ValueError:
            return text

    def problem(self, option: str, value: Any) -> str | None:
        """Says in one line what is wrong with an option's value, if anything is."""
        shown = repr(value) if isinstance(value, str) and not self.known else value
        if isinstance(value, str) and (reason := self.why_not(value)):
            return f"{option}={shown} is not valid: {reason}"
        if (value is None and self.optional) or self.accepts(value):
            return None
        named = {name.lower(): name for name in self.known} | dict(self.meant)
        hint = did_you_mean(value, named) if isinstance(value, str) else ""
        rule = self.with_names(self.rule)
        if hint:
            return f"{option}={shown} is not known{hint} It must be {rule}"
        return f"{option}={shown} is not valid: it must be {rule}"


def _truth(text: str) -> bool:
    values = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
    if text.lower() not in values:
        raise ValueError
    return values[text.lower()]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and bool(str(value)) and _is_text(str(value))


def _is_text(value: Any) -> bool:
    """Whether a value is text that files can hold: path bytes that are not UTF-8 cannot be written into JSON."""
    return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)


def _names_code(value: Any) -> bool:
    try:
        return _is_text(value) and bool(read_names(value))
    except ValueError:
        return False


def _are_formats(value: Any) -> bool:
    names = read_list(value)
    return bool(names) and FORMATS.keys() >= set(names)


def _are_sources(value: str) -> bool:
    try:
        sources = read_sources(value)
    except ValueError:
        return False
    return all(source.is_file or source.is_on_hub or source.name in DATASETS for source in sources)


def _are_algorithms(value: Any) -> bool:
    names = read_list(value)
    return bool(names) and ALGORITHMS.keys() >= set(names)


def _why_no_sources(value: str) -> str | None:
    """What is wrong with the settings or the name of a data set."""
    try:
        sources = read_sources(value)
    except ValueError as error:
        return str(error) if value.strip(" ;") else None
    return next(filter(None, (_why_no_path(source.name) for source in sources)), None)


def _why_no_path(value: str) -> str | None:
    """What is wrong with a path, judged by its text alone."""
    if "://" in value:
        return "it is an address, and must be a path on this machine"
    try:
        Path(value).expanduser()
    except RuntimeError:
        return f"there is no home directory {value.partition('/')[0]}: write the whole path"
    return None


def _are_patterns(value: Any) -> bool:
    names = read_list([str(name) for name in value] if isinstance(value, list) else value)
    return bool(names) and all(_is_text(name) and name for name in names)


def _one_of(known: Collection[str]) -> Kind:
    return Kind("one of {names}", lambda value: _is_text(value) and value in known, known=known)


_FORMATS = {
    **dict.fromkeys(("tensorrt", "tensorrt_llm", "tensorrt-llm", "qnemo"), "trtllm"),
    **dict.fromkeys(("huggingface", "hugging_face", "safetensors"), "hf"),
    **dict.fromkeys(("megatron_lm", "megatron-lm", "mcore"), "megatron"),
}
_KINDS: Mapping[str, Kind] = {
    "size": Kind("a whole number of at least 1", lambda value: _is_whole(value) and value >= 1, int),
    "count": Kind("a whole number of at least 0", lambda value: _is_whole(value) and value >= 0, int),
    "fraction": Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1, float),
    "bits": Kind("a number from 1 to below 16", lambda value: _is_number(value) and 1 <= value < 16, float),
    "switch": Kind("true or false", lambda value: isinstance(value, bool), _truth),
    "path": Kind("a path, in UTF-8", _is_path, why_not=_why_no_path),
    "text": Kind("a text, in UTF-8", _is_text),
    "device": Kind("the name of a device, such as H100 or CPU", lambda value: _is_text(value) and bool(value)),
    "function": Kind("a function, which only Python can give", callable),
    "names": Kind("dotted names with commas between, such as my_models.MyConfig", _names_code, names_code=True),
    "algorithm": Kind(
        "one of {names}, the path of a JSON or YAML file with a ModelOpt config, or the name of a ModelOpt recipe",
        lambda value: _is_text(value) and (value in SELECTABLE or is_algorithm_file(value)),
        known=SELECTABLE.keys(),
        why_not=_why_no_path,
        meant={"smoothquant": "int8_sq", "int8_smoothquant": "int8_sq", "awq": "int4_awq", "none": "no_quant"},
    ),
    "quality": _one_of(QUALITIES),
    "KV cache format": _one_of(KV_CACHE_FORMATS),
    "data set": Kind(
        "one of {names}, OWNER/NAME[:SPLIT][,column=COLUMN][,config=CONFIG] on the Hugging Face hub, or the path of a "
        "local .jsonl, .json, .txt or .parquet file; or several with semicolons between, each with ,weight=WEIGHT",
        lambda value: _is_text(value) and _are_sources(value),
        known=DATASETS.keys(),
        why_not=_why_no_sources,
    ),
    "formats": Kind(
        "one of {names}, or a list of them such as [trtllm,hf]", _are_formats, known=FORMATS.keys(), meant=_FORMATS
    ),
    "algorithms": Kind("a list of {names}, such as [fp8,nvfp4]", _are_algorithms, known=ALGORITHMS.keys()),
    # NeMo's own configuration allows the number 16.
    "data type": Kind("one of bf16, fp16", lambda value: str(value) in DTYPES, known=DTYPES.keys()),
    "patterns": Kind("a pattern or a list of them, such as [*down_proj*,0,last1]", _are_patterns),
    "decoder": replace(
        _one_of(ARCHITECTURES.keys()), meant=dict.fromkeys(("mistral", "mixtral", "codellama"), "llama")
    ),
    "server": _one_of(SERVERS.keys()),
}


@dataclass(frozen=True)
class Option:
    """An option.

    Attributes:
        kind: The values that it takes.
        help: Its purpose; {names} stands for the kind's names.
        default: Its value where the user gives none.
        flags: Its flags in :mod:`nemo_ptq.script`; messages use the first.
        off_flags: Flags that set it to false, where `flags` set it to true.
    """

    kind: Kind
    help: str
    default: Any = None
    flags: tuple[str, ...] = ()
    off_flags: tuple[str, ...] = ()

    @property
    def is_switch(self) -> bool:
        """Whether its flags have no value."""
        return self.kind.convert is _truth

    def describe(self) -> str:
        """Its purpose, with its default in parentheses."""
        text = self.kind.with_names(self.help)
        return text if self.default is None else f"{text} ({_shown(self.default)})"


def _shown(default: Any) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


def _task_option(kind: str, help: str, *flags: str, default: Any = None) -> Option:
    return Option(replace(_KINDS[kind], optional=default is None), help, default, flags)


def _options_of(config: type) -> Mapping[str, Option]:
    hints = get_type_hints(config)
    options = {}
    for declared in fields(config):
        setting: Setting = declared.metadata["setting"]
        kind = replace(_KINDS[setting.kind], optional=type(None) in get_args(hints[declared.name]))
        default = None if declared.default is MISSING else declared.default
        options[declared.name] = Option(kind, setting.help, default, setting.flags, setting.off_flags)
    return options


TASK_OPTIONS: Mapping[str, Option] = {
    "nemo_checkpoint": _task_option(
        "path",
        "directory of a NeMo 2.0 checkpoint, a Hugging Face model, or a Megatron checkpoint; required",
        "--nemo_checkpoint",
        "-nc",
        "--model_path",
        "-mp",
    ),
    "model_path": _task_option("path", "another name for nemo_checkpoint"),
    "adapter": _task_option("path", "LoRA adapter of NeMo's or PEFT's, merged into the weights", "--adapter"),
    "calibration_tp": _task_option(
        "size", "tensor parallelism of the calibration", "--calibration_tp", "-ctp", "--calib_tp", default=1
    ),
    "calibration_pp": _task_option(
        "size", "pipeline parallelism of the calibration", "--calibration_pp", "-cpp", "--calib_pp", default=1
    ),
    "calibration_ep": _task_option(
        "size", "expert parallelism of the calibration", "--calibration_ep", "-cep", default=1
    ),
    "num_layers_in_first_pipeline_stage": _task_option(
        "size", "layers of the first stage, if stages are uneven", "--num_layers_in_first_pipeline_stage"
    ),
    "num_layers_in_last_pipeline_stage": _task_option(
        "size", "layers of the last stage, if stages are uneven", "--num_layers_in_last_pipeline_stage"
    ),
    "devices": _task_option("size", "processes on each node, to be checked against the launcher's", "--devices"),
    "num_nodes": _task_option("size", "nodes, to be checked against the launcher's", "--num_nodes", "-nodes"),
    "forward_loop": _task_option("function", "calibration loop of your own, from Python"),
    "tokenizer_path": _task_option("path", "tokenizer to use in place of the checkpoint's", "--tokenizer"),
    "calibration_state": _task_option(
        "path", "export, or its ptq/calibration.safetensors, to export again from", "--calibration_state"
    ),
    "tracking": _task_option(
        "text", "where figures go: mlflow:http://HOST:PORT, tensorboard:DIR or wandb:PROJECT", "--tracking"
    ),
    "legacy_ckpt": _task_option(
        "switch",
        "accept a checkpoint that another version of Transformer Engine has written",
        "--legacy_ckpt",
        default=False,
    ),
    "trust_checkpoint": _task_option(
        "names",
        "dotted names of functions and classes of your own that the checkpoint may use, beside NeMo's",
        "--trust_checkpoint",
    ),
    "plan_only": _task_option(
        "switch", "print what the job would need, and start nothing", "--plan_only", default=False
    ),
    "plan_device": _task_option(
        "device",
        "device that plan_only plans for, as `nemo-ptq plan --device`",
        "--plan_device",
        default="H100",
    ),
}
QUANTIZATION_OPTIONS: Mapping[str, Option] = _options_of(QuantizationConfig)
EXPORT_OPTIONS: Mapping[str, Option] = _options_of(ExportConfig)
OPTIONS: Mapping[str, Option] = {
    **TASK_OPTIONS,
    **{f"quantization_config.{name}": option for name, option in QUANTIZATION_OPTIONS.items()},
    **{f"export_config.{name}": option for name, option in EXPORT_OPTIONS.items()},
}


def below(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values whose option begins with a prefix, by the rest of its name.

    Example:
        >>> below("export_config.", {"calibration_tp": 2, "export_config.path": "OUT"})
        {'path': 'OUT'}
    """
    return {option.removeprefix(prefix): value for option, value in values.items() if option.startswith(prefix)}


def describe_options() -> str:
    """Lists all options for a help text, in lines that fit a terminal."""
    lines = []
    for name, option in OPTIONS.items():
        lines += wrap(f"{name}: {option.describe()}", 74, initial_indent="  ", subsequent_indent="      ")
    return "\n".join(lines)
