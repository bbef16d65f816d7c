# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A second, independent writer of qnemo directories: straight from the format's rules, for small models in float32.

It shares nothing with the exporter or with the reader under test, and takes the slow and plain way everywhere: each
linear layer is quantized as a whole to unpacked codes, then cut by explicit row and column indices, then packed.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

# Algorithm of ours -> quant_algo of the format.
QUANT_ALGO = {
    "no_quant": None,
    "fp8": "FP8",
    "int8_sq": "W8A8_SQ_PER_CHANNEL",
    "int4_awq": "W4A16_AWQ",
    "w4a8_awq": "W4A8_AWQ",
    "nvfp4": "NVFP4",
}


@dataclass(frozen=True)
class Weights:
    """One linear layer: float32 (out, in) and float32 (out,) or None; experts have a leading dimension."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """One decoder layer; norms are (weight, bias or None), qkv rows are [all q; all k; all v]."""

    input_norm: tuple[torch.Tensor, torch.Tensor | None]
    post_norm: tuple[torch.Tensor, torch.Tensor | None]
    linears: dict[str, Weights]
    router: torch.Tensor | None = None


@dataclass(frozen=True)
class Model:
    """An unsharded, unquantized model and what config.json says of it."""

    config: dict[str, Any]
    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    final_norm: tuple[torch.Tensor, torch.Tensor | None]
    lm_head: torch.Tensor | None
    positions: torch.Tensor | None = None


@dataclass(frozen=True)
class Recipe:
    """How a directory is written; activation scales are those of every linear layer, KV scales of every layer."""

    algorithm: str = "no_quant"
    tp: int = 1
    pp: int = 1
    kv_cache: str | None = None
    dtype: str = "float32"
    group: int = 128
    activation_amax: float = 4.0
    kv_scale: float = 1.0
    rank_metadata: bool = True
    exclude: tuple[str, ...] = ("lm_head", "*router", "*embedding")


@dataclass
class Quantized:
    """A linear layer: unpacked codes, the float32 weights that they stand for, and the tensors beside them.

    ``by_row`` and ``by_column`` name the tensors that are cut with the weight's rows and columns.
    """

    codes: torch.Tensor
    dequantized: torch.Tensor
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    by_row: tuple[str, ...] = ()
    by_column: tuple[str, ...] = ()


def prequant_scale(features: int, dtype: torch.dtype) -> torch.Tensor:
    """A smoothing vector that differs from feature to feature, exact in every dtype."""
    return (0.5 + (torch.arange(features) % 7) / 8).to(dtype)


def nearest_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Codes 0 to 15 of the nearest E2M1 values; ties are not aimed at."""
    magnitude = (values.abs()[..., None] - E2M1).abs().argmin(-1)
    return magnitude + 8 * (values < 0)


def quantize(weight: torch.Tensor, recipe: Recipe) -> Quantized:
    """Quantizes one float32 (out, in) weight with scales of the whole layer."""
    dtype = getattr(torch, recipe.dtype)
    out, in_ = weight.shape
    algorithm = recipe.algorithm
    if algorithm == "no_quant":
        return Quantized(weight.to(dtype), weight.to(dtype).float())
    if algorithm == "fp8":
        scale = weight.abs().max().reshape(1) / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        tensors = {"weights_scaling_factor": scale, "activation_scaling_factor": act(recipe, 448)}
        return Quantized(codes, codes.float() * scale, tensors)
    if algorithm == "nvfp4":
        scale_2 = weight.abs().max() / (6 * 448)
        blocks = weight.reshape(out, in_ // 16, 16)
        block_scale = (blocks.abs().amax(-1) / 6 / scale_2).to(torch.float8_e4m3fn)
        step = (block_scale.float() * scale_2)[..., None]
        codes = nearest_e2m1(blocks / step)
        signed = torch.where(codes > 7, -E2M1[codes % 8], E2M1[codes % 8])
        tensors = {
            "weights_scaling_factor": block_scale,
            "weights_scaling_factor_2": scale_2,
            "activation_scaling_factor": act(recipe, 6 * 448).reshape(()),
        }
        return Quantized(
            codes.reshape(out, in_).to(torch.uint8),
            (signed * step).reshape(out, in_),
            tensors,
            by_row=("weights_scaling_factor",),
            by_column=("weights_scaling_factor",),
        )
    prequant = prequant_scale(in_, dtype)
    smoothed = weight / prequant.float()
    if algorithm == "int8_sq":
        scale = smoothed.abs().amax(1) / 127
        codes = (smoothed / scale[:, None]).round().to(torch.int8)
        tensors = {
            "weights_scaling_factor": scale,
            "activation_scaling_factor": act(recipe, 127),
            "prequant_scaling_factor": prequant,
        }
        return Quantized(
            codes,
            codes.float() * scale[:, None],
            tensors,
            by_row=("weights_scaling_factor",),
            by_column=("prequant_scaling_factor",),
        )
    groups = smoothed.reshape(out, in_ // recipe.group, recipe.group)
    scale = groups.abs().amax(-1) / 7
    codes = (groups / scale[..., None]).round()
    dequantized = (codes * scale[..., None]).reshape(out, in_)
    tensors = {"weights_scaling_factor": scale, "prequant_scaling_factor": prequant}
    if algorithm == "w4a8_awq":
        scale_2 = smoothed.abs().max().reshape(1) / 448
        tensors |= {"weights_scaling_factor_2": scale_2, "activation_scaling_factor": act(recipe, 448)}
        dequantized = (dequantized / scale_2).to(torch.float8_e4m3fn).float() * scale_2
    return Quantized(
        codes.reshape(out, in_).to(torch.int8),
        dequantized,
        tensors,
        by_row=("weights_scaling_factor",),
        by_column=("weights_scaling_factor", "prequant_scaling_factor"),
    )


def act(recipe: Recipe, largest: float) -> torch.Tensor:
    return torch.tensor([recipe.activation_amax / largest])


def pack(codes: torch.Tensor, algorithm: str) -> torch.Tensor:
    """Packs 4-bit codes as the file has them; leaves the others alone."""
    if algorithm in ("int4_awq", "w4a8_awq"):
        nibbles = codes.to(torch.uint8) & 15
        return (nibbles[0::2] | (nibbles[1::2] << 4)).view(torch.int8)
    if algorithm == "nvfp4":
        return codes[:, 0::2] | (codes[:, 1::2] << 4)
    return codes


def cut(quantized: Quantized, rows: torch.Tensor | None, columns: tuple[int, int] | None) -> Quantized:
    """The share of one rank: some rows (column parallel) or a slice ``columns`` = (index, of how many)."""
    tensors = dict(quantized.tensors)
    codes = quantized.codes
    if rows is not None:
        codes = codes.view(torch.uint8)[rows].view(codes.dtype) if codes.dtype == torch.float8_e4m3fn else codes[rows]
        for name in quantized.by_row:
            value = tensors[name]
            fp8 = value.dtype == torch.float8_e4m3fn
            tensors[name] = value.view(torch.uint8)[rows].view(value.dtype) if fp8 else value[rows]
    if columns is not None:
        index, count = columns
        codes = codes.chunk(count, dim=1)[index]
        for name in quantized.by_column:
            tensors[name] = tensors[name].chunk(count, dim=-1)[index]
    return replace(quantized, codes=codes, tensors=tensors)


def qkv_rows(config: dict[str, Any], tp: int, rank: int) -> torch.Tensor:
    """Rows of the unsharded [all q; all k; all v] that one rank holds."""
    size, heads, kv_heads = config["head_size"], config["num_attention_heads"], config["num_key_value_heads"]
    own_q = range(rank * heads // tp, (rank + 1) * heads // tp)
    own_kv = [rank * kv_heads // tp] if kv_heads < tp else range(rank * kv_heads // tp, (rank + 1) * kv_heads // tp)
    wanted = [*own_q, *(heads + head for head in own_kv), *(heads + kv_heads + head for head in own_kv)]
    return torch.cat([torch.arange(head * size, (head + 1) * size) for head in wanted])


def even_rows(total: int, tp: int, rank: int) -> torch.Tensor:
    return torch.arange(rank * total // tp, (rank + 1) * total // tp)


def padded_rows(table: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    share = math.ceil(table.shape[0] / tp)
    padded = torch.cat([table, torch.zeros(share * tp - table.shape[0], table.shape[1], dtype=table.dtype)])
    return padded[rank * share : (rank + 1) * share]


def excluded(recipe: Recipe, name: str) -> bool:
    return any(name.endswith(pattern.lstrip("*")) for pattern in recipe.exclude)


def dequantized_linears(model: Model, recipe: Recipe) -> list[dict[str, torch.Tensor]]:
    """The weights that a server computes with, for each layer and linear; experts keep their leading dimension."""
    result = []
    for index, layer in enumerate(model.layers):
        local = index % (len(model.layers) // recipe.pp)
        weights = {}
        for name, linear in layer.linears.items():
            plain = excluded(recipe, f"transformer.layers.{local}.{name}")
            used = replace(recipe, algorithm="no_quant") if plain else recipe
            if linear.weight.ndim == 3:
                weights[name] = torch.stack([quantize(expert, used).dequantized for expert in linear.weight])
            else:
                weights[name] = quantize(linear.weight, used).dequantized
        result.append(weights)
    return result


def write_linear(
    tensors: dict[str, torch.Tensor], name: str, linear: Weights, config: dict[str, Any], recipe: Recipe, rank: int
) -> None:
    kind = name.rsplit(".", 1)[-1]
    used = replace(recipe, algorithm="no_quant") if excluded(recipe, name) else recipe
    quantized = quantize(linear.weight, used)
    rows = columns = None
    if kind == "qkv":
        rows = qkv_rows(config, recipe.tp, rank)
    elif kind in ("fc", "gate"):
        rows = even_rows(linear.weight.shape[0], recipe.tp, rank)
    else:
        columns = (rank, recipe.tp)
    share = cut(quantized, rows, columns)
    tensors[f"{name}.weight"] = pack(share.codes, used.algorithm)
    for suffix, value in share.tensors.items():
        tensors[f"{name}.{suffix}"] = value
    if linear.bias is not None:
        bias = linear.bias if rows is None else linear.bias[rows]
        tensors[f"{name}.bias"] = bias.to(getattr(torch, recipe.dtype))


def write_experts(tensors: dict[str, torch.Tensor], name: str, linear: Weights, recipe: Recipe, rank: int) -> None:
    """Cuts experts: fc is (experts, [up; gate], hidden), each half cut on its own; proj is (experts, hidden, inner)."""
    experts = [quantize(weight, recipe) for weight in linear.weight]
    half = linear.weight.shape[1] // 2
    own = even_rows(half, recipe.tp, rank)
    rows = torch.cat([own, half + own]) if name.endswith("fc") else None
    columns = None if name.endswith("fc") else (rank, recipe.tp)
    shares = [cut(expert, rows, columns) for expert in experts]
    tensors[f"{name}.weight"] = torch.stack([share.codes for share in shares])
    if recipe.algorithm == "fp8":
        tensors[f"{name}.weights_scaling_factor"] = torch.stack(
            [share.tensors["weights_scaling_factor"] for share in shares]
        )
        tensors[f"{name}.activation_scaling_factor"] = act(recipe, 448)


def rank_tensors(model: Model, recipe: Recipe, tp_rank: int, pp_rank: int) -> dict[str, torch.Tensor]:
    """Everything in the file of one rank."""
    dtype = getattr(torch, recipe.dtype)
    tensors: dict[str, torch.Tensor] = {}

    def norm(name: str, values: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        for suffix, value in zip(("weight", "bias"), values, strict=True):
            if value is not None:
                tensors[f"{name}.{suffix}"] = value.to(dtype)

    if pp_rank == 0:
        tensors["transformer.vocab_embedding.weight"] = padded_rows(model.embedding.to(dtype), recipe.tp, tp_rank)
        if model.positions is not None:
            tensors["transformer.position_embedding.weight"] = padded_rows(
                model.positions.to(dtype), recipe.tp, tp_rank
            )
    per_stage = len(model.layers) // recipe.pp
    for local, layer in enumerate(model.layers[pp_rank * per_stage : (pp_rank + 1) * per_stage]):
        prefix = f"transformer.layers.{local}."
        norm(prefix + "input_layernorm", layer.input_norm)
        norm(prefix + "post_layernorm", layer.post_norm)
        for name, linear in layer.linears.items():
            if linear.weight.ndim == 3:
                write_experts(tensors, prefix + name, linear, recipe, tp_rank)
            else:
                write_linear(tensors, prefix + name, linear, model.config, recipe, tp_rank)
        if layer.router is not None:
            tensors[prefix + "mlp.router.weight"] = layer.router.float()
        if recipe.kv_cache:
            for which, scale in (("kv", recipe.kv_scale), ("k", recipe.kv_scale), ("v", recipe.kv_scale / 2)):
                tensors[f"{prefix}attention.{which}_cache_scaling_factor"] = torch.tensor([scale])
    if pp_rank == recipe.pp - 1:
        norm("transformer.ln_f", model.final_norm)
        head = model.embedding if model.lm_head is None else model.lm_head
        if model.lm_head is not None or recipe.pp > 1:
            tensors["lm_head.weight"] = padded_rows(head.to(dtype), recipe.tp, tp_rank)
    return {name: value.clone().contiguous() for name, value in tensors.items()}


def config_json(model: Model, recipe: Recipe) -> dict[str, Any]:
    mapping: dict[str, Any] = {"world_size": recipe.tp * recipe.pp, "tp_size": recipe.tp, "pp_size": recipe.pp}
    if "moe" in model.config:
        mapping |= {"moe_tp_size": recipe.tp, "moe_ep_size": 1}
    quantization: dict[str, Any] = {"quant_algo": QUANT_ALGO[recipe.algorithm], "kv_cache_quant_algo": recipe.kv_cache}
    if recipe.algorithm != "no_quant":
        quantization["exclude_modules"] = list(recipe.exclude)
    if recipe.algorithm in ("int4_awq", "w4a8_awq"):
        quantization |= {"group_size": recipe.group, "has_zero_point": False, "pre_quant_scale": True}
    if recipe.algorithm == "nvfp4":
        quantization["group_size"] = 16
    return {
        "producer": {"name": "tests", "version": "0"},
        "dtype": recipe.dtype,
        "logits_dtype": "float16" if recipe.dtype == "bfloat16" else recipe.dtype,
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "residual_mlp": False,
        "lm_head_bias": False,
        "share_embedding_table": model.lm_head is None,
        **model.config,
        "rank": recipe.tp * recipe.pp - 1,
        "mapping": mapping,
        "quantization": quantization,
    }


def model_yaml(model: Model) -> dict[str, Any]:
    """What NeMo would say of the model, as far as the reader looks at it."""
    config = model.config
    scaling = config.get("rotary_scaling")
    activation = {"silu": "silu", "swiglu": "silu", "squared-relu": "squared_relu"}.get(config["hidden_act"], "gelu")
    moe = config.get("moe", {})
    described = {
        "_target_": "nemo.collections.llm.gpt.model.base.GPTConfig",
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "moe_ffn_hidden_size": None,
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config["head_size"],
        "layernorm_epsilon": config["norm_epsilon"],
        "seq_length": config["max_position_embeddings"],
        "normalization": "RMSNorm" if config["rmsnorm"] else "LayerNorm",
        "position_embedding_type": config["position_embedding_type"].replace("rope_gpt_neox", "rope"),
        "rotary_base": config.get("rotary_base", 10000),
        "rotary_percent": config.get("rotary_pct", 1.0),
        "seq_len_interpolation_factor": scaling["factor"] if scaling and scaling["type"] == "linear" else None,
        "gated_linear_unit": "mlp.gate" in model.layers[0].linears or bool(moe),
        "add_bias_linear": model.layers[0].linears["attention.dense"].bias is not None,
        "add_qkv_bias": False,
        "num_moe_experts": moe.get("num_experts"),
        "moe_router_topk": moe.get("top_k", 2),
        "share_embeddings_and_output_weights": model.lm_head is None,
        "vocab_size": None,
        "activation_func": {"_target_": f"torch.nn.functional.{activation}", "_call_": False},
    }
    if scaling and scaling["type"] == "llama3":
        described |= {
            "scale_factor": scaling["factor"],
            "low_freq_factor": scaling["low_freq_factor"],
            "high_freq_factor": scaling["high_freq_factor"],
            "old_context_len": scaling["original_max_position_embeddings"],
        }
    return {
        "_target_": "nemo.collections.llm.gpt.model.base.GPTModel",
        "config": described,
        "tokenizer": {
            "_target_": "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer",
            "pretrained_model_name": "nemo_tokenizer",
        },
    }


def write_tokenizer(path: Path) -> None:
    """A tokenizer that knows the printable ASCII characters, one token each."""
    path.mkdir(parents=True)
    alphabet = ["\u0120", *(chr(code) for code in range(33, 127))]  # Byte-level tokenizers spell a blank \u0120.
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def write_manifest(directory: Path) -> None:
    """(Re)writes ptq/manifest.json to match the directory as it is."""
    target = directory / "ptq" / "manifest.json"
    target.unlink(missing_ok=True)
    target.parent.mkdir(exist_ok=True)
    files = {
        path.relative_to(directory).as_posix(): {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    content = json.dumps({"version": 1, "files": files, "producer": "tests", "sha256": "0" * 64})
    target.write_text(content.replace("0" * 64, hashlib.sha256(content.encode()).hexdigest()))


def write_directory(directory: Path, model: Model, recipe: Recipe) -> Path:
    """Writes the whole directory: config.json, rank files, nemo_context/, ptq/manifest.json."""
    directory.mkdir(parents=True)
    for pp_rank in range(recipe.pp):
        for tp_rank in range(recipe.tp):
            rank = tp_rank + pp_rank * recipe.tp
            metadata = {"rank": str(rank)} if recipe.rank_metadata else None
            tensors = rank_tensors(model, recipe, tp_rank, pp_rank)
            save_file(tensors, directory / f"rank{rank}.safetensors", metadata=metadata)
    (directory / "config.json").write_text(json.dumps(config_json(model, recipe), indent=2))
    write_tokenizer(directory / "nemo_context" / "nemo_tokenizer")
    (directory / "nemo_context" / "model.yaml").write_text(yaml.safe_dump(model_yaml(model)))
    write_manifest(directory)
    return directory
