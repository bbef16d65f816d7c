# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""From our algorithm names to what the installed ModelOpt wants, and to a calibrated model.

This is the only module that knows ModelOpt's configuration format, which has changed twice; see
https://nvidia.github.io/Model-Optimizer/ for its current form.
"""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import yaml
from megatron.core.models.gpt import GPTModel
from modelopt.torch.quantization.config import QuantizeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.utils.core_utils import is_quantized_linear

from nemo_ptq.calibration.awq import calibrate_awq
from nemo_ptq.config import QuantizationConfig
from nemo_ptq.errors import PtqError
from nemo_ptq.export.packing import scheme_of
from nemo_ptq.quiet import quiet_prints

_PRESETS = {
    "fp8": mtq.FP8_DEFAULT_CFG,
    "int8_sq": mtq.INT8_SMOOTHQUANT_CFG,
    "int4_awq": mtq.INT4_AWQ_CFG,
    "w4a8_awq": mtq.W4A8_AWQ_BETA_CFG,
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
}
_KV_CACHE_PRESETS = {"fp8": mtq.FP8_KV_CFG}
# Squared ReLU leaves many channels nearly unused in a short calibration: activation ranges of decoder "gpt" are kept
# above one hundredth of the format's largest value, as NVIDIA's own tool does.
_GPT_AMAX_FLOOR = {"fp8": 0.01 * 448.0, "int8_sq": 0.01 * 127.0}
# Coarse search: finer exponents overflow in TensorRT-LLM's kernels for these decoders.
_COARSE_W4A8_DECODERS = ("gemma",)
# The calibration methods that give layers a pre-quantization scale, by which ModelOpt tells formats apart.
_SMOOTHING_METHODS = ("smoothquant", "awq_lite", "awq_clip", "awq_full")

ForwardLoop = Callable[[GPTModel], None]


def modelopt_config(quantization: QuantizationConfig, decoder: str) -> dict[str, Any]:
    """Returns the ModelOpt configuration of a job, as a fresh copy that shares nothing with ModelOpt's presets.

    Args:
        quantization: What the user asked for; ``algorithm`` is one of our names or the path of a ModelOpt
            configuration in JSON or YAML.
        decoder: Decoder type of the model, e.g. "llama".
    """
    algorithm = quantization.algorithm
    assert algorithm is not None
    preset = _PRESETS.get(algorithm)
    config = _read_modelopt_config(Path(algorithm)) if preset is None else copy.deepcopy(preset)
    if algorithm in ("int4_awq", "w4a8_awq"):
        _set_awq_block_size(config, quantization.awq_block_size)
        coarse = algorithm == "w4a8_awq" and decoder in _COARSE_W4A8_DECODERS
        config["algorithm"] = {"method": "awq_lite", "alpha_step": 1.0 if coarse else 0.1}
    if algorithm == "int8_sq":
        config["algorithm"] = {"method": "smoothquant", "alpha": quantization.sq_alpha}
    if quantization.kv_cache_is_quantized(decoder):
        config["quant_cfg"] += copy.deepcopy(_KV_CACHE_PRESETS[quantization.kv_cache_qformat]["quant_cfg"])
    return config


def _set_awq_block_size(config: dict[str, Any], block_size: int) -> None:
    for entry in config["quant_cfg"]:
        if entry["quantizer_name"] == "*weight_quantizer":
            stages = entry["cfg"] if isinstance(entry["cfg"], list) else [entry["cfg"]]
            stages[0]["block_sizes"][-1] = block_size


def _read_modelopt_config(path: Path) -> dict[str, Any]:
    """Reads a user's own ModelOpt configuration.

    ModelOpt's block sizes have whole numbers as keys, which JSON lacks, and its numbers of bits may be a tuple, which
    YAML lacks too.
    """

    def restore(node: Any, key: Any = None) -> Any:
        if isinstance(node, dict):
            return {_whole_number(name): restore(value, name) for name, value in node.items()}
        if isinstance(node, list):
            items = [restore(item) for item in node]
            return tuple(items) if key == "num_bits" else items
        return node

    text = path.read_text(encoding="utf-8")
    config = restore(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text))
    if not isinstance(config, dict) or "quant_cfg" not in config:
        raise PtqError(f"algorithm={path}: a ModelOpt configuration is a mapping with quant_cfg and algorithm")
    if isinstance(config["quant_cfg"], dict) and "default" in config["quant_cfg"]:
        # ModelOpt's former format: its catch-all came before the others, wherever it was written.
        config["quant_cfg"] = {"default": config["quant_cfg"].pop("default"), **config["quant_cfg"]}
    try:
        config["quant_cfg"] = QuantizeConfig(**config).quant_cfg
    except (TypeError, ValueError) as error:
        raise PtqError(f"algorithm={path}: not a ModelOpt configuration: {' '.join(str(error).split())}") from error
    return config


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


def calibrate(
    module: GPTModel,
    quantization: QuantizationConfig,
    decoder: str,
    forward_loop: ForwardLoop,
) -> None:
    """Inserts ModelOpt's quantizers into a model and calibrates them, in place.

    AWQ is searched by :mod:`nemo_ptq.calibration.awq`; everything else is ModelOpt's own
    calibration.

    Args:
        module: This rank's part of the model, unquantized.
        quantization: What the user asked for.
        decoder: Decoder type of the model.
        forward_loop: Runs the calibration data through the module it is given.

    Raises:
        PtqError: If a user's own configuration cannot be read, or quantizes a layer as no export can hold it; no data
            has been run by then.
    """
    config = modelopt_config(quantization, decoder)
    with quiet_prints():
        mtq.quantize(module, {**config, "algorithm": None})
    method = config.get("algorithm")
    options: dict[str, Any] = method if isinstance(method, dict) else {"method": method}
    if options["method"] not in _SMOOTHING_METHODS:
        for linear in filter(is_quantized_linear, module.modules()):
            scheme_of(linear)
    if options["method"] == "awq_lite":
        calibrate_awq(module, forward_loop, alpha_step=options.get("alpha_step", 0.1))
    else:
        mtq.calibrate(module, method, _without_weights(forward_loop))
    floor = _GPT_AMAX_FLOOR.get(quantization.algorithm or "")
    if decoder == "gpt" and floor is not None:
        mtq.postprocess_amax(module, "*input_quantizer", lambda amax: amax.clamp(min=floor))
