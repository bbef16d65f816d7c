# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A ModelOpt configuration of the user's own, as data: ModelOpt itself takes many seconds to import.

ModelOpt looks closer once the job runs; here is found what would be another model, or no configuration at all.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ptq.errors import PtqError
from nemo_ptq.untrusted import read_json, read_yaml

_WANTED = "an object of patterns and what they set, or a list of objects with quantizer_name and cfg or enable"


@dataclass(frozen=True)
class QuantizerEntry:
    """What a configuration sets of some quantizers.

    Attributes:
        pattern: Which ones, by their names in Megatron's model; `*` of a whole model or of a class of modules.
        turns_off: Whether it turns them off.
    """

    pattern: str
    turns_off: bool


def read_entries(file: Path) -> Sequence[QuantizerEntry]:
    """Reads what a configuration sets, in either of ModelOpt's forms.

    Raises:
        FileError: If the file cannot be read.
        PtqError: If it is not a configuration; the message follows the file's name.
    """
    content = read_json(file) if file.suffix.lower() == ".json" else read_yaml(file)
    if not isinstance(content, dict) or "quant_cfg" not in content:
        raise PtqError('it must hold an object with the keys "quant_cfg" and "algorithm"')
    entries = content["quant_cfg"]
    if not isinstance(entries, dict | list) or not entries:
        raise PtqError(f"its quant_cfg is {_shown(entries)}, and must be {_WANTED}")
    return [entry for pair in _pairs(entries) for entry in _entries(*pair)]


def _pairs(entries: Mapping[Any, Any] | Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    if isinstance(entries, Mapping):
        yield from entries.items()
        return
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise PtqError(f"its quant_cfg has the entry {_shown(entry)}, and must be {_WANTED}")
        yield from [(entry["quantizer_name"], entry)] if "quantizer_name" in entry else entry.items()


def _entries(pattern: Any, value: Any) -> Iterator[QuantizerEntry]:
    if not isinstance(pattern, str):
        raise PtqError(f"its quant_cfg has the pattern {_shown(pattern)}, which must be a text")
    if pattern.startswith("nn.") and isinstance(value, Mapping):  # a class of modules, and patterns of its own
        for name, inner in value.items():
            yield from _entries(name, inner)
        return
    if not isinstance(value, Mapping | list):
        raise PtqError(f"its quant_cfg has {_shown(value)} for {pattern}, which must be an object such as num_bits: 8")
    enable = value.get("enable", True) if isinstance(value, Mapping) else True
    if not isinstance(enable, bool):
        raise PtqError(f"its quant_cfg has enable {_shown(enable)} for {pattern}, which must be true or false")
    yield QuantizerEntry("*" if pattern == "default" else pattern, not enable)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
