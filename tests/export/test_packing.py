# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What is packed of one module: dtypes and shapes as the format has them, rows in its order, values that come back."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from nemo_ptq.config import NO_QUANT, QuantizationConfig
from nemo_ptq.verify import dequantize as dq
from tests.packed import Heads, fields_of, rows_of, weight_problem
from tests.ranks import run_ranks

GROUP = 128
HEADS = Heads(per_group=2, size=32)

# dtype and shape of each field, from out-features, in-features and block size; None is the dtype of the export.
Table = dict[str, tuple[torch.dtype | None, Callable[[int, int], tuple[int, ...]]]]
FORMATS: dict[str, Table] = {
    "no_quant": {"weight": (None, lambda o, i: (o, i))},
    "fp8": {
        "weight": (torch.float8_e4m3fn, lambda o, i: (o, i)),
        "weights_scaling_factor": (torch.float32, lambda o, i: (1,)),
        "activation_scaling_factor": (torch.float32, lambda o, i: (1,)),
    },
    "int8_sq": {
        "weight": (torch.int8, lambda o, i: (o, i)),
        "weights_scaling_factor": (torch.float32, lambda o, i: (o,)),
        "activation_scaling_factor": (torch.float32, lambda o, i: (1,)),
        "prequant_scaling_factor": (None, lambda o, i: (i,)),
    },
    "int4_awq": {
        "weight": (torch.int8, lambda o, i: (o // 2, i)),
        "weights_scaling_factor": (torch.float32, lambda o, i: (o, i // GROUP)),
        "prequant_scaling_factor": (None, lambda o, i: (i,)),
    },
    "w4a8_awq": {
        "weight": (torch.int8, lambda o, i: (o // 2, i)),
        "weights_scaling_factor": (torch.float32, lambda o, i: (o, i // GROUP)),
        "weights_scaling_factor_2": (torch.float32, lambda o, i: (1,)),
        "activation_scaling_factor": (torch.float32, lambda o, i: (1,)),
        "prequant_scaling_factor": (None, lambda o, i: (i,)),
    },
    "nvfp4": {
        "weight": (torch.uint8, lambda o, i: (o, i // 2)),
        "weights_scaling_factor": (torch.float8_e4m3fn, lambda o, i: (o, i // 16)),
        "weights_scaling_factor_2": (torch.float32, lambda o, i: ()),
        "activation_scaling_factor": (torch.float32, lambda o, i: ()),
    },
}


@dataclass
class PackedLinear:
    """A linear layer of a calibrated model.

    Attributes:
        packed: Its tensors by (group of rows, field).
        exact: float32 (out, in) in Megatron's order of rows: the weight before it is rounded.
        weight: float32 (out, in): the weight that the calibrated model multiplies with.
        bias: float32 (out,) in Megatron's order of rows, or None.
    """

    packed: dict[tuple[str, str], torch.Tensor]
    exact: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


def pack_layer(checkpoint: Path, algorithm: str, file: Path) -> None:
    """Calibrates a model, packs the linear layers of its second layer, and saves them (FP8 tensors do not pickle)."""
    from nemo_ptq.export.packing import pack_linear, row_splitter
    from nemo_ptq.modelopt.megatron_layers import linear_of
    from nemo_ptq.models.spec import spec_of
    from tests import steps

    with steps.loaded(checkpoint) as model:
        steps.calibrate(model, QuantizationConfig(algorithm, awq_block_size=GROUP, enable_kv_cache=False))
        shape = spec_of(model.config, model.vocab_size)
        layers = {}
        for name, linear in model.module.decoder.layers[1].named_modules():
            if not name.endswith(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")):
                continue
            packed = pack_linear(linear_of(linear), row_splitter(f"decoder.layers.1.{name}", shape), torch.bfloat16)
            exact = weight = linear.weight.float()
            if algorithm == "nvfp4":  # ModelOpt simulates this one on GPUs only
                weight = dq.fake_quantize_nvfp4(weight, packed["", "weights_scaling_factor_2"])
            elif algorithm != NO_QUANT:
                weight = linear.weight_quantizer(weight)
            bias = None if linear.bias is None else linear.bias.float()
            layers[name.rpartition(".")[2]] = PackedLinear(packed, exact, weight, bias)
        torch.save(layers, file)


@pytest.fixture(scope="module")
def packed(
    checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], dict[str, PackedLinear]]:
    """Packs a layer of a model once."""
    directory = tmp_path_factory.mktemp("packed")

    @cache
    def pack(model: str, algorithm: str) -> dict[str, PackedLinear]:
        file = directory / f"{model}-{algorithm}.pt"
        run_ranks(pack_layer, 1, checkpoint_of(model), algorithm, file)
        return torch.load(file, weights_only=False)

    return pack


@pytest.mark.parametrize("model", ["llama2", "gpt"])
@pytest.mark.parametrize("algorithm", FORMATS)
def test_fields_are_those_of_the_format(
    model: str, algorithm: str, packed: Callable[[str, str], dict[str, PackedLinear]]
) -> None:
    layers = packed(model, algorithm)
    assert layers.keys() == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    for name, layer in layers.items():
        inputs = layer.weight.shape[1]
        for rows, whole in rows_of(name, layer.weight, HEADS, gated=model == "llama2").items():
            expected = {
                field: (dtype or torch.bfloat16, shape(len(whole), inputs))
                for field, (dtype, shape) in FORMATS[algorithm].items()
            }
            if model == "gpt":
                expected["bias"] = (torch.bfloat16, (len(whole),))
            found = {
                field: (tensor.dtype, tuple(tensor.shape)) for field, tensor in fields_of(layer.packed, rows).items()
            }
            assert found == expected


@pytest.mark.parametrize("model", ["llama2", "gpt"])
@pytest.mark.parametrize("algorithm", FORMATS)
def test_packed_weights_come_back(
    model: str, algorithm: str, packed: Callable[[str, str], dict[str, PackedLinear]]
) -> None:
    for name, layer in packed(model, algorithm).items():
        for rows, simulated in rows_of(name, layer.weight, HEADS, gated=model == "llama2").items():
            exact = rows_of(name, layer.exact, HEADS, gated=model == "llama2")[rows]
            problem = weight_problem(algorithm, fields_of(layer.packed, rows), simulated, exact)
            assert problem is None, (name, rows)


def test_bias_rows_follow_the_weight(packed: Callable[[str, str], dict[str, PackedLinear]]) -> None:
    for name, layer in packed("gpt", "fp8").items():
        assert layer.bias is not None
        for rows, expected in rows_of(name, layer.bias, HEADS, gated=False).items():
            assert torch.equal(layer.packed[rows, "bias"].float(), expected)


Split = tuple[torch.Tensor, int, int]


def split_rows(cases: list[Split]) -> list[list[dict[str, torch.Tensor]]]:
    """Splits whole projections, and shards of three rows."""
    from nemo_ptq.export.packing import split_qkv

    return [
        [
            split_qkv(tensor, heads, size),
            *(split_qkv(rows, heads, size, 3 * index) for index, rows in enumerate(tensor.split(3))),
        ]
        for tensor, heads, size in cases
    ]


def test_queries_keys_and_values_are_separated() -> None:
    shapes = [(1, 1, 2, ()), (1, 4, 3, (5,)), (2, 1, 4, (2, 3)), (3, 2, 1, (4,)), (4, 5, 6, ())]
    cases = []
    for groups, heads, size, rest in shapes:
        rows = groups * (heads + 2) * size
        width = torch.Size(rest).numel()
        cases.append((torch.arange(rows * width).reshape(rows, *rest), heads, size))
    (found,) = run_ranks(split_rows, 1, cases)
    for (tensor, heads, size), (split, *shards) in zip(cases, found, strict=True):
        expected: dict[str, list[torch.Tensor]] = {"q": [], "k": [], "v": []}
        for row in range(len(tensor)):
            head = row // size % (heads + 2)
            expected["q" if head < heads else "k" if head == heads else "v"].append(tensor[row])
        for kind, rows in expected.items():
            assert torch.equal(split[kind], torch.stack(rows))
            assert torch.equal(torch.cat([shard[kind] for shard in shards]), torch.stack(rows))


def pack_known_weight(checkpoint: Path, weight: torch.Tensor) -> torch.Tensor:
    """Packs whole numbers as INT4, with a scale of one."""
    from nemo_ptq.export.packing import all_rows, pack_linear
    from nemo_ptq.modelopt.megatron_layers import linear_of
    from tests import steps

    with steps.loaded(checkpoint) as model:
        steps.calibrate(model, QuantizationConfig("int4_awq", enable_kv_cache=False))
        linear = model.module.decoder.layers[0].self_attention.linear_proj
        linear.weight.data.copy_(weight)
        linear.weight_quantizer._amax.fill_(7.0)
        return pack_linear(linear_of(linear), all_rows, torch.bfloat16)["", "weight"]


def test_low_nibble_is_the_even_row(checkpoint_of: Callable[[str], Path]) -> None:
    weight = torch.randint(-8, 8, (256, 256), generator=torch.Generator().manual_seed(0))
    (packed,) = run_ranks(pack_known_weight, 1, checkpoint_of("llama2"), weight)
    even, odd = weight[0::2] & 0xF, weight[1::2] & 0xF
    assert torch.equal(packed.view(torch.uint8), (even | odd << 4).to(torch.uint8))


def pack_norm(checkpoint: Path) -> tuple[torch.Tensor, torch.Tensor]:
    from nemo_ptq.export.packing import pack_parameters
    from tests import steps

    with steps.loaded(checkpoint) as model:
        norm = model.module.decoder.layers[0].input_layernorm
        layers = steps.calibrated_layers(model, QuantizationConfig(NO_QUANT))
        plain = layers.plain("decoder.layers.0.input_layernorm")
        return norm.weight.detach(), pack_parameters(plain, torch.bfloat16)["", "weight"]


@pytest.mark.parametrize(("model", "offset"), [("llama2", 0.0), ("gemma", 1.0), ("nemotron", 1.0)])
def test_gains_are_stored_whole(checkpoint_of: Callable[[str], Path], model: str, offset: float) -> None:
    ((weight, packed),) = run_ranks(pack_norm, 1, checkpoint_of(model))
    assert torch.equal(packed, (weight.float() + offset).bfloat16())
