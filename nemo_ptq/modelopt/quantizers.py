# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""From our algorithm names to what the installed ModelOpt wants, and to a calibrated model.

This is the only module that knows ModelOpt's configuration format, which has changed twice; see
https://nvidia.github.io/Model-Optimizer/ for its current form.
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
from megatron.core.models.gpt import GPTModel
from modelopt.torch.quantization.config import QuantizeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.utils.core_utils import is_quantized_linear

import nemo_ptq.modelopt.attention  # noqa: F401  (ModelOpt must know it before it inserts quantizers)
from nemo_ptq.config import QuantizationConfig
from nemo_ptq.console.quiet import quiet_prints
from nemo_ptq.errors import PtqError
from nemo_ptq.modelopt.gram_awq import calibrate_awq
from nemo_ptq.modelopt.megatron_layers import global_modules, scheme_of
from nemo_ptq.modelopt.smoothing import modelopt_keeps_scales
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.quantization.algorithms import amax_floor, kv_cache_is_quantized
from nemo_ptq.quantization.modelopt_file import read_config
from nemo_ptq.quantization.modelopt_layers import quantized_by
from nemo_ptq.quantization.presets import kv_cache_config, preset_config

# The calibration methods that give layers a pre-quantization scale, by which ModelOpt tells formats apart.
_SMOOTHING_METHODS = ("smoothquant", "awq_lite", "awq_clip", "awq_full")

ForwardLoop = Callable[[GPTModel], None]


def modelopt_config(quantization: QuantizationConfig, decoder: str, model: ModelSpec | None = None) -> dict[str, Any]:
    """Returns the ModelOpt configuration of a job.

    Args:
        quantization: The user's settings; ``algorithm`` is one of our names, or that of a file with a ModelOpt
            configuration or recipe.
        decoder: Decoder type of the model, e.g. "llama".
        model: The model, whose layers a file may call by Hugging Face's names.

    Raises:
        PtqError: If the file is none that ModelOpt takes.
    """
    file = quantization.algorithm_file
    if file is None:
        return _from_json(preset_config(quantization, decoder))
    config = _read_modelopt_config(file, model)
    if kv_cache_is_quantized(quantization, decoder):
        config["quant_cfg"] += _from_json(kv_cache_config(quantization.kv_cache_qformat))
    return config


def _read_modelopt_config(path: Path, model: ModelSpec | None) -> dict[str, Any]:
    """Reads a user's own ModelOpt configuration."""
    try:
        read = read_config(path)
        further = () if model is None else quantized_by(read, model).further
        config = _from_json({**read.content})
        if isinstance(config["quant_cfg"], dict) and "default" in config["quant_cfg"]:
            # ModelOpt's former format: its catch-all came before the others, wherever it was written.
            config["quant_cfg"] = {"default": config["quant_cfg"].pop("default"), **config["quant_cfg"]}
        config["quant_cfg"] = QuantizeConfig(**config).quant_cfg
        # By ModelOpt's class, since an older one takes what stands in the file only.
        config["quant_cfg"] += QuantizeConfig(quant_cfg=_from_json(list(further))).quant_cfg if further else []
    except (PtqError, TypeError, ValueError) as error:
        raise PtqError(f"algorithm={path}: not a ModelOpt configuration: {' '.join(str(error).split())}") from error
    return config


def _from_json(node: Any, key: Any = None) -> Any:
    """Makes a ModelOpt configuration of what was read from JSON or YAML.

    Its block sizes have whole numbers as keys, which JSON lacks, and its numbers of bits may be a tuple, which YAML
    lacks too.
    """
    if isinstance(node, dict):
        return {_whole_number(name): _from_json(value, name) for name, value in node.items()}
    if isinstance(node, list):
        items = [_from_json(item) for item in node]
        return tuple(items) if key in ("num_bits", "scale_bits") else items
    return node


def as_json(config: Any) -> Any:
    """Returns a ModelOpt configuration in what JSON can hold; :func:`insert_quantizers` takes it back."""
    if hasattr(config, "model_dump"):
        return as_json(config.model_dump(exclude_unset=True))
    if isinstance(config, dict):
        return {str(key): as_json(value) for key, value in config.items()}
    return [as_json(item) for item in config] if isinstance(config, (list, tuple)) else config


def _whole_number(key: Any) -> Any:
    return int(key) if isinstance(key, str) and re.fullmatch(r"-?\d+", key) else key


def _without_weights(forward_loop: ForwardLoop) -> ForwardLoop:
    """Keeps ModelOpt from ranging every weight again with each batch: it has done so before the first."""

    def loop(module: GPTModel) -> None:
        for name, quantizer in module.named_modules():
            if isinstance(quantizer, TensorQuantizer) and "weight_quantizer" in name:
                quantizer.disable_calib()
        forward_loop(module)

    return loop


def _method(config: Mapping[str, Any]) -> Any:
    algorithm = config.get("algorithm")
    return algorithm.get("method") if isinstance(algorithm, Mapping) else algorithm


def insert_quantizers(module: GPTModel, config: Mapping[str, Any]) -> None:
    """Inserts ModelOpt's quantizers into a model, without calibrating them.

    Args:
        module: This rank's part of the model, unquantized.
        config: ModelOpt's configuration, from :func:`modelopt_config` or through :func:`as_json`.
    """
    with quiet_prints():
        mtq.quantize(module, {**_from_json(dict(config)), "algorithm": None})


def leave_alone(module: GPTModel, linears: Collection[str]) -> None:
    """Turns the quantizers of some linear layers off for good.

    Args:
        module: This rank's part of the model, with quantizers.
        linears: The layers' names in the whole model.
    """
    for name, child in global_modules(module).items():
        if name in linears:
            for quantizer in child.modules():
                if isinstance(quantizer, TensorQuantizer):
                    quantizer.disable()


def compute_weight_amax(module: GPTModel, config: Mapping[str, Any]) -> None:
    """Computes weight amaxes of a model with quantizers as its calibration would; activations are left as they are."""
    if _method(config) is None:
        return
    for quantizer in module.modules():
        if isinstance(quantizer, TensorQuantizer) and quantizer._calibrator is not None:
            # A restored one still holds the largest of the ones that ModelOpt has run through to find amaxes' shapes.
            quantizer._calibrator.reset()
    mtq.calibrate(module, "max", None)


def calibrate(
    module: GPTModel,
    quantization: QuantizationConfig,
    decoder: str,
    forward_loop: ForwardLoop,
    unquantized: Collection[str] = (),
    check: Callable[[Collection[str]], None] = lambda schemes: None,
    model: ModelSpec | None = None,
) -> None:
    """Inserts ModelOpt's quantizers into a model and calibrates them, in place.

    AWQ is searched by :mod:`nemo_ptq.calibration.awq`; everything else is ModelOpt's own
    calibration.

    Args:
        module: This rank's part of the model, unquantized.
        quantization: The user's settings.
        decoder: Decoder type of the model.
        forward_loop: Runs the calibration data through the module it is given.
        unquantized: Linear layers that are left alone, by their names in the whole model.
        check: Refuses the schemes of the linear layers, by their names, before any data is run.
        model: As for :func:`modelopt_config`.

    Raises:
        PtqError: If a user's own configuration cannot be read, or quantizes a layer as no export can hold it; no data
            has been run by then.
    """
    config = modelopt_config(quantization, decoder, model)
    insert_quantizers(module, config)
    leave_alone(module, unquantized)
    linears = [linear for linear in module.modules() if is_quantized_linear(linear)]
    if _method(config) not in _SMOOTHING_METHODS:
        formats = {scheme_of(linear).modelopt_format for linear in linears}
        check({format for format in formats if format is not None})  # None of layers that are left alone
    elif _method(config) == "smoothquant" and linears:  # whose layers look like others until they are smoothed
        check({"int8_sq"})
    if _method(config) == "awq_lite":
        options = config["algorithm"]
        calibrate_awq(module, forward_loop, options.get("alpha_step", 0.1) if isinstance(options, dict) else 0.1)
    else:
        with modelopt_keeps_scales(), quiet_prints() as aloud:
            mtq.calibrate(module, config.get("algorithm"), aloud(_without_weights(forward_loop)))
    floor = amax_floor(quantization, decoder)
    if floor is not None:
        mtq.postprocess_amax(module, "*input_quantizer", lambda amax: amax.clamp(min=floor))
