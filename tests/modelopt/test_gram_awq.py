# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""AWQ on a model with ModelOpt's quantizers decides what the block pipeline does."""

from collections.abc import Callable
from pathlib import Path

import torch

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.errors import PtqError
from tests.ranks import run_ranks


def calibrate_output_layer(checkpoint: Path) -> str:
    import modelopt.torch.quantization as mtq

    from nemo_ptq.modelopt.gram_awq import calibrate_awq
    from nemo_ptq.modelopt.quantizers import modelopt_config
    from tests import steps

    config = modelopt_config(QuantizationConfig("int4_awq"), "llama")
    entries = [entry for entry in config["quant_cfg"] if "output_layer" not in entry["quantizer_name"]]
    entries = [entry for entry in entries if "lm_head" not in entry["quantizer_name"]]
    with steps.loaded(checkpoint) as model:
        mtq.quantize(model.module, {"quant_cfg": entries, "algorithm": None})
        try:
            calibrate_awq(model.module, lambda _: None)
        except PtqError as error:
            return str(error)
    return "calibrated"


def test_output_layer_is_refused(checkpoint_of: Callable[[str], Path]) -> None:
    (message,) = run_ranks(calibrate_output_layer, 1, checkpoint_of("llama2"))
    assert "disable those of output_layer" in message


def quantizers_off(checkpoint: Path) -> tuple[bool, bool, bool]:
    """Whether weights are rounded before, within and after ``unquantized``."""
    from nemo_ptq.modelopt.gram_awq import unquantized
    from tests import steps

    with steps.loaded(checkpoint) as model:
        steps.calibrate(model, QuantizationConfig("fp8"))
        linear = model.module.decoder.layers[0].mlp.linear_fc1

        def is_rounded() -> bool:
            return not torch.equal(linear.weight_quantizer(linear.weight), linear.weight)

        before = is_rounded()
        with unquantized(model.module):
            within = is_rounded()
        return before, within, is_rounded()


def test_quantizers_are_off_for_a_while(checkpoint_of: Callable[[str], Path]) -> None:
    assert run_ranks(quantizers_off, 1, checkpoint_of("llama2")) == [(True, False, True)]
