# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Format "megatron": megatron-core and ModelOpt alone restore the calibrated model from it, at another parallelism."""

import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.verify.checks import verify
from nemo_ptq.verify.forward_pass import logits as reader_logits
from tests.families import TOKENS as VOCABULARY
from tests.matrix import Record, record
from tests.ranks import run_ranks

TOKENS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))
# Of logits in bfloat16, which Megatron's attention and each parallelism add up in an order of their own: that sends
# activations to other codes. The scales themselves must be equal.
MOST = {"fp8": 0.15, "int8_sq": 0.08, "int4_awq": 0.05, "w4a8_awq": 0.15}
# Families whose layers megatron-core builds without Transformer Engine; its local experts have other names.
BUILT_LOCALLY = ("llama2", "llama3", "mistral", "qwen2", "qwen3", "phi3", "starcoder", "starcoder2")


def scales_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the quantizers of a model scale with, by name."""
    ends = ("._amax", "._pre_quant_scale")
    return {name: values.float().cpu() for name, values in module.state_dict().items() if name.endswith(ends)}


def export(checkpoint: Path, algorithms: Sequence[str], directory: Path) -> dict[str, Any]:
    """Exports a model with several algorithms; returns the logits and scales that ModelOpt's own calibration gives."""
    from nemo_ptq.checkpoint.loading import load_model
    from nemo_ptq.parallel.process_groups import process_groups
    from tests import steps

    found = {}
    steps.quiet_libraries()
    for algorithm in algorithms:
        quantization = QuantizationConfig(algorithm, enable_kv_cache=False)
        steps.run_job(steps.job_of(checkpoint, quantization, directory / algorithm, formats="megatron"))
        with process_groups(steps.read_launch(), steps.CPU):
            model = load_model(checkpoint, steps.CPU)
            steps.calibrate(model, quantization)
            found[algorithm] = steps.logits(model, TOKENS), scales_of(model.module)
    return found


def as_megatron_lm_builds(arguments: Namespace, tp: int, pp: int) -> Any:
    """The model that megatron-core makes of the arguments, on the CPU and without Transformer Engine."""
    from megatron.core import parallel_state
    from megatron.core.activations import squared_relu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    activation = torch.nn.functional.silu if arguments.swiglu else torch.nn.functional.gelu
    experts: dict[str, Any] = {}
    if arguments.num_experts:
        experts = {
            "num_moe_experts": arguments.num_experts,
            "moe_ffn_hidden_size": arguments.moe_ffn_hidden_size,
            "moe_router_topk": arguments.moe_router_topk,
        }
    config = TransformerConfig(
        activation_func=squared_relu if arguments.squared_relu else activation,
        add_bias_linear=arguments.add_bias_linear,
        add_qkv_bias=arguments.add_qkv_bias,
        attention_dropout=0.0,
        bf16=True,
        ffn_hidden_size=arguments.ffn_hidden_size,
        gated_linear_unit=arguments.swiglu,
        hidden_dropout=0.0,
        hidden_size=arguments.hidden_size,
        kv_channels=arguments.kv_channels,
        layernorm_epsilon=arguments.norm_epsilon,
        layernorm_zero_centered_gamma=arguments.apply_layernorm_1p,
        masked_softmax_fusion=False,
        normalization=arguments.normalization,
        num_attention_heads=arguments.num_attention_heads,
        num_layers=arguments.num_layers,
        num_query_groups=arguments.num_query_groups,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        pipeline_model_parallel_size=pp,
        qk_layernorm=arguments.qk_layernorm,
        tensor_model_parallel_size=tp,
        use_cpu_initialization=True,
        **experts,
    )
    spec = get_gpt_layer_local_spec(
        arguments.num_experts, qk_layernorm=arguments.qk_layernorm, normalization=arguments.normalization
    )
    return GPTModel(
        config,
        spec,
        -(-arguments.padded_vocab_size // tp) * tp,
        arguments.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not arguments.untie_embeddings_and_output_weights,
        position_embedding_type=arguments.position_embedding_type,
        rotary_percent=arguments.rotary_percent,
        rotary_base=arguments.rotary_base,
        rope_scaling=arguments.use_rope_scaling,
        rope_scaling_factor=arguments.rope_scaling_factor,
        seq_len_interpolation_factor=arguments.rotary_seq_len_interpolation_factor,
    )


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """Has Megatron's attention do without two things that it takes from a GPU: its mask, and a seed for dropout."""
    from megatron.core import tensor_parallel
    from megatron.core.fusions import fused_softmax

    from nemo_ptq.parallel.attributes import replaced

    with (
        replaced(fused_softmax, "get_default_causal_mask", lambda size: torch.ones(size, size).triu(1).bool()),
        replaced(tensor_parallel, "get_cuda_rng_tracker", lambda: SimpleNamespace(fork=nullcontext)),
    ):
        yield


def restored(root: Path, tp: int, pp: int, algorithms: Sequence[str]) -> dict[str, Any]:
    """Does what Megatron-LM's load_modelopt_state and load_modelopt_checkpoint do; returns logits and scales."""
    from megatron.core import dist_checkpointing
    from modelopt.torch.opt.plugins.mcore_dist_checkpointing import restore_sharded_modelopt_state

    from nemo_ptq.parallel.process_groups import process_groups
    from tests import steps

    found = {}
    steps.quiet_libraries()
    groups = process_groups(steps.read_launch(), steps.CPU, tensor_parallel=tp, pipeline_parallel=pp)
    with groups, on_the_cpu():
        for algorithm in algorithms:
            assert (root / algorithm / "latest_checkpointed_iteration.txt").read_text() == "release"
            release = root / algorithm / "release"
            arguments = torch.load(release / "common.pt", weights_only=False)["args"]
            model = as_megatron_lm_builds(arguments, tp, pp).bfloat16()
            restore_sharded_modelopt_state([model], release)
            model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(release)), strict=False)
            whole = SimpleNamespace(module=model.eval(), vocab_size=arguments.padded_vocab_size)
            found[algorithm] = steps.logits(whole, TOKENS), scales_of(model)
    return found


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """In the median over tokens, relative to the logits' norm."""
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()


def restore(
    checkpoint: Path, algorithms: Sequence[str], layouts: Sequence[tuple[int, int]], directory: Path
) -> dict[str, float]:
    """Exports and restores a model; returns the largest distance of its logits by algorithm."""
    (exported,) = run_ranks(export, 1, checkpoint, algorithms, directory, timeout=600)
    far = dict.fromkeys(algorithms, 0.0)
    for algorithm in algorithms:
        assert [check for check in verify(directory / algorithm, load_tokenizer=True) if not check.ok] == []
        # The reader that shares nothing with the writer computes in float32.
        assert distance(reader_logits(directory / algorithm, TOKENS), exported[algorithm][0]) < MOST[algorithm]
    for tp, pp in layouts:
        ranks = run_ranks(restored, tp * pp, directory, tp, pp, algorithms, timeout=600)
        for algorithm, (logits, scales) in exported.items():
            found = [each[algorithm][1] for each in ranks]
            assert sum(map(len, found)) == tp * len(scales)
            if pp == 1:  # a later stage counts its layers from 0
                assert all(same_scales(each, scales) for each in found), (algorithm, tp, pp)
            far[algorithm] = max(far[algorithm], distance(ranks[-1][algorithm][0], logits))
            assert far[algorithm] < MOST[algorithm], (algorithm, tp, pp)
    return far


def test_megatron_restores_the_calibrated_model(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    restore(checkpoint_of("llama3"), ["fp8"], [(1, 1), (2, 1), (1, 2)], tmp_path)


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("model", BUILT_LOCALLY)
def test_of_every_family(
    model: str, checkpoint_of: Callable[[str], Path], tmp_path: Path, record_property: Record
) -> None:
    """At the tensor parallelism that wrote them, as scales of rows and blocks want."""
    for algorithm, far in restore(checkpoint_of(model), list(MOST), [(1, 1), (1, 2)], tmp_path).items():
        record(record_property, "megatron", model=model, algorithm=algorithm, distance=far)


def same_scales(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_verify_knows_what_is_missing(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    run_ranks(export, 1, checkpoint_of("llama3"), ["fp8"], tmp_path, timeout=600)
    release = tmp_path / "fp8" / "release"
    (release / "modelopt_state" / "common.pt").unlink()
    shutil.rmtree(release / "tokenizer")
    failed = {check.name: check.detail for check in verify(tmp_path / "fp8") if not check.ok}
    assert failed.keys() >= {"files", "modelopt_state"}
    assert failed["modelopt_state"].startswith("release/modelopt_state/common.pt is missing")
