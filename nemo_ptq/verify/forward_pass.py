# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Runs an exported directory or a checkpoint in float32, one layer in memory at a time.

One forward pass for all formats: what they differ in is behind :class:`nemo_ptq.verify.weights.Weights`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from nemo_ptq.errors import PtqError
from nemo_ptq.verify.huggingface.hf_directory import is_hugging_face
from nemo_ptq.verify.huggingface.hf_model import open_hugging_face
from nemo_ptq.verify.linear import Stack, Tensors, dequantized
from nemo_ptq.verify.manifest import exports_below
from nemo_ptq.verify.model_config import Hybrid, ModelConfig
from nemo_ptq.verify.nemo.megatron_model import is_megatron, open_megatron
from nemo_ptq.verify.nemo.nemo_checks import is_nemo
from nemo_ptq.verify.nemo.nemo_model import open_nemo
from nemo_ptq.verify.state_space import StateSpace
from nemo_ptq.verify.trtllm.config_rules import LAYOUT_RULES
from nemo_ptq.verify.trtllm.trtllm_reader import open_checkpoint
from nemo_ptq.verify.weights import Weights

CPU = torch.device("cpu")

# Rows of an unquantized lm_head that are turned into float32 at a time: vocabularies are large.
_LM_HEAD_ROWS = 16384


def _gelu(values: torch.Tensor) -> torch.Tensor:
    return nn.functional.gelu(values, approximate="tanh")


def _squared_relu(values: torch.Tensor) -> torch.Tensor:
    return values.relu().square()


# TensorRT-LLM computes all that it calls some GELU with tanh.
_ACTIVATIONS: dict[str, Tensors] = {
    **dict.fromkeys(("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "openai-gelu", "geglu"), _gelu),
    "gelu_erf": nn.functional.gelu,
    **dict.fromkeys(("silu", "swiglu", "fast-swiglu"), nn.functional.silu),
    **dict.fromkeys(("squared-relu", "relu2"), _squared_relu),
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": nn.functional.softplus,
    "quick_gelu": lambda values: values * torch.sigmoid(1.702 * values),
    "identity": lambda values: values,
}


def rotary_frequencies(config: ModelConfig, length: int, is_local: bool = False) -> torch.Tensor:
    """Angles per position, float64 (rotary_dim / 2,), after scaling, in sequences of a length.

    Layers with a window (`is_local`) may have a base of their own, and are then not scaled.

    The Llama 3 bands: wavelengths below original / high_freq_factor stay, those above original / low_freq_factor are
    stretched by ``factor``, those between are interpolated.
    """
    dims = torch.arange(0, config.rotary_dim, 2, dtype=torch.float64)
    own_base = config.local_rotary_base if is_local else None
    frequencies = (own_base or config.rotary_base) ** (-dims / max(config.rotary_dim, 1))
    scaling = None if own_base else config.rotary_scaling
    if scaling is None:
        return frequencies
    if scaling.type == "longrope":
        is_long = length > scaling.original_max_position_embeddings
        return frequencies / torch.tensor(scaling.long_factor if is_long else scaling.short_factor, dtype=torch.float64)
    stretched = frequencies / scaling.factor
    if scaling.type == "linear":
        return stretched
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(stretched, frequencies, keep.clamp(0, 1))


def rotary_table(
    config: ModelConfig, length: int, device: torch.device, is_local: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, float32 (length, rotary_dim / 2) each."""
    positions, frequencies = torch.arange(length, dtype=torch.float64), rotary_frequencies(config, length, is_local)
    angles = torch.outer(positions, frequencies).to(device)
    factor = 1.0 if config.rotary_scaling is None else config.rotary_scaling.attention_factor
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the leading dimensions of (batch, heads, seq, head_size), first half against second (NeoX style)."""
    half = cos.shape[-1]
    first, second, rest = heads.split([half, half, heads.shape[-1] - 2 * half], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


class _Norm:
    """RMSNorm, or LayerNorm where the file has a bias; weights are those of the file, in float32."""

    def __init__(self, weights: Weights, name: str, device: torch.device) -> None:
        config = weights.config
        self._epsilon = config.norm_epsilon
        self._weight = weights.tensor(f"{name}.weight").to(device).float()
        self._bias = None if config.rmsnorm else weights.tensor(f"{name}.bias").to(device).float()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._bias is None:
            return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self._epsilon) * self._weight
        return nn.functional.layer_norm(hidden, self._weight.shape, self._weight, self._bias, self._epsilon)


class _Attention:
    def __init__(
        self,
        config: ModelConfig,
        window: int | None,
        qkv: Tensors,
        dense: Tensors,
        norms: tuple[Tensors, Tensors] | None,
        kv: tuple[Tensors, Tensors] | None,
    ) -> None:
        self._config, self._window, self._qkv, self._dense = config, window, qkv, dense
        self._norms, self._quantize_kv = norms, kv

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        config = self._config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        projected = self._qkv(hidden).unflatten(-1, (heads + 2 * kv_heads, config.head_size)).transpose(1, 2)
        query, key, value = projected.split([heads, kv_heads, kv_heads], dim=1)
        if self._norms is not None:
            query, key = (norm(states) for norm, states in zip(self._norms, (query, key), strict=True))
        if config.position_embedding_type == "rope_gpt_neox":
            cos, sin = rotary_table(config, hidden.shape[1], hidden.device, self._window is not None)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if self._quantize_kv is not None:
            key, value = (quantize(kv) for quantize, kv in zip(self._quantize_kv, (key, value), strict=True))
        key, value = (kv.repeat_interleave(heads // kv_heads, dim=1) for kv in (key, value))
        mixed = self._mix(query, key, value, _window_mask(self._window, hidden.shape[1], hidden.device))
        return self._dense(mixed.transpose(1, 2).flatten(2))

    def _mix(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Mixes values (batch, heads, seq, head_size) by the softmax of scores."""
        config = self._config
        scale = config.attention_scale or config.head_size**-0.5
        if config.attention_cap is None:
            return nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale
            )
        scores = _capped(query @ key.transpose(-1, -2) * scale, config.attention_cap)
        length = scores.shape[-1]
        seen = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril() if mask is None else mask
        return scores.masked_fill(~seen, -math.inf).softmax(-1) @ value


def _capped(values: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Keeps values smoothly between -cap and cap."""
    return values if cap is None else cap * torch.tanh(values / cap)


def _window_mask(window: int | None, length: int, device: torch.device) -> torch.Tensor | None:
    """Bool (length, length), true where a position attends to another; None where it attends to all before it."""
    if window is None or length <= window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


class _Mlp:
    def __init__(self, act: str, fc: Tensors, gate: Tensors | None, proj: Tensors) -> None:
        self._act, self._fc, self._gate, self._proj = _ACTIVATIONS[act], fc, gate, proj

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = self._act(self._fc(hidden))
        return self._proj(inner if self._gate is None else inner * self._gate(hidden))


class _Experts:
    """Experts stay as small as in the files, and are dequantized one at a time."""

    def __init__(self, act: str, top_k: int, router: torch.Tensor, fc: Sequence[Stack], proj: Sequence[Stack]) -> None:
        self._act, self._top_k, self._router = _ACTIVATIONS[act], top_k, router
        self._fc, self._proj = fc, proj

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.flatten(0, 1)
        top = nn.functional.linear(tokens, self._router).topk(self._top_k, dim=-1)
        shares = top.values.softmax(-1)
        mixed = torch.zeros_like(tokens)
        for index in top.indices.unique().tolist():
            rows, place = (top.indices == index).nonzero(as_tuple=True)
            # Experts hold [up; gate], the other way round than fc and gate of a dense MLP.
            up, gate = dequantized(self._fc[index])(tokens[rows]).chunk(2, dim=-1)
            outputs = dequantized(self._proj[index])(self._act(gate) * up)
            mixed.index_add_(0, rows, outputs * shares[rows, place, None])
        return mixed.view_as(hidden)


class _Layer:
    """One decoder layer, read and dequantized on construction."""

    def __init__(self, weights: Weights, layer: int, device: torch.device) -> None:
        config, prefix = weights.config, f"transformer.layers.{layer}."

        def load(name: str) -> Tensors:
            return dequantized(weights.linear(prefix + name, device))

        def norm(name: str) -> _Norm:
            return _Norm(weights, prefix + name, device)

        self._input_norm = norm("input_layernorm")
        self._mlp_norm = norm("pre_feedforward_layernorm" if config.post_norms else "post_layernorm")
        self._after_attention = norm("post_layernorm") if config.post_norms else _unchanged
        self._after_mlp = norm("post_feedforward_layernorm") if config.post_norms else _unchanged
        heads = (norm("attention.q_layernorm"), norm("attention.k_layernorm")) if config.qk_norm else None
        kv = weights.kv_cache(layer, device)
        self._attention = _Attention(
            config, config.window(layer), load("attention.qkv"), load("attention.dense"), heads, kv
        )
        self._mlp: _Mlp | _Experts
        if config.moe:
            router = weights.tensor(prefix + "mlp.router.weight").to(device).float()
            fc, proj = (weights.experts(f"{prefix}mlp.{name}", device) for name in ("fc", "proj"))
            self._mlp = _Experts(config.hidden_act, config.moe.top_k, router, fc, proj)
        else:
            gate = load("mlp.gate") if config.gated else None
            self._mlp = _Mlp(config.hidden_act, load("mlp.fc"), gate, load("mlp.proj"))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self._after_attention(self._attention(self._input_norm(hidden)))
        return hidden + self._after_mlp(self._mlp(self._mlp_norm(hidden)))


class _HybridLayer:
    """A layer of a hybrid: one norm, and a state space, attention or an MLP."""

    def __init__(self, weights: Weights, layer: int, sizes: Hybrid, device: torch.device) -> None:
        config, prefix = weights.config, f"transformer.layers.{layer}."

        def load(name: str) -> Tensors:
            return dequantized(weights.linear(prefix + name, device))

        def tensor(name: str) -> torch.Tensor:
            return weights.tensor(f"{prefix}ssm.{name}").to(device).float()

        self._norm = _Norm(weights, f"{prefix}norm", device)
        self._mix: Tensors
        if sizes.pattern[layer] == "M":
            self._mix = StateSpace(
                sizes,
                config.norm_epsilon,
                load("ssm.in_proj"),
                load("ssm.out_proj"),
                *map(tensor, ("conv1d.weight", "conv1d.bias", "norm.weight", "A_log", "D", "dt_bias")),
            )
        elif sizes.pattern[layer] == "*":
            kv = weights.kv_cache(layer, device)
            self._mix = _Attention(config, None, load("attention.qkv"), load("attention.dense"), None, kv)
        else:
            self._mix = _Mlp(config.hidden_act, load("mlp.fc"), None, load("mlp.proj"))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self._mix(self._norm(hidden))


def _unchanged(values: torch.Tensor) -> torch.Tensor:
    return values


class _Embedding:
    def __init__(self, weights: Weights, device: torch.device) -> None:
        config = weights.config
        self._words = weights.tensor("transformer.vocab_embedding.weight")
        self._positions = None
        if config.position_embedding_type == "learned_absolute":
            self._positions = weights.tensor("transformer.position_embedding.weight")
        # Gemma's factor has the precision of the model's dtype, in the reader and in the training code alike.
        dtype = getattr(torch, config.dtype)
        gemma = config.decoder.startswith("gemma")
        self._factor = torch.tensor(config.hidden_size**0.5, dtype=dtype).item() if gemma else 1.0
        self._device = device

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self._words[tokens].float() * self._factor
        if self._positions is not None:
            hidden = hidden + self._positions[: tokens.shape[1]].float()
        return hidden.to(self._device)


class _LmHead:
    def __init__(self, weights: Weights, device: torch.device) -> None:
        self._device, self._cap = device, weights.config.logit_cap
        self._linear: Tensors | None = None
        self._rows = None
        if weights.config.lm_head_is_shared:
            self._rows = weights.tensor("transformer.vocab_embedding.weight")
        else:
            (stored,) = weights.linear("lm_head", CPU)
            if stored.dequantize is None:
                self._rows = stored.weight
            else:
                self._linear = dequantized(weights.linear("lm_head", device))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return _capped(self._logits(hidden), self._cap)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._linear is not None:
            return self._linear(hidden)
        assert self._rows is not None
        blocks = (rows.to(self._device).float() for rows in self._rows.split(_LM_HEAD_ROWS))
        return torch.cat([nn.functional.linear(hidden, rows) for rows in blocks], dim=-1)


class FinalStates:
    """Hidden states of batches after a model's layers; logits are computed on request.

    The logits of a long document over a large vocabulary are larger than a layer: nobody should need all at once.
    """

    def __init__(self, hidden: list[torch.Tensor], norm: _Norm, head: _LmHead) -> None:
        self._hidden, self._norm, self._head = hidden, norm, head

    @torch.inference_mode()
    def logits(self, batch: int, positions: slice = slice(None)) -> torch.Tensor:
        """float32 (batch, positions, vocab_size) next-token logits of one batch, at some of its positions."""
        return self._head(self._norm(self._hidden[batch][:, positions]))


@torch.inference_mode()
def run_layers(
    weights: Weights,
    batches: Sequence[torch.Tensor],
    device: torch.device = CPU,
    follow: Callable[[], None] = lambda: None,
) -> FinalStates:
    """Runs a model over several batches of tokens, reading every weight once.

    Layers are the outer loop: memory holds one layer in float32 and the hidden states of all batches.

    Args:
        weights: The model.
        batches: int64 (batch, seq) each; lengths may differ between batches.
        device: Device to compute on.
        follow: Called after each layer.

    Raises:
        PtqError: The model breaks a rule that the computation depends on, or lacks a tensor; tokens out of range.
    """
    config = weights.config
    for tokens in batches:
        _require_tokens(config, tokens)
    embedding = _Embedding(weights, device)
    hidden = [embedding(tokens) for tokens in batches]
    del embedding
    for index in range(config.num_hidden_layers):
        hybrid = config.hybrid
        layer = _Layer(weights, index, device) if hybrid is None else _HybridLayer(weights, index, hybrid, device)
        hidden = [layer(states) for states in hidden]
        del layer
        follow()
    return FinalStates(hidden, _Norm(weights, "transformer.ln_f", device), _LmHead(weights, device))


def open_model(directory: Path | str) -> Weights:
    """Opens a directory to run it: an export in any format, or a checkpoint of any kind.

    Raises:
        PtqError: The directory is none of these, or breaks a rule that the computation depends on.
    """
    path = Path(directory)
    try:
        return _open(path)
    except PtqError:
        raise
    except Exception as error:  # descriptions from anywhere can break any assumption
        reason = f"{type(error).__name__}: {error}"
        raise PtqError(
            f"{path} does not describe a model that can be run ({reason}): copy or export it again"
        ) from error


def _open(path: Path) -> Weights:
    if is_hugging_face(path):
        weights: Weights = open_hugging_face(path)
    elif is_nemo(path):
        weights = open_nemo(path)
    elif is_megatron(path):
        weights = open_megatron(path)
    elif not (path / "config.json").exists():
        raise PtqError(_without_model(path))
    else:
        return _open_qnemo(path)
    problems = _activation_problems(weights.config)
    if problems:
        raise PtqError(f"{path} cannot be run: {problems[0]}")
    return weights


def _without_model(path: Path) -> str:
    if exports := exports_below(path):
        return f"{path} is not an export itself: give one of those in it, {', '.join(map(str, exports))}"
    return f"{path} holds no model: give an exported directory or a checkpoint"


def _open_qnemo(path: Path) -> Weights:
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    problems = [problem for rule in LAYOUT_RULES.values() for problem in rule(checkpoint.raw_config, config)]
    problems += _activation_problems(config)
    if problems:
        raise PtqError(f"{path} cannot be run: " + "; ".join(problems))
    return checkpoint


def _activation_problems(config: ModelConfig) -> list[str]:
    if config.hidden_act in _ACTIVATIONS:
        return []
    return [f"hidden_act {config.hidden_act!r} is not one of {', '.join(sorted(_ACTIVATIONS))}"]


def stream_logits(
    directory: Path | str, batches: Sequence[torch.Tensor], device: torch.device = CPU
) -> Iterator[torch.Tensor]:
    """Runs the directory over several batches of tokens, reading every weight once.

    Args:
        directory: A directory as :func:`open_model` takes it.
        batches: int64 (batch, seq) each; lengths may differ between batches.
        device: Device to compute on.

    Yields:
        float32 (batch, seq, vocab_size) logits for each batch, in order, on ``device``.

    Raises:
        PtqError: As in :func:`open_model` and :func:`run_layers`.
    """
    states = run_layers(open_model(directory), batches, device)
    for index in range(len(batches)):
        yield states.logits(index)


def logits(directory: Path | str, tokens: torch.Tensor, device: torch.device = CPU) -> torch.Tensor:
    """The next-token logits of a directory, activations and KV cache quantized as a server would.

    Args:
        directory: A directory as :func:`open_model` takes it.
        tokens: int64 (batch, seq); every position attends to itself and those before it.
        device: Device to compute on.

    Returns:
        float32 (batch, seq, vocab_size).

    Raises:
        PtqError: As in :func:`stream_logits`.
    """
    return next(stream_logits(directory, [tokens], device))


def _require_tokens(config: ModelConfig, tokens: torch.Tensor) -> None:
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        raise PtqError(f"tokens are {tokens.dtype} {tuple(tokens.shape)}, expected int64 (batch, seq)")
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < config.vocab_size:
        raise PtqError(f"tokens lie in [{tokens.min()}, {tokens.max()}], outside the vocabulary of {config.vocab_size}")
    if config.position_embedding_type == "learned_absolute" and tokens.shape[1] > config.max_position_embeddings:
        raise PtqError(f"{tokens.shape[1]} tokens in a row, more than the {config.max_position_embeddings} positions")
