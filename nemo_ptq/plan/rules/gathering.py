# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The values that rules check: the options that are of the right kind, and the files' descriptions of themselves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from nemo_ptq.checkpoint.allowed_names import AllowedNames, read_names
from nemo_ptq.checkpoint.metadata import is_nemo, read_metadata, read_model
from nemo_ptq.config import BALANCED, FAST, NO_QUANT, ExportConfig, QuantizationConfig, read_list
from nemo_ptq.errors import ConfigError, PtqError
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.models.registry import Family, family_of
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.options import EXPORT_OPTIONS, QUANTIZATION_OPTIONS, TASK_OPTIONS, Option
from nemo_ptq.plan.quality import obstacle_to_balanced
from nemo_ptq.quantization.algorithms import algorithm_of
from nemo_ptq.quantization.excluded import unquantized_layers
from nemo_ptq.quantization.state_entries import read_entries
from nemo_ptq.quantization.state_header import read_header, state_file

T = TypeVar("T")


@dataclass(frozen=True)
class Gathered:
    """The values that rules check.

    Attributes:
        values: The options that are of the right kind, and the files' descriptions of themselves, by the names of the
            rules' parameters.
        problems: One line for each option that is of the wrong kind, and for each file that cannot be read.
        quantization: How to quantize: the user's configuration, or that of the saved calibration.
        state: The file of the saved calibration, if one is used.
        fast_because: Why the quality is "fast", where the user leaves it open and it is.
    """

    values: Mapping[str, Any]
    problems: Sequence[str]
    quantization: QuantizationConfig
    state: Path | None
    fast_because: str | None = None


def gather(arguments: Mapping[str, Any], world_size: int | None, launcher: str | None = None) -> Gathered:
    """Collects the values that rules check.

    Args:
        arguments: Those of :func:`nemo_ptq.task.ptq` that were given.
        world_size: Processes that run the job, or will; None where that is not known.
        launcher: What starts them, as for :func:`~nemo_ptq.plan.rules.check_job`.

    Raises:
        TypeError: If the task has no such argument.
    """
    unknown = arguments.keys() - {*TASK_OPTIONS, "quantization_config", "export_config"}
    if unknown:
        raise TypeError(f"the task has no argument {', '.join(sorted(unknown))}")
    task = {name: arguments.get(name, option.default) for name, option in TASK_OPTIONS.items()}
    quantization, export = arguments.get("quantization_config"), arguments.get("export_config")
    quantization = QuantizationConfig() if quantization is None else quantization
    problems: list[str] = []
    values = {"world_size": world_size, "launcher": launcher, **_sound("", TASK_OPTIONS, task, problems)}
    named = task["nemo_checkpoint"] or task["model_path"]
    state = _saved_calibration(values["calibration_state"], named) if "calibration_state" in values else None
    header = None if state is None else _read(read_header, state, problems)
    if state is not None and header is not None:
        values["header"] = header
        values["state"] = state
        if (entries := _read(read_entries, state, problems)) is not None:
            values["entries"] = entries
        if isinstance(quantization, QuantizationConfig):
            problems.extend(_other_quantization(quantization, header.quantization))
            quantization = header.quantization
    values |= _sound_quantization(quantization, problems)
    values |= _sound_export(export, problems)
    checkpoint = named or (header.checkpoint if header else None)
    if values.get("adapter", "") is None and header is not None and named in (None, header.checkpoint):
        values["adapter"] = header.adapter
    if {"nemo_checkpoint", "model_path"} <= values.keys() and checkpoint is not None:
        values["checkpoint"] = checkpoint
        model = _read(read_metadata, Path(checkpoint).expanduser(), problems)
        if model is not None:
            values["model"] = model
            if "trust_checkpoint" in values and is_nemo(Path(checkpoint).expanduser()):
                allowed = AllowedNames(read_names(values["trust_checkpoint"]))
                _read(partial(read_model, allowed=allowed), Path(checkpoint).expanduser(), problems)
    if header is not None or ("model" in values and values["model"].is_quantized):
        # A model that is calibrated already needs no data.
        for name in ("calibration_dataset", "calibration_seq_len"):
            values.pop(name, None)
    fast_because = None
    if isinstance(quantization, QuantizationConfig) and quantization.quality is None:
        quantization, fast_because = with_quality(quantization, values)
        values["quality"] = quantization.quality
    return Gathered(values, problems, quantization, state, fast_because)


def with_quality(quantization: QuantizationConfig, values: Mapping[str, Any]) -> tuple[QuantizationConfig, str | None]:
    """Returns the configuration with an unset quality filled in, and the reason where that is "fast".

    Args:
        quantization: The user's configuration, with the quality unset.
        values: By the names of the rules' parameters; where some are missing, other rules say so.
    """
    wanted = signature(obstacle_to_balanced).parameters
    values = with_derived({"kv_cache_only": quantization.kv_cache_only, **values})
    if not wanted.keys() <= values.keys() or not FORMATS.keys() >= set(values["formats"]):
        return quantization, None
    obstacle = obstacle_to_balanced(**{name: values[name] for name in wanted})
    if obstacle is None:
        return replace(quantization, quality=BALANCED), None
    quantizes = quantization.algorithm_name != NO_QUANT
    return replace(quantization, quality=FAST), obstacle[0] if quantizes else None


def _read(reader: Callable[[Path], T], path: Path, problems: list[str]) -> T | None:
    """Reads a file, and adds its problem, if any, to the problems."""
    try:
        return reader(path)
    except ConfigError as error:
        problems.extend(error.problems)
        return None


def _sound_quantization(quantization: object, problems: list[str]) -> dict[str, Any]:
    if not isinstance(quantization, QuantizationConfig):
        problems.append(f"quantization_config={quantization!r} is not valid: it must be a QuantizationConfig")
        return {}
    return _sound("quantization_config.", QUANTIZATION_OPTIONS, _shallow(quantization), problems)


def _sound_export(export: object, problems: list[str]) -> dict[str, Any]:
    if not isinstance(export, ExportConfig | None):
        problems.append(f"export_config={export!r} is not valid: it must be an ExportConfig")
        return {}
    given = {} if export is None else _shallow(export)
    if given.get("path") is None:
        problems.append("export_config.path is missing: name the directory to make")
        given.pop("path", None)
    return _sound("export_config.", EXPORT_OPTIONS, given, problems)


def _sound(prefix: str, options: Mapping[str, Option], given: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Returns the values that are of the right kind, and adds a problem for each of the others."""
    found = {name: options[name].kind.problem(prefix + name, value) for name, value in given.items()}
    problems.extend(problem for problem in found.values() if problem)
    return {name: given[name] for name, problem in found.items() if problem is None}


def _shallow(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(config)}


def _saved_calibration(calibration_state: Any, checkpoint: Any) -> Path | None:
    """The file of the calibration that the user gives, or that lies in a checkpoint with quantizers (format "nemo")."""
    if calibration_state is not None:
        return state_file(calibration_state).absolute()
    if checkpoint is not None and (Path(checkpoint).expanduser() / "weights" / "modelopt_state").is_dir():
        state = state_file(checkpoint).absolute()
        return state if state.is_file() else None
    return None


def _other_quantization(given: QuantizationConfig, used: QuantizationConfig) -> Iterator[str]:
    """Settings of the user's that differ from those of the saved calibration; defaults ask for nothing."""
    default = QuantizationConfig()
    for field in fields(given):
        value, made_with = getattr(given, field.name), getattr(used, field.name)
        if value not in (getattr(default, field.name), made_with):
            yield (
                f"quantization_config.{field.name}={value} with a calibration_state that was made with {made_with}: "
                "leave it out, or calibrate without calibration_state"
            )


def family_of_model(model: ModelSpec, decoder_type: str | None) -> Family:
    """Finds the family that a model is exported as: one with a decoder type.

    Raises:
        PtqError: If it has none, and the user gave none.
    """
    return family_of(model.config_class.rpartition(".")[2], decoder_type)


def with_derived(values: Mapping[str, Any]) -> dict[str, Any]:
    """Adds values that several rules would otherwise each derive for themselves.

    Args:
        values: By the names of the rules' parameters.

    Returns:
        The same with `formats`, the names of the export formats, `family`, the model's
        :class:`~nemo_ptq.models.registry.Family`, `decoder`, its decoder type, and `unquantized`, the linear layers
        that are left out of the quantization, each where the values that it follows from are there.
    """
    derived: dict[str, Any] = {}
    if "export_format" in values:
        derived["formats"] = read_list(values["export_format"])
    if {"model", "decoder_type"} <= values.keys():
        with suppress(PtqError):  # a rule says so
            derived["family"] = family_of_model(values["model"], values["decoder_type"])
            derived["decoder"] = derived["family"].decoder
    if "algorithm" in values and _quantizes_without_data(values["algorithm"]):
        derived["calibration_dataset_size"] = 0
        values = {name: value for name, value in values.items() if name != "calibration_seq_len"}
    if {"model", "exclude", "kv_cache_only"} <= values.keys():
        with suppress(PtqError):  # a rule says so
            quantization = QuantizationConfig(exclude=values["exclude"], kv_cache_only=values["kv_cache_only"])
            derived["unquantized"] = unquantized_layers(quantization, values["model"])
    return {**values, **derived}


def _quantizes_without_data(name: str | None) -> bool:
    algorithm = algorithm_of(QuantizationConfig(name))
    return algorithm.quantizes and not algorithm.needs_data
