# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What the numbers in the files must look like: finite, scaled, spread over their range, the same where ranks agree."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nemo_ptq.verify.config import Config
from nemo_ptq.verify.dequantize import E2M1_MAX, E4M3_MAX, dequantize_int4, unpack_e2m1, unpack_int4
from nemo_ptq.verify.layout import (
    NVFP4_BLOCK_SIZE,
    Linear,
    TensorSpec,
    layer_linears,
    lm_head,
    rank_tensors,
    stages,
)
from nemo_ptq.verify.reader import Checkpoint, RankFile, same_bytes, split_parts

# A scale is the largest magnitude over the largest code, so each group of weights comes close to that code ...
_LEAST_PEAK = 0.75
# ... except that modelopt's clipping and zero-padded rows leave a few groups behind.
_TOLERATED_GROUPS = 0.05

# W4A8's int4 weights may leave the FP8 range by no more than rounding of their scales.
_FP8_OVERFLOW = 1.05


@dataclass(frozen=True)
class _Grid:
    """The codes of an algorithm.

    Attributes:
        largest: Largest magnitude of a code.
        saturated: Share of the weights that may plausibly have it. Normally distributed weights reach it in 1.5 % of
            the cases for int4 with 128 to a group and 15 % for NVFP4's 16; clipping with half the right scale
            doubles or triples that.
    """

    largest: float
    saturated: float


_GRIDS = {
    "FP8": _Grid(E4M3_MAX, 0.02),
    "W8A8_SQ_PER_CHANNEL": _Grid(127, 0.05),
    "W4A16_AWQ": _Grid(7, 0.3),
    "W4A8_AWQ": _Grid(7, 0.3),
    "NVFP4": _Grid(E2M1_MAX, 0.6),
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


def _slices(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor, or expert by expert where it is stacked, so that no more than one is ever converted."""
    yield from tensor if tensor.ndim == 3 else (tensor,)


def finiteness_problems(checkpoint: Checkpoint) -> list[str]:
    """Tensors with NaN or infinity in any rank's file."""
    problems = []
    for file in checkpoint.rank_files:
        for name, (dtype, _) in file.header.items():
            if dtype[0] not in "FB":
                continue
            bad = sum(int((~part.float().isfinite()).sum()) for part in _slices(file.tensor(name)))
            if bad:
                problems.append(f"{file.path.name}: {name} has {bad} values that are NaN or infinite")
    return problems


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
    return [f"{name} is all zero" for name in names if not _any_nonzero(checkpoint.tensor(name))]


def _any_nonzero(tensor: torch.Tensor) -> bool:
    # Both zeros of the floating dtypes count; packed codes of zero are zero bytes.
    return any(bool((part.float() != 0).any()) for part in _slices(tensor))


def range_problems(checkpoint: Checkpoint) -> list[str]:
    """Quantized weights that do not fit their scales: too many at the largest code, or groups that stay far below."""
    problems = []
    peaks: dict[str, float] = {}
    for name, linear in model_linears(checkpoint.config):
        algorithm = checkpoint.config.quantization.algorithm_of(linear.module)
        if algorithm is None:
            continue
        grid = _GRIDS[algorithm]
        for expert, weight in enumerate(_slices(checkpoint.tensor(f"{name}.weight"))):
            label = name if linear.experts is None else f"{name}, expert {expert}"
            groups = _grouped_magnitudes(checkpoint.config, algorithm, weight)
            saturated = float((groups >= grid.largest).float().mean())
            if saturated > max(grid.saturated, 4 / groups.shape[-1]):
                problems.append(f"{label}: {saturated:.1%} of the weights have the largest code, scales too small")
            group_peaks = groups.amax(-1) / grid.largest
            if algorithm == "FP8":
                peaks[label] = float(group_peaks)
                continue
            low = float(((group_peaks > 0) & (group_peaks < _LEAST_PEAK)).float().mean())
            if low > _TOLERATED_GROUPS:
                problems.append(f"{label}: {low:.1%} of the groups stay far below the largest code, scales too large")
        if algorithm == "W4A8_AWQ":
            problems += _overflow_problems(checkpoint, name)
    return problems + _peak_problems(peaks)


def _grouped_magnitudes(config: Config, algorithm: str, weight: torch.Tensor) -> torch.Tensor:
    """Magnitudes of a weight's codes, those that share a scale in the last dimension."""
    if algorithm == "FP8":
        return weight.float().abs().flatten()
    if algorithm == "W8A8_SQ_PER_CHANNEL":
        return weight.float().abs()
    if algorithm == "NVFP4":
        return unpack_e2m1(weight).abs().unflatten(1, (-1, NVFP4_BLOCK_SIZE))
    return unpack_int4(weight).float().abs().unflatten(1, (-1, config.quantization.group_size))


def _overflow_problems(checkpoint: Checkpoint, name: str) -> list[str]:
    weight, scale, scale_2 = (
        checkpoint.tensor(f"{name}.{suffix}")
        for suffix in ("weight", "weights_scaling_factor", "weights_scaling_factor_2")
    )
    ratio = float(dequantize_int4(weight, scale).abs().max() / scale_2)
    if ratio <= E4M3_MAX * _FP8_OVERFLOW:
        return []
    return [f"{name}: the largest weight is {ratio:.0f} times weights_scaling_factor_2, FP8 ends at {E4M3_MAX:.0f}"]


def _peak_problems(peaks: dict[str, float]) -> list[str]:
    """FP8 weights that stay far below the largest code; fc and gate may share the scale of the larger one."""
    joint = dict(peaks)
    for name, peak in peaks.items():
        if name.endswith(".mlp.gate"):
            fc = name.removesuffix("gate") + "fc"
            joint[name] = joint[fc] = max(peak, peaks.get(fc, 0.0))
    return [
        f"{name}: no weight exceeds {peak:.0%} of the largest code, its scale is too large"
        for name, peak in joint.items()
        if 0 < peak < _LEAST_PEAK
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


def _disagreements(files: tuple[RankFile, ...], name: str, spec: TensorSpec) -> Iterator[str]:
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


def _padding_problems(files: tuple[RankFile, ...], name: str, rows: int, size: int) -> Iterator[str]:
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
