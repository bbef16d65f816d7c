# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A calibration state's description of itself: how it was made, and from which model. Needs no torch."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nemo_ptq.config import FAST, QuantizationConfig
from nemo_ptq.errors import ConfigError
from nemo_ptq.home import without_home
from nemo_ptq.untrusted import FileError, check_regular, parse_json

IN_EXPORT = Path("ptq/calibration.safetensors")
"""Where an exported directory keeps the state that it was made from."""
WEIGHTS_IN_EXPORT = IN_EXPORT.with_suffix(".weights.safetensors")
"""Where it keeps the rounded weights of quality "balanced"."""
# One entry of the file's free-form header, because safetensors keeps several in no particular order.
_KEY = "nemo_ptq.calibration_state"
_VERSION = 1
# Settings of how a job proceeds, which do not change the state.
_NOT_OF_THE_STATE = ("layerwise",)
# Settings that the first states did not have; states leave them out at their defaults.
_NEWER = {"quality": FAST, "exclude": None, "kv_cache_only": False, "effective_bits": None, "candidates": None}
# Algorithms of ModelOpt whose weight amaxes are the largest magnitudes of the smoothed weight.
_RANGES_FOLLOW = (None, "max", "smoothquant", "awq_lite")


@dataclass(frozen=True)
class StateHeader:
    """How a calibration state was made.

    Attributes:
        checkpoint: Path of the checkpoint, as it was when the state was made.
        weights: Fingerprint of the unquantized weights, from :func:`nemo_ptq.quantization.state.fingerprint`.
        model: The model, from the checkpoint's files: fields of
            :class:`~nemo_ptq.models.spec.ModelSpec`.
        decoder: TensorRT-LLM's decoder type.
        quantization: The user's configuration.
        modelopt_config: ModelOpt's configuration, in JSON types.
        producer: Versions of the packages that took part.
        choice: Name of the algorithm of each linear layer, by Megatron's name of it, where one was chosen for each.
        adapter: Path of the LoRA adapter that was merged into the checkpoint's weights; None for none.
    """

    checkpoint: str
    weights: str
    model: Mapping[str, Any]
    decoder: str
    quantization: QuantizationConfig
    modelopt_config: Mapping[str, Any]
    producer: Mapping[str, str]
    choice: Mapping[str, str] = field(default_factory=dict)
    adapter: str | None = None

    @property
    def method(self) -> Any:
        """Name of ModelOpt's calibration algorithm; None where nothing is calibrated."""
        algorithm = self.modelopt_config.get("algorithm")
        return algorithm.get("method") if isinstance(algorithm, dict) else algorithm

    @property
    def is_repeatable(self) -> bool:
        """Whether the weight amaxes follow from the weights and the pre-quantization scales, without data."""
        return self.method in _RANGES_FOLLOW

    def to_metadata(self) -> dict[str, str]:
        """Returns the free-form header of the safetensors file."""
        content = without_home({"version": _VERSION, **asdict(self)})
        if self.adapter is None:
            content.pop("adapter")
        quantization = content["quantization"]
        for name in _NOT_OF_THE_STATE:
            quantization.pop(name)
        quantization["sq_alpha"] = self.quantization.fixed_alpha
        for name, default in _NEWER.items():
            if quantization[name] == default:
                quantization.pop(name)
        if not self.choice:
            del content["choice"]
        return {_KEY: json.dumps(content)}


def _with_home(content: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes :func:`~nemo_ptq.home.without_home`, of texts that are not nested."""
    return {name: os.path.expanduser(value) if isinstance(value, str) else value for name, value in content.items()}


def state_file(path: str | os.PathLike[str]) -> Path:
    """Returns the state's file, for a file or for an exported directory that holds one.

    Where an export has a subdirectory for each format, all of them hold the same.
    """
    given = Path(os.path.expanduser(path))
    if not given.is_dir():
        return given
    below = sorted(given.glob(f"*/{IN_EXPORT}"))
    return below[0] if below and not (given / IN_EXPORT).exists() else given / IN_EXPORT


def weights_file(state: Path) -> Path:
    """Returns the file of the rounded weights that belong to a calibration state of quality "balanced"."""
    return state.with_suffix(".weights.safetensors")


def _check_types(content: Mapping[str, Any]) -> None:
    """Raises if an entry of a header has an impossible value: much is looked up in these."""
    defaults = asdict(QuantizationConfig())
    expected: dict[str, type] = {
        **dict.fromkeys(("checkpoint", "weights", "decoder"), str),
        **dict.fromkeys(("model", "quantization", "modelopt_config", "producer"), dict),
    }
    found: list[tuple[str, Any, type]] = [(name, content[name], kind) for name, kind in expected.items()]
    found += [
        (f"quantization.{name}", value, type(defaults[name]))
        for name, value in content["quantization"].items()
        if defaults.get(name) is not None
    ]
    for name, value, kind in found:
        if not isinstance(value, kind):
            raise TypeError(f"its {name} is of type {type(value).__name__}, not {kind.__name__}")


def read_header(path: Path) -> StateHeader:
    """Reads the header of a calibration state.

    Args:
        path: The safetensors file.

    Raises:
        ConfigError: If it is not a calibration state, or one of another version of the format.
    """
    name = f"calibration_state={path}"
    try:
        with safe_open(check_regular(path), framework="numpy") as file:
            text = (file.metadata() or {}).get(_KEY)
    except (OSError, SafetensorError, FileError) as error:
        reason = error.reason if isinstance(error, FileError) else str(error).partition("\n")[0]
        reason = reason.removeprefix("cannot be read: ")
        raise ConfigError(
            [f"{name} cannot be read ({reason}): give an export that was calibrated, or its {IN_EXPORT}"]
        ) from error
    if text is None:
        raise ConfigError([f"{name} holds no calibration state: give an export, or its {IN_EXPORT}"])
    try:
        content = parse_json(text, finite=False)
        version = content.pop("version", None)
        if version != _VERSION:
            raise TypeError(f"version {version} of the format, not {_VERSION}")
        choice = content.setdefault("choice", {})
        if not isinstance(choice, dict) or not all(isinstance(name, str) for name in choice.values()):
            raise TypeError("its choice is no object of names")
        _check_types(content)
        content["quantization"] = QuantizationConfig(**{"quality": FAST, **_with_home(content["quantization"])})
        return StateHeader(**_with_home(content))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ConfigError([f"{name} is of another nemo_ptq ({error}): use that one, or calibrate again"]) from error
