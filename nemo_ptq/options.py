# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Every option of the main job: its full name, and which values it takes. All front doors read this one table."""

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_ptq.calibration.text_files import is_text_file
from nemo_ptq.config import ALGORITHM_FILES, ALGORITHMS, DATASETS, DTYPES, EXPORT_FORMATS, KV_CACHE_FORMATS
from nemo_ptq.families import ARCHITECTURES


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Returns ": did you mean X?" for the known name closest to `name`, or nothing where none is close."""
    matches = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f": did you mean {matches[0]}?" if matches else ""


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
        hint = nearest_name(value, self.names) if isinstance(value, str) else ""
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


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and bool(str(value))


def _one_of(names: Iterable[str], optional: bool = False) -> Kind:
    names = tuple(names)
    return Kind(f"one of {', '.join(names)}", lambda value: value in names, names=names, optional=optional)


_SIZE = Kind(
    "a whole number of at least 1", lambda value: _is_number(value) and isinstance(value, int) and value >= 1, int
)
_OPTIONAL_SIZE = Kind(_SIZE.words, _SIZE.accepts, int, optional=True)
_FRACTION = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1, float)
_FLAG = Kind("true or false", lambda value: isinstance(value, bool), _flag)
_OPTIONAL_FLAG = Kind(_FLAG.words, _FLAG.accepts, _flag, optional=True)
_PATH = Kind("a path", _is_path)
_OPTIONAL_PATH = Kind(_PATH.words, _PATH.accepts, optional=True)
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
# NeMo's own configuration allows the number 16.
_DTYPE = Kind("one of bf16, fp16", lambda value: str(value) in DTYPES, names=tuple(DTYPES))

TASK_OPTIONS: Mapping[str, Kind] = {
    "nemo_checkpoint": _OPTIONAL_PATH,
    "model_path": _OPTIONAL_PATH,
    "calibration_tp": _SIZE,
    "calibration_pp": _SIZE,
    "calibration_ep": _SIZE,
    "num_layers_in_first_pipeline_stage": _OPTIONAL_SIZE,
    "num_layers_in_last_pipeline_stage": _OPTIONAL_SIZE,
    "devices": _OPTIONAL_SIZE,
    "num_nodes": _OPTIONAL_SIZE,
    "forward_loop": _FUNCTION,
    "tokenizer_path": _OPTIONAL_PATH,
    "legacy_ckpt": _FLAG,
}
QUANTIZATION_OPTIONS: Mapping[str, Kind] = {
    "algorithm": _ALGORITHM,
    "awq_block_size": _SIZE,
    "sq_alpha": _FRACTION,
    "enable_kv_cache": _OPTIONAL_FLAG,
    "kv_cache_qformat": _one_of(KV_CACHE_FORMATS),
    "calibration_dataset": _DATA,
    "calibration_dataset_size": _SIZE,
    "calibration_batch_size": _SIZE,
    "calibration_seq_len": _SIZE,
}
EXPORT_OPTIONS: Mapping[str, Kind] = {
    "path": _PATH,
    "export_format": _one_of(EXPORT_FORMATS),
    "dtype": _DTYPE,
    "decoder_type": _one_of(ARCHITECTURES, optional=True),
    "inference_tp": _SIZE,
    "inference_pp": _SIZE,
    "generate_sample": _FLAG,
    "overwrite": _FLAG,
}
OPTIONS: Mapping[str, Kind] = {
    **TASK_OPTIONS,
    **{f"quantization_config.{name}": kind for name, kind in QUANTIZATION_OPTIONS.items()},
    **{f"export_config.{name}": kind for name, kind in EXPORT_OPTIONS.items()},
}
