# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What the tests of the Hugging Face formats share: exports of tiny models, and transformers as their client."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_ptq.config import NO_QUANT, QuantizationConfig
from nemo_ptq.quantization.algorithms import algorithm_of
from tests.families import TOKENS as VOCABULARY

TOKENS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))


def export_cells(
    checkpoint: Path, format: str, algorithms: Sequence[str], kv_cache: bool, tp: int, directory: Path
) -> dict[str, torch.Tensor]:
    """Calibrates and exports a model with several algorithms, each to ``directory / algorithm``, on this rank.

    Returns:
        For each algorithm that is calibrated the float32 logits of the model that was exported, as a server would
        compute them.
    """
    from tests import steps

    found = {}
    for algorithm in algorithms:
        quantization = QuantizationConfig(algorithm, sq_alpha=0.5, enable_kv_cache=kv_cache and algorithm != NO_QUANT)
        job = steps.job_of(checkpoint, quantization, directory / algorithm, (tp, 1), formats=format)
        steps.run_job(job)
        if job.quantization.algorithm_name != NO_QUANT and not algorithm_of(job.quantization).needs_data:
            continue
        with steps.loaded(checkpoint, tp) as model:
            steps.calibrate(model, quantization)
            adapted = _adapted(model, format, job.decoder)
            norms = [module for module in adapted.module.modules() if hasattr(module, "zero_centered_gamma")]
            gains = [norm.weight.clone() for norm in norms]
            if format == "compressed_tensors" and algorithm == "int4_awq":
                _round_scales(adapted)
            steps.serve(adapted, algorithm)
            for norm, gain in zip(norms, gains, strict=True):  # stored as Megatron keeps them
                norm.weight.data = gain.float()
            if format == "compressed_tensors" and adapted.calibration is not None:
                _fold(adapted)
            logits = steps.logits(adapted, TOKENS)
            assert logits is not None
            found[algorithm] = logits
    return found


def _adapted(model: Any, format: str, decoder: str) -> Any:
    """A model that ModelOpt has calibrated, as a format can hold it: loaded and quantized again where that differs."""
    from nemo_ptq.export.formats import FORMATS
    from nemo_ptq.modelopt.transfer import apply_state
    from nemo_ptq.models.spec import spec_of
    from nemo_ptq.quantization.algorithms import amax_floor
    from nemo_ptq.quantization.state import CalibrationState
    from tests import steps

    if model.calibration is None or not FORMATS[format].adapts_state:
        return model
    header, tensors = model.calibration.header, model.calibration.tensors
    shape, floor = spec_of(model.config, model.vocab_size), amax_floor(header.quantization, decoder)
    adapted = CalibrationState(header, FORMATS[format].adapt(tensors, shape, floor))
    again = steps.load_model(model.checkpoint, steps.CPU)
    apply_state(again.module, adapted)
    again.calibration = adapted
    return again


def _round_scales(model: Any) -> None:
    """Gives a model in INT4 the scales that the format stores, in bfloat16 after they are folded."""
    from megatron.core import parallel_state

    from nemo_ptq.export.folding import row_factor
    from nemo_ptq.modelopt.megatron_layers import global_modules
    from nemo_ptq.models.spec import spec_of
    from tests import steps

    steps.in_float32(model)
    rank, ranks = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    shape = spec_of(model.config, model.vocab_size)
    for name, module in global_modules(model.module).items():
        if ".linear_" in name:
            quantizer = module.weight_quantizer
            scale = quantizer.export_amax().float() / 7.0
            factor = row_factor(name, model.calibration.tensors, shape, rank, ranks)
            factor = torch.ones(1) if factor is None else factor[:, None]
            quantizer.amax = ((scale * factor).bfloat16().float() / factor * 7.0).reshape(quantizer.amax.shape)


def _fold(model: Any) -> None:
    """Turns what a server of a qnemo directory computes into what one of a folded directory does.

    Gains and biases are rounded once they are folded, other scales are exact, and those of a KV cache may be small.
    """
    from megatron.core import parallel_state

    from nemo_ptq.export.folding import follower_of, norm_factor, row_factor
    from nemo_ptq.export.packing import pack_plain
    from nemo_ptq.modelopt.megatron_layers import global_modules
    from nemo_ptq.models.spec import spec_of
    from tests.steps import plain_of, quantizes_kv_cache

    state = model.calibration.tensors
    modules = global_modules(model.module)
    shape = spec_of(model.config, model.vocab_size)
    rank, ranks = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    for module in modules.values():
        scale = getattr(module, "exact_pre_quant_scale", None)
        if scale is not None:
            module.input_quantizer.pre_quant_scale = scale
    for name, module in modules.items():
        factor = norm_factor(name, state, shape)
        if factor is not None:
            folded = pack_plain(plain_of(module), torch.bfloat16, factor)
            module.weight.data = folded["", "weight"].float()
            if ("", "bias") in folded:
                module.bias.data = folded["", "bias"].float()
            modules[str(follower_of(name, shape))].input_quantizer.pre_quant_scale = torch.ones_like(factor)
        rows = row_factor(name, state, shape, rank, ranks)
        if rows is not None and module.bias is not None:
            module.bias.data = (module.bias.float() * rows).bfloat16().float() / rows
        if name.endswith("core_attention") and quantizes_kv_cache(module):
            for kind in ("k", "v"):
                amax = state[f"{name}.{kind}_bmm_quantizer.amax"].float()
                quantizer = getattr(module, f"{kind}_bmm_quantizer")
                quantizer.amax = amax.reshape(quantizer.amax.shape)


def transformers_logits(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, dict[str, Any]]:
    """Loads a directory with transformers, generates a few tokens, and returns float32 logits and load report."""
    import transformers

    # torch's fused attention has no cap, and transformers leaves it out there.
    is_capped = "attn_logit_softcapping" in json.loads((directory / "config.json").read_text())
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        output_loading_info=True,
        attn_implementation="eager" if is_capped else None,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokens = tokenizer("The quick brown fox", return_tensors="pt").input_ids
    generated = model.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert generated.shape[1] == tokens.shape[1] + 3
    with torch.no_grad():
        return model(TOKENS).logits.float(), {kind: names for kind, names in report.items() if names}


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Median over tokens of the relative distance of logits, over the vocabulary that both have."""
    size = min(found.shape[-1], expected.shape[-1])
    found, expected = found[..., :size], expected[..., :size]
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())
