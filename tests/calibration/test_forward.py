# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A forward pass over ranks is the forward pass of one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ptq.config import QuantizationConfig
from tests.ranks import run_ranks


def all_logits(checkpoint: Path, tp: int, pp: int) -> list[torch.Tensor | None]:
    """The logits of batches of several sizes, whole on the last stage."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from nemo_ptq.calibration.forward import forward_batches
    from tests import steps

    with steps.loaded(checkpoint, tp, pp) as model:
        outputs = list(forward_batches(model.module, steps.random_batches()))
        if outputs[0] is None:
            return outputs
        whole = [gather_from_tensor_model_parallel_region(output) for output in outputs]
        return [logits[..., : model.vocab_size].float() for logits in whole]


@pytest.fixture(scope="module")
def alone(checkpoint_of: Callable[[str], Path]) -> list[torch.Tensor]:
    return run_ranks(all_logits, 1, checkpoint_of("llama2"), 1, 1)[0]


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 1), (2, 2)])
def test_logits_do_not_depend_on_parallelism(
    tp: int, pp: int, alone: list[torch.Tensor], checkpoint_of: Callable[[str], Path]
) -> None:
    ranks = run_ranks(all_logits, tp * pp, checkpoint_of("llama2"), tp, pp)
    for first_stages in ranks[: -tp or None] if pp > 1 else []:
        assert first_stages == [None] * len(alone)
    for last_stage in ranks[-tp:]:
        for found, expected in zip(last_stage, alone, strict=True):
            if tp == 1:
                assert torch.equal(found, expected)
            # Sums of two ranks are rounded to bfloat16 once more; errors of that size pass through two layers.
            assert (found - expected).norm() < 2**-6 * expected.norm()


def lazy_batches(checkpoint: Path) -> list[str]:
    """What happens in which order when batches come from a generator."""
    from nemo_ptq.calibration.forward import forward_batches
    from tests import steps

    events: list[str] = []

    def batches() -> Iterator[torch.Tensor]:
        for index in range(2):
            events.append(f"read {index}")
            yield torch.ones(1, 4, dtype=torch.int64)

    with steps.loaded(checkpoint) as model:
        for index, _ in enumerate(forward_batches(model.module, batches())):
            events.append(f"computed {index}")
    return events


def test_batches_are_read_one_by_one(checkpoint_of: Callable[[str], Path]) -> None:
    assert run_ranks(lazy_batches, 1, checkpoint_of("llama2")) == [["read 0", "computed 0", "read 1", "computed 1"]]


def count_output_layers(checkpoint: Path, quantize_output: bool, pp: int) -> tuple[int, int, bool]:
    """How often calibration passes the first layer and the output layer, and whether the model has its logits again."""
    import modelopt.torch.quantization as mtq

    from nemo_ptq.calibration.forward import forward_batches, run_batches
    from nemo_ptq.modelopt.quantizers import modelopt_config
    from tests import steps

    calls = {"layer": 0, "output_layer": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    with steps.loaded(checkpoint, pp=pp) as model:
        module = model.module
        if quantize_output:
            config = modelopt_config(QuantizationConfig("fp8"), "llama")
            config["quant_cfg"].append({"quantizer_name": "*output_layer.input_quantizer", "enable": True})
            mtq.quantize(module, {**config, "algorithm": None})
        module.decoder.layers[0].register_forward_hook(count("layer"))
        if hasattr(module, "output_layer"):
            module.output_layer.register_forward_hook(count("output_layer"))
        batches = steps.random_batches()
        assert list(run_batches(module, batches)) == [None] * len(batches)
        during = dict(calls)
        (logits,) = forward_batches(module, batches[:1])
        return during["layer"], during["output_layer"], logits is not None and logits.shape[-1] > 256


@pytest.mark.parametrize("quantize_output", [False, True])
@pytest.mark.parametrize("pp", [1, 2])
def test_calibration_computes_logits_only_where_they_are_calibrated(
    quantize_output: bool, pp: int, checkpoint_of: Callable[[str], Path]
) -> None:
    *first_stages, last_stage = run_ranks(count_output_layers, pp, checkpoint_of("llama2"), quantize_output, pp)
    assert first_stages == [(5, 0, False)] * (pp - 1)
    assert last_stage == (5, 5 if quantize_output else 0, True)


def fail_in_calibration(checkpoint: Path) -> bool:
    from nemo_ptq.calibration.forward import run_batches
    from tests import steps

    with steps.loaded(checkpoint) as model:
        running = run_batches(model.module, steps.random_batches())
        next(running)
        running.close()
        return model.module.post_process


def test_a_loop_that_is_left_early_leaves_the_model_whole(checkpoint_of: Callable[[str], Path]) -> None:
    assert run_ranks(fail_in_calibration, 1, checkpoint_of("llama2")) == [True]
