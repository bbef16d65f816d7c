# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Every option of the main job: its full name, and which values it takes. All front doors read this one table."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import Any

from nemo_ptq.config import ALGORITHM_FILES, ALGORITHMS, DATASETS, DTYPES, KV_CACHE_FORMATS, is_text_file, read_formats
from nemo_ptq.errors import did_you_mean
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.models.registry import ARCHITECTURES


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        words: What a value must be, to follow "must be".
        accepts: Whether a value is one.
        convert: Makes a value of its text, or raises ValueError.
        names: The values that have names.
        optional: Whether None is a value.
    """

    words: str
    accepts: Callable[[Any], bool]
    convert: Callable[[str], Any] = str
    names: tuple[str, ...] = ()
    optional: bool = False

    def read(self, text: str) -> Any:
        """Makes a value of what stood on a command line; text that is no such value stays as it is."""
        if self.optional and text.lower() in ("none", "null"):
            return None
        try:
            return self.convert(text)
        except ValueError:
            return text

    def problem(self, option: str, value: Any) -> str | None:
        """Says in one line what is wrong with an option's value, if anything is."""
        if (value is None and self.optional) or self.accepts(value):
            return None
        shown = repr(value) if isinstance(value, str) and not self.names else value
        hint = did_you_mean(value, self.names) if isinstance(value, str) else ""
        if hint:
            return f"{option}={shown} is not known{hint} It must be {self.words}"
        return f"{option}={shown} is not valid: it must be {self.words}"


def _flag(text: str) -> bool:
    values = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
    if text.lower() not in values:
        raise ValueError
    return values[text.lower()]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and bool(str(value))


def _one_of(names: Iterable[str], optional: bool = False) -> Kind:
    names = tuple(names)
    return Kind(f"one of {', '.join(names)}", lambda value: value in names, names=names, optional=optional)


_SIZE = Kind("a whole number of at least 1", lambda value: _is_whole(value) and value >= 1, int)
_COUNT = Kind("a whole number of at least 0", lambda value: _is_whole(value) and value >= 0, int)
_OPTIONAL_SIZE = replace(_SIZE, optional=True)
_FRACTION = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1, float)
_FLAG = Kind("true or false", lambda value: isinstance(value, bool), _flag)
_OPTIONAL_FLAG = replace(_FLAG, optional=True)
_PATH = Kind("a path", _is_path)
_OPTIONAL_PATH = replace(_PATH, optional=True)
_OPTIONAL_TEXT = Kind("a text", lambda value: isinstance(value, str), optional=True)
_DEVICE = Kind("the name of a device, such as H100 or CPU", lambda value: isinstance(value, str) and bool(value))
_FUNCTION = Kind("a function, which only Python can give", callable, optional=True)
_ALGORITHM = Kind(
    f"one of {', '.join(ALGORITHMS)}, or the path of a JSON or YAML file with a ModelOpt config",
    lambda value: value in ALGORITHMS or (isinstance(value, str) and value.lower().endswith(ALGORITHM_FILES)),
    names=ALGORITHMS,
    optional=True,
)
_DATA = Kind(
    f"{' or '.join(DATASETS)}, or the path of a local .jsonl, .json or .txt file",
    lambda value: value in DATASETS or (isinstance(value, str) and is_text_file(value)),
    names=DATASETS,
)
_FORMATS = Kind(
    f"one of {', '.join(FORMATS)}, or a list of them such as [{','.join(FORMATS)}]",
    lambda value: bool(read_formats(value)) and FORMATS.keys() >= set(read_formats(value)),
    names=tuple(FORMATS),
)
# NeMo's own configuration allows the number 16.
_DTYPE = Kind("one of bf16, fp16", lambda value: str(value) in DTYPES, names=tuple(DTYPES))


@dataclass(frozen=True)
class Option:
    """An option.

    Attributes:
        kind: The values that it takes.
        help: What it is for.
        default: Its value where the user gives none.
    """

    kind: Kind
    help: str
    default: Any = None

    def describe(self) -> str:
        """What it is for, and its default in parentheses."""
        return self.help if self.default is None else f"{self.help} ({str(self.default).lower()})"


TASK_OPTIONS: Mapping[str, Option] = {
    "nemo_checkpoint": Option(
        _OPTIONAL_PATH, "directory of a NeMo 2.0 checkpoint, or of a Hugging Face model; required"
    ),
    "model_path": Option(_OPTIONAL_PATH, "another name for nemo_checkpoint"),
    "calibration_tp": Option(_SIZE, "tensor parallelism of the calibration", 1),
    "calibration_pp": Option(_SIZE, "pipeline parallelism of the calibration", 1),
    "calibration_ep": Option(_SIZE, "expert parallelism of the calibration", 1),
    "num_layers_in_first_pipeline_stage": Option(_OPTIONAL_SIZE, "layers of the first stage, if stages are uneven"),
    "num_layers_in_last_pipeline_stage": Option(_OPTIONAL_SIZE, "layers of the last stage, if stages are uneven"),
    "devices": Option(_OPTIONAL_SIZE, "processes on each node, to be checked against the launcher's"),
    "num_nodes": Option(_OPTIONAL_SIZE, "nodes, to be checked against the launcher's"),
    "forward_loop": Option(_FUNCTION, "calibration loop of your own, from Python"),
    "tokenizer_path": Option(_OPTIONAL_PATH, "tokenizer to use in place of the checkpoint's"),
    "calibration_state": Option(_OPTIONAL_PATH, "export, or its ptq/calibration.safetensors, to export again from"),
    "tracking": Option(_OPTIONAL_TEXT, "where figures go: mlflow:http://HOST:PORT, tensorboard:DIR or wandb:PROJECT"),
    "legacy_ckpt": Option(_FLAG, "accept a checkpoint of another Transformer Engine", False),
    "plan_only": Option(_FLAG, "print what the job would need, and start nothing", False),
    "plan_device": Option(_DEVICE, "what plan_only takes each rank to run on, as `nemo-ptq plan --device`", "H100"),
}
QUANTIZATION_OPTIONS: Mapping[str, Option] = {
    "algorithm": Option(
        _ALGORITHM, f"{', '.join(ALGORITHMS)}, or a JSON or YAML file with a ModelOpt config", ALGORITHMS[0]
    ),
    "awq_block_size": Option(_SIZE, "input features that share a weight scale in AWQ", 128),
    "sq_alpha": Option(_FRACTION, "SmoothQuant's migration strength, from 0 to 1", 0.5),
    "enable_kv_cache": Option(_OPTIONAL_FLAG, "quantize the KV cache; if not set, fp8 does except on decoder gpt"),
    "kv_cache_qformat": Option(_one_of(KV_CACHE_FORMATS), "format of a quantized KV cache", KV_CACHE_FORMATS[0]),
    "calibration_dataset": Option(_DATA, f"{', '.join(DATASETS)}, or a local .jsonl, .json or .txt file", DATASETS[0]),
    "calibration_dataset_size": Option(_SIZE, "samples to calibrate on", 512),
    "calibration_batch_size": Option(_SIZE, "samples in a batch", 64),
    "calibration_seq_len": Option(_SIZE, "tokens at which a sample is cut", 128),
    "evaluation_dataset_size": Option(
        _COUNT, "further samples on which the report compares with the unquantized model; 0 for none", 8
    ),
    "layerwise": Option(
        _OPTIONAL_FLAG, "keep one block of weights in memory at a time; if not set, where the weights do not fit"
    ),
}
EXPORT_OPTIONS: Mapping[str, Option] = {
    "path": Option(_PATH, "directory to make; required"),
    "export_format": Option(_FORMATS, f"{', '.join(FORMATS)}, or a list of them", next(iter(FORMATS))),
    "dtype": Option(_DTYPE, "data type of what stays unquantized: bf16 or fp16", "bf16"),
    "decoder_type": Option(
        _one_of(ARCHITECTURES, optional=True), f"{', '.join(ARCHITECTURES)}; if not set, that of the model's family"
    ),
    "inference_tp": Option(_SIZE, "tensor parallelism of the exported model", 1),
    "inference_pp": Option(_SIZE, "pipeline parallelism of the exported model", 1),
    "generate_sample": Option(_FLAG, "show a few generated tokens after calibration", False),
    "overwrite": Option(_FLAG, "replace an export that stands at export_config.path", False),
    "resume": Option(_FLAG, "continue a run that was killed or has failed, after its last finished block", False),
}
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
