# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of the values in the files: finite, scaled, spread over their range, equal where ranks must agree."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nemo_ptq.verify.dequantize import E4M3_MAX, dequantize_int4, unpack_int4, unpack_uint4
from nemo_ptq.verify.model_config import Config
from nemo_ptq.verify.side_by_side import side_by_side
from nemo_ptq.verify.tensor_file import TensorFile
from nemo_ptq.verify.trtllm.expected_tensors import (
    NVFP4_BLOCK_SIZE,
    Linear,
    TensorSpec,
    layer_linears,
    lm_head,
    rank_tensors,
    stages,
)
from nemo_ptq.verify.trtllm.trtllm_reader import Checkpoint, same_bytes, split_parts

# Clipping and zero-padded rows may leave a few groups below their range.
_TOLERATED_GROUPS = 0.05

# W4A8's int4 weights may leave the FP8 range by no more than rounding of their scales.
_FP8_OVERFLOW = 1.05


# Values that are looked at together: bounds the memory, not the result.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class _Range:
    """How an algorithm's codes are spread where weight and scale belong together.

    A code's level is an integer that grows with the magnitude it stands for.

    Attributes:
        largest: Level of the largest code. A scale is the largest magnitude over the largest code, so that each group
            of weights comes close to it.
        least: Lowest level that counts as close: three quarters of the range, of NVFP4's two thirds.
        saturated: Share of the weights that may plausibly have the largest code. Normally distributed weights do in
            1.5 % of the cases for int4 with 128 to a group and 15 % for NVFP4's 16; clipping with half the right scale
            doubles or triples that.
    """

    largest: int
    least: int
    saturated: float


_RANGES = {
    "FP8": _Range(largest=0x7E, least=0x7B, saturated=0.02),  # 448 and 352
    "W8A8_SQ_PER_CHANNEL": _Range(largest=127, least=96, saturated=0.05),
    "W4A16_AWQ": _Range(largest=7, least=6, saturated=0.3),
    "W4A8_AWQ": _Range(largest=7, least=6, saturated=0.3),
    # 6, and 4: around that the grid is finer, so that a scale may be better that puts the largest weight there.
    "NVFP4": _Range(largest=7, least=6, saturated=0.6),
}


def model_linears(config: Config) -> Iterator[tuple[str, Linear]]:
    """Yields the global name and description of every linear layer that the files hold."""
    for _, layers in stages(config):
        for local, layer in enumerate(layers):
            for linear in layer_linears(config, local):
                name = linear.name.replace(f".layers.{local}.", f".layers.{layer}.", 1)
                yield name, linear
    if not config.lm_head_is_shared:
        yield "lm_head", lm_head(config)


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor's values in runs of bounded length."""
    yield from tensor.reshape(-1).split(_CHUNK)


def _experts(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The matrices of a weight: one, or one for each expert."""
    yield from weight if weight.ndim == 3 else (weight,)


def finiteness_problems(checkpoint: Checkpoint) -> list[str]:
    """Tensors with NaN or infinity in any rank's file."""
    tensors = [(file, name) for file in checkpoint.rank_files for name in file.header]
    found = zip(tensors, side_by_side(_count_not_finite, tensors), strict=True)
    return [f"{file.path.name}: {name} has {bad} values that are NaN or infinite" for (file, name), bad in found if bad]


def _count_not_finite(tensor: tuple[TensorFile, str]) -> int:
    file, name = tensor
    return sum(int(_not_finite(chunk).count_nonzero()) for chunk in _chunks(file.tensor(name)))


def _not_finite(values: torch.Tensor) -> torch.Tensor:
    if values.dtype == torch.float8_e4m3fn:  # It has no infinity, and one NaN of either sign.
        return (values.view(torch.uint8) & 0x7F) == 0x7F
    return ~values.isfinite()


def scale_problems(checkpoint: Checkpoint) -> list[str]:
    """Scaling factors in any rank's file that are zero, negative or too small for their dtype."""
    problems = []
    for file in checkpoint.rank_files:
        for name in file.header:
            if "scaling_factor" not in name:
                continue
            scale = file.tensor(name)
            # E4M3 block scales use their subnormal range; a server's float scales have no business there.
            least = 0.0 if scale.dtype == torch.float8_e4m3fn else torch.finfo(scale.dtype).tiny
            values = scale.float()
            bad = int(((values <= 0) | (values < least)).sum())
            if bad:
                problems.append(f"{file.path.name}: {name} has {bad} scales that are zero, negative or denormal")
    return problems


def zero_problems(checkpoint: Checkpoint) -> list[str]:
    """Weights that are zero throughout."""
    names = [name for name in checkpoint.names() if name.endswith(".weight")]
    found = side_by_side(lambda name: _any_nonzero(checkpoint.tensor(name)), names)
    return [f"{name} is all zero" for name, is_fine in zip(names, found, strict=True) if not is_fine]


def _any_nonzero(tensor: torch.Tensor) -> bool:
    return any(bool(_nonzero(chunk).any()) for chunk in _chunks(tensor))


def _nonzero(values: torch.Tensor) -> torch.Tensor:
    if values.dtype == torch.float8_e4m3fn:  # Zero has either sign.
        return (values.view(torch.uint8) & 0x7F) != 0
    return values != 0


def range_problems(checkpoint: Checkpoint) -> list[str]:
    """Quantized weights that do not fit their scales: too many at the largest code, or groups that stay far below."""
    quantized = [
        (name, linear, algorithm)
        for name, linear in model_linears(checkpoint.config)
        if (algorithm := checkpoint.config.quantization.algorithm_of(linear.module)) is not None
    ]
    found = side_by_side(lambda layer: _layer_range_problems(checkpoint, *layer), quantized)
    fp8_peaks = {name: peak for _, peaks in found for name, peak in peaks.items()}
    return [problem for problems, _ in found for problem in problems] + _peak_problems(fp8_peaks)


def _layer_range_problems(
    checkpoint: Checkpoint, name: str, linear: Linear, algorithm: str
) -> tuple[list[str], dict[str, int]]:
    """What is wrong with the ranges of one layer, and the highest level of FP8 weights, by name."""
    problems: list[str] = []
    fp8_peaks: dict[str, int] = {}
    plausible = _RANGES[algorithm]
    for expert, weight in enumerate(_experts(checkpoint.tensor(f"{name}.weight"))):
        label = name if linear.experts is None else f"{name}, expert {expert}"
        saturated, peaks, group = _spread(checkpoint.config, algorithm, weight)
        if saturated > max(plausible.saturated, 4 / group):
            problems.append(f"{label}: {saturated:.1%} of the weights have the largest code, scales too small")
        if algorithm == "FP8":
            fp8_peaks[label] = int(peaks.max())
            continue
        low = float(((peaks > 0) & (peaks < plausible.least)).float().mean())
        if low > _TOLERATED_GROUPS:
            problems.append(f"{label}: {low:.1%} of the groups stay far below the largest code, scales too large")
    if algorithm == "W4A8_AWQ":
        problems += _overflow_problems(checkpoint, name)
    return problems, fp8_peaks


def _spread(config: Config, algorithm: str, weight: torch.Tensor) -> tuple[float, torch.Tensor, int]:
    """Share of weights with the largest code, highest level of each group, and the number of weights in a group."""
    saturated, count, peaks, group = 0, 0, [], 1
    for rows in weight.split(max(1, _CHUNK // weight.shape[1])):
        levels = _grouped_levels(config, algorithm, rows)
        saturated += int((levels >= _RANGES[algorithm].largest).count_nonzero())
        count += levels.numel()
        peaks.append(levels.amax(-1).flatten())
        group = levels.shape[-1]
    return saturated / count, torch.cat(peaks), group


def _grouped_levels(config: Config, algorithm: str, weight: torch.Tensor) -> torch.Tensor:
    """Levels of a weight's codes, those of a group in the last dimension (of FP8's only group, a part)."""
    if algorithm == "FP8":
        return weight.view(torch.uint8) & 0x7F
    if algorithm == "W8A8_SQ_PER_CHANNEL":
        return weight.short().abs()
    if algorithm == "NVFP4":
        return (unpack_uint4(weight) & 7).unflatten(1, (-1, NVFP4_BLOCK_SIZE))
    return unpack_int4(weight).abs().unflatten(1, (-1, config.quantization.group_size))


def _overflow_problems(checkpoint: Checkpoint, name: str) -> list[str]:
    weight, scale, scale_2 = (
        checkpoint.tensor(f"{name}.{suffix}")
        for suffix in ("weight", "weights_scaling_factor", "weights_scaling_factor_2")
    )
    rows = max(2, _CHUNK // weight.shape[1]) // 2
    largest = max(
        float(dequantize_int4(packed, scales).abs().max())
        for packed, scales in zip(weight.split(rows), scale.split(2 * rows), strict=True)
    )
    ratio = largest / float(scale_2)
    if ratio <= E4M3_MAX * _FP8_OVERFLOW:
        return []
    return [f"{name}: the largest weight is {ratio:.0f} times weights_scaling_factor_2, FP8 ends at {E4M3_MAX:.0f}"]


def _peak_problems(peaks: dict[str, int]) -> list[str]:
    """FP8 weights that stay far below the largest code; fc and gate may share the scale of the larger one."""
    joint = dict(peaks)
    for name, peak in peaks.items():
        if name.endswith(".mlp.gate"):
            fc = name.removesuffix("gate") + "fc"
            joint[name] = joint[fc] = max(peak, peaks.get(fc, 0))
    return [
        f"{name}: no weight comes close to the largest code, its scale is too large"
        for name, peak in joint.items()
        if 0 < peak < _RANGES["FP8"].least
    ]


def agreement_problems(checkpoint: Checkpoint) -> list[str]:
    """Tensors that tensor-parallel ranks must share and do not: replicated ones, and copies of key and value heads."""
    problems: list[str] = []
    for pp_rank in range(checkpoint.config.mapping.pp_size):
        files = checkpoint.stage_files(pp_rank)
        for name, spec in rank_tensors(checkpoint.config, pp_rank).items():
            if name in files[0].header:
                problems += _disagreements(files, name, spec)
    return problems


def _disagreements(files: tuple[TensorFile, ...], name: str, spec: TensorSpec) -> Iterator[str]:
    if spec.shard is None:
        first = files[0].tensor(name)
        for file in files[1:]:
            if not same_bytes(first, file.tensor(name)):
                yield f"{name} differs between {files[0].path.name} and {file.path.name}"
        return
    for position, part in enumerate(spec.shard.parts):
        for rank in range(len(files)):
            original = rank - rank % part.replicas
            if original == rank:
                continue
            left, right = (split_parts(files[index].tensor(name), spec.shard)[position] for index in (original, rank))
            if not same_bytes(left, right):
                yield f"{name}: copies of a key or value head differ between ranks"


def padding_problems(checkpoint: Checkpoint) -> list[str]:
    """Padding behind the last vocabulary entry (or position) that is not zero, as after an exchange of ranks."""
    problems: list[str] = []
    for pp_rank in range(checkpoint.config.mapping.pp_size):
        for name, spec in rank_tensors(checkpoint.config, pp_rank).items():
            if spec.shard is not None and spec.shard.size is not None:
                problems += _padding_problems(checkpoint.stage_files(pp_rank), name, spec.shape[0], spec.shard.size)
    return problems


def _padding_problems(files: tuple[TensorFile, ...], name: str, rows: int, size: int) -> Iterator[str]:
    for tp_rank, file in enumerate(files):
        kept = min(rows, max(0, size - tp_rank * rows))
        if kept < rows and _any_nonzero(file.tensor(name)[kept:]):
            yield f"{file.path.name}: {name} has numbers in the {rows - kept} rows of padding"


def tied_problems(checkpoint: Checkpoint) -> list[str]:
    """A shared embedding table whose copy for the last pipeline stage differs from it."""
    if not checkpoint.config.share_embedding_table or checkpoint.config.lm_head_is_shared:
        return []
    last = checkpoint.config.mapping.pp_size - 1
    return [
        f"lm_head.weight in {head.path.name} differs from the embedding in {embedding.path.name} that it shares"
        for embedding, head in zip(checkpoint.stage_files(0), checkpoint.stage_files(last), strict=True)
        if not same_bytes(embedding.tensor("transformer.vocab_embedding.weight"), head.tensor("lm_head.weight"))
    ]


def kv_scale_problems(checkpoint: Checkpoint) -> list[str]:
    """KV-cache scales that are not the larger of the key's and the value's, where those are there too."""
    problems = []
    suffix = ".attention.kv_cache_scaling_factor"
    for file in checkpoint.rank_files:
        for name in file.header:
            if not name.endswith(suffix):
                continue
            parts = [name.replace(".kv_cache", f".{which}_cache") for which in ("k", "v")]
            present = [part for part in parts if part in file.header]
            if len(present) == 1:
                problems.append(f"{file.path.name}: {present[0]} stands alone, the reader wants both or none")
            elif present:
                key, value = (file.tensor(part) for part in parts)
                if not torch.equal(torch.maximum(key, value), file.tensor(name)):
                    problems.append(f"{file.path.name}: {name} is not the larger of the key's and the value's scale")
    return problems
