# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""All formats of one calibration are the same model to the reader, and every scale in the files counts."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex

from nemo_ptq.export.formats import FORMATS
from nemo_ptq.verify.forward_pass import CPU, logits, open_model
from nemo_ptq.verify.trtllm.trtllm_reader import same_bytes
from tests.export.hugging_face import TOKENS, distance
from tests.families import FAMILIES, GPT_VARIANTS
from tests.matrix import algorithms_of, carries, quick_first
from tests.ranks import run_ranks

from .exports import LINEARS, NORMS, Cell, Expected, export_cells, gains, model_logits, open_all, whole

CHECKPOINT_OF = Callable[[str], Path]
# Relative distance of a token's logits, in the median over tokens, for float32's own rounding.
CLOSE = 1e-5
# What scales are multiplied with to see that they count; powers of two change nothing in FP8.
FACTOR = 1.3
MODELS = quick_first([*FAMILIES, *GPT_VARIANTS], ("llama31",))


def formats_of(model: str, algorithm: str) -> tuple[str, ...]:
    """The formats with the same arithmetic: compressed_tensors folds what the others keep, where there are scales."""
    folds = algorithm not in ("no_quant", "fp8")
    others = [format for format in FORMATS if format != "compressed_tensors" or not folds]
    return tuple(format for format in others if carries(format, model, algorithm))


@pytest.mark.parametrize("model", MODELS)
def test_every_format_is_the_same_model(model: str, checkpoint_of: CHECKPOINT_OF, tmp_path: Path) -> None:
    tp = 1 if model == "starcoder" else 2
    cells = [
        Cell(model, algorithm, formats_of(model, algorithm), tp=tp) for algorithm in algorithms_of("trtllm", model)
    ]
    run_ranks(export_cells, tp, checkpoint_of(model), cells, tmp_path)
    original = open_model(checkpoint_of(model))
    for cell in cells:
        opened = open_all(tmp_path / cell.algorithm, cell.formats)
        exported = opened.pop("trtllm")
        for format, weights in opened.items():
            for found, gain in gains(exported, weights):
                torch.testing.assert_close(found, gain, rtol=2**-7, atol=2**-7)
            expected = Expected(exported, weights, original if format == "hf" else None)
            far = distance(model_logits(weights), model_logits(expected))
            assert far < CLOSE, f"{cell.algorithm}, {format}"


@pytest.mark.parametrize("model", ["llama32", "mixtral", "gemma", "starcoder", "nemotron", "gpt_geglu"])
def test_checkpoints_are_read_as_they_are_exported(model: str, checkpoint_of: CHECKPOINT_OF, tmp_path: Path) -> None:
    """The baseline is the same whether it is read from a NeMo checkpoint, a Hugging Face directory, or an export."""
    checkpoint = checkpoint_of(model)
    run_ranks(export_cells, 1, checkpoint, [Cell(model, "no_quant", ("trtllm",), tp=1)], tmp_path)
    exported = open_model(tmp_path / "no_quant" / "trtllm")
    config = exported.config
    for source in [checkpoint, checkpoint.with_name(f"{model}.hf")] if model in FAMILIES else [checkpoint]:
        weights = open_model(source)
        for layer in range(config.num_hidden_layers):
            prefix = f"transformer.layers.{layer}."
            for name in LINEARS:
                if name == "mlp.gate" and (config.moe or not config.gated):
                    continue
                if config.moe and name.startswith("mlp"):
                    pairs = zip(exported.experts(prefix + name, CPU), weights.experts(prefix + name, CPU), strict=True)
                else:
                    pairs = zip(
                        [exported.linear(prefix + name, CPU)], [weights.linear(prefix + name, CPU)], strict=True
                    )
                for left, right in pairs:
                    assert torch.equal(whole(left).weight, whole(right).weight), name
                    bias, other = whole(left).bias, whole(right).bias
                    assert bias is other is None or torch.equal(bias, other), name
            for name in NORMS:
                # Gains that are stored minus one are rounded in the export.
                found = weights.tensor(f"{prefix}{name}.weight").bfloat16()
                assert same_bytes(found, exported.tensor(f"{prefix}{name}.weight")), name
        found = model_logits(weights)  # NeMo pads Mixtral's vocabulary
        torch.testing.assert_close(found, model_logits(exported)[..., : found.shape[-1]], rtol=0.02, atol=0.05)


@pytest.fixture(scope="module")
def exports(checkpoint_of: CHECKPOINT_OF, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with all algorithms, in every format but trtllm, its KV cache in FP8."""
    directory = tmp_path_factory.mktemp("exports")
    can = {
        "fp8": ("hf", "compressed_tensors", "nemo"),
        "int8_sq": ("compressed_tensors", "nemo"),
        "int4_awq": ("hf", "compressed_tensors", "nemo"),
        "w4a8_awq": ("hf", "nemo"),
        "nvfp4": ("hf", "nemo"),
    }
    cells = [Cell("llama31", algorithm, formats, kv_cache=True, tp=1) for algorithm, formats in can.items()]
    run_ranks(export_cells, 1, checkpoint_of("llama31"), cells, directory)
    return directory


def test_the_kv_cache_has_the_same_scales_everywhere(exports: Path) -> None:
    opened = open_all(exports / "fp8", ("hf", "compressed_tensors", "nemo"))
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(2)) * 3
    for layer in range(2):
        rounded = [[quantize(values) for quantize in weights.kv_cache(layer, CPU) or ()] for weights in opened.values()]
        assert len(rounded[0]) == 2 and not torch.equal(*rounded[0]) and not torch.equal(rounded[0][0], values)
        for other in rounded[1:]:
            torch.testing.assert_close(other, rounded[0])
    assert distance(model_logits(opened["nemo"]), model_logits(opened["compressed_tensors"])) < CLOSE


@pytest.mark.parametrize(
    ("format", "algorithm"),
    [
        *(("hf", algorithm) for algorithm in ("fp8", "int4_awq", "w4a8_awq", "nvfp4")),
        *(("compressed_tensors", algorithm) for algorithm in ("fp8", "int8_sq", "int4_awq")),
    ],
)
def test_every_scale_of_a_hugging_face_directory_counts(
    format: str, algorithm: str, exports: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(exports / algorithm / format, tmp_path / "out"))
    file = directory / "model.safetensors"
    tensors, before = load_file(file), logits(directory, TOKENS)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    scales = [name for name in tensors if name.startswith("model.layers.1.") and "scale" in name]
    assert len({name.rpartition(".")[2] for name in scales}) >= (3 if algorithm == "int4_awq" else 4)
    for name in scales:
        save_file({**tensors, name: (tensors[name].float() * FACTOR).to(tensors[name].dtype)}, file, metadata)
        assert not torch.equal(logits(directory, TOKENS), before), name


def edit_chunk(weights: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Writes another tensor of the same size in the place of one that is a single chunk, and returns what was there."""
    index = FileSystemReader(weights).read_metadata()
    (chunk,) = index.state_dict_metadata[name].chunks
    place: Any = index.storage_data[MetadataIndex(name, chunk.offsets)]
    with (weights / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        tensor = torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
        content = io.BytesIO()
        torch.save(change(tensor).to(tensor.dtype), content)
        assert len(content.getvalue()) == place.length
        file.seek(place.offset)
        file.write(content.getvalue())
    return tensor


@pytest.mark.parametrize("algorithm", ["fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4"])
def test_every_range_of_a_nemo_checkpoint_counts(algorithm: str, exports: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(exports / algorithm / "nemo", tmp_path / "out"))
    before = logits(directory, TOKENS)
    index = FileSystemReader(directory / "weights").read_metadata()
    names = [name for name in index.state_dict_metadata if ".layers.1." in name and "quantizer._" in name]
    names += [name for name in index.state_dict_metadata if ".layers.1." in name and "weight_quantizer." in name]
    assert len({name.partition("linear_")[2] for name in names}) >= 8
    for name in dict.fromkeys(names):
        kept = edit_chunk(directory / "weights", name, lambda tensor: tensor * FACTOR)
        assert not torch.equal(logits(directory, TOKENS), before), name
        edit_chunk(directory / "weights", name, lambda _, kept=kept: kept)
    assert torch.equal(logits(directory, TOKENS), before)
