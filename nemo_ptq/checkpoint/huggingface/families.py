# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What differs between model families: one record says how a family's configuration and tensors become NeMo's.

The results are those of NeMo's own importers (`nemo.collections.llm.gpt.model`). Where an importer there loses
something that the model needs, the record keeps it and says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nemo_ptq.errors import PtqError

if TYPE_CHECKING:  # a second of imports, for a type
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Dims:
    """Sizes that decide the order of rows.

    Attributes:
        query_groups: Number of key/value heads.
        padded_vocab: Rows of the embedding and of the output layer in NeMo.
    """

    query_groups: int
    padded_vocab: int


def keep(dims: Dims, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as it is."""
    return tensor


def pad_vocab(dims: Dims, tensor: torch.Tensor) -> torch.Tensor:
    """Append rows of zeros: (vocab, hidden) becomes (padded_vocab, hidden)."""
    missing = dims.padded_vocab - len(tensor)
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor


def interleave_qkv(dims: Dims, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Order rows as Megatron does: for each query group its query heads, its key head, its value head.

    Args:
        dims: Holds the number of query groups.
        q: (heads * head_dim, ...), weight or bias.
        k: (query_groups * head_dim, ...).
        v: (query_groups * head_dim, ...).

    Returns:
        ((heads + 2 * query_groups) * head_dim, ...).
    """
    by_group = [tensor.reshape(dims.query_groups, -1, *tensor.shape[1:]) for tensor in (q, k, v)]
    return torch.cat(by_group, dim=1).flatten(0, 1)


def stack_gate_up(dims: Dims, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Stack gate and up projection, each (ffn, hidden), as (2 * ffn, hidden)."""
    return torch.cat([gate, up])


@dataclass(frozen=True)
class Rule:
    """How one Megatron tensor is made.

    Attributes:
        target: Megatron's name, without layer and expert numbers.
        sources: Hugging Face's names, with `{layer}` and `{expert}` where they are numbered.
        combine: Makes the target of the dims and the sources.
    """

    target: str
    sources: tuple[str, ...]
    combine: Callable[..., torch.Tensor] = keep


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        architecture: Hugging Face's model class, as in `architectures` of config.json.
        hf_config: Hugging Face's configuration class in transformers.
        module: Module of `nemo.collections.llm.gpt.model` with NeMo's classes.
        model: NeMo's model class there.
        config: Gives NeMo's configuration class there, and the arguments that only this family has.
        fields: NeMo's configuration fields and Hugging Face's names for them.
        fixed: What NeMo's class cannot vary: for each setting of config.json the values that it stands for.
        settings: The other way round: settings of config.json from NeMo's configuration, apart from what `fields`,
            `fixed` and the heads' sizes give.
        rules: How tensors are made, apart from the output layer.
        can_tie: Whether embedding and output layer can be one tensor in NeMo; if not, a tied one is written twice.
    """

    architecture: str
    hf_config: str
    module: str
    model: str
    config: Callable[["PretrainedConfig"], tuple[str, dict[str, Any]]]
    fields: Mapping[str, str]
    fixed: Mapping[str, tuple[Any, ...]]
    settings: Callable[[Any], dict[str, Any]]
    rules: tuple[Rule, ...]
    can_tie: bool = False

    @property
    def embedding(self) -> str:
        """Hugging Face's name of the embedding."""
        return next(rule.sources[0] for rule in self.rules if rule.target == "embedding.word_embeddings.weight")


# Fields of NeMo's configurations, and what Hugging Face mostly calls them.
_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "init_method_std": "initializer_range",
    "layernorm_epsilon": "rms_norm_eps",
    "seq_length": "max_position_embeddings",
    "rotary_base": "rope_theta",
}
# NeMo computes each of these with the tanh approximation, as the models were trained.
_GELU = ("gelu_pytorch_tanh", "gelu", "gelu_new", "gelu_fast")


def _with_bias(target: str, *sources: str, combine: Callable[..., torch.Tensor] = keep) -> tuple[Rule, Rule]:
    """Rules for the weight and the bias of a module."""
    weight, bias = (
        Rule(target + name, tuple(f"{source}.{name}" for source in sources), combine) for name in ("weight", "bias")
    )
    return weight, bias


_LAYER = "model.layers.{layer}."
_QKV = tuple(f"{_LAYER}self_attn.{name}_proj" for name in "qkv")
_PROJ = _LAYER + "self_attn.o_proj"
_INPUT_NORM = _LAYER + "input_layernorm"
_MLP_NORM = _LAYER + "post_attention_layernorm"

_EMBEDDING = Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), pad_vocab)
_ATTENTION = (
    Rule("decoder.layers.self_attention.linear_qkv.weight", tuple(f"{name}.weight" for name in _QKV), interleave_qkv),
    Rule("decoder.layers.self_attention.linear_proj.weight", (f"{_PROJ}.weight",)),
)
_GATED_MLP = (
    Rule(
        "decoder.layers.mlp.linear_fc1.weight",
        (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
        stack_gate_up,
    ),
    Rule("decoder.layers.mlp.linear_fc2.weight", (_LAYER + "mlp.down_proj.weight",)),
)
_RMS_NORMS = (
    Rule("decoder.layers.self_attention.linear_qkv.layer_norm_weight", (f"{_INPUT_NORM}.weight",)),
    Rule("decoder.layers.mlp.linear_fc1.layer_norm_weight", (f"{_MLP_NORM}.weight",)),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
)
_LAYER_NORMS = (
    *_with_bias("decoder.layers.self_attention.linear_qkv.layer_norm_", _INPUT_NORM),
    *_with_bias("decoder.layers.mlp.linear_fc1.layer_norm_", _MLP_NORM),
    *_with_bias("decoder.final_layernorm.", "model.norm"),
)
_LLAMA_RULES = (_EMBEDDING, *_ATTENTION, *_GATED_MLP, *_RMS_NORMS)


# For each type of rope_scaling NeMo's class and its fields. NeMo's importer keeps nothing but the factor of llama3
# scaling, and nothing at all of linear scaling.
_ROPE_SCALING: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "default": ("LlamaConfig", {}),
    "linear": ("LlamaConfig", {"seq_len_interpolation_factor": "factor"}),
    "llama3": (
        "Llama31Config",
        {
            "scale_factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "old_context_len": "original_max_position_embeddings",
        },
    ),
}


def _llama_config(hf: "PretrainedConfig") -> tuple[str, dict[str, Any]]:
    scaling = hf.rope_scaling or {"rope_type": "default"}
    kind = str(scaling.get("rope_type"))
    if kind not in _ROPE_SCALING:
        raise PtqError(f"config.json has rope_scaling of type {kind!r}; NeMo's Llama knows {', '.join(_ROPE_SCALING)}")
    name, fields = _ROPE_SCALING[kind]
    return name, {"vocab_size": hf.vocab_size} | {ours: scaling[theirs] for ours, theirs in fields.items()}


def _llama_settings(nemo: Any) -> dict[str, Any]:
    for kind, (_, fields) in _ROPE_SCALING.items():
        # Derived classes of NeMo's, such as Llama31Config8B, have the fields of their base.
        values = {theirs: getattr(nemo, ours, None) for ours, theirs in fields.items()}
        if fields and None not in values.values():
            return {"rope_scaling": {"rope_type": kind, **values}}
    return {"rope_scaling": None}


def _mistral_config(hf: "PretrainedConfig") -> tuple[str, dict[str, Any]]:
    if hf.sliding_window is None:  # NeMo's importer then leaves seq_length empty
        return "MistralConfig7B", {"window_size": None, "cp_comm_type": None}
    return "MistralConfig7B", {"seq_length": hf.sliding_window, **_sliding_window(hf)}


def _mixtral_config(hf: "PretrainedConfig") -> tuple[str, dict[str, Any]]:
    return "MixtralConfig8x22B" if hf.hidden_size == 6144 else "MixtralConfig8x7B", {
        "max_position_embeddings": hf.max_position_embeddings,
        "num_moe_experts": hf.num_local_experts,
        "moe_router_topk": hf.num_experts_per_tok,
        "make_vocab_size_divisible_by": 128,
    }


def _starcoder_config(hf: "PretrainedConfig") -> tuple[str, dict[str, Any]]:
    # Without multi-query attention the fused projection has Megatron's order as well, with a group for each head.
    return "StarcoderConfig", {
        "ffn_hidden_size": hf.n_inner or 4 * hf.n_embd,
        "num_query_groups": 1 if hf.multi_query else hf.n_head,
    }


def _starcoder2_config(hf: "PretrainedConfig") -> tuple[str, dict[str, Any]]:
    # NeMo's importer drops the window.
    return "Starcoder2Config", {} if hf.sliding_window is None else _sliding_window(hf)


def _mixtral_settings(nemo: Any) -> dict[str, Any]:
    return {
        "num_local_experts": nemo.num_moe_experts,
        "num_experts_per_tok": nemo.moe_router_topk,
        "max_position_embeddings": nemo.max_position_embeddings,
    }


def _starcoder_settings(nemo: Any) -> dict[str, Any]:
    return {"n_inner": nemo.ffn_hidden_size, "multi_query": nemo.num_query_groups == 1}


def _sliding_window_setting(nemo: Any) -> dict[str, Any]:
    window = nemo.window_size
    return {"sliding_window": None if window is None else window[0]}


def _sliding_window(hf: "PretrainedConfig") -> dict[str, Any]:
    return {"window_size": [hf.sliding_window, 0], "cp_comm_type": "a2a"}


_LLAMA = Family(
    architecture="LlamaForCausalLM",
    hf_config="LlamaConfig",
    module="llama",
    model="LlamaModel",
    config=_llama_config,
    fields=_FIELDS,
    fixed={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    settings=_llama_settings,
    rules=_LLAMA_RULES,
    can_tie=True,
)
_MISTRAL = Family(
    architecture="MistralForCausalLM",
    hf_config="MistralConfig",
    module="mistral",
    model="MistralModel",
    config=_mistral_config,
    fields=_FIELDS,
    fixed={"hidden_act": ("silu",), "rope_scaling": (None,)},
    settings=_sliding_window_setting,
    rules=_LLAMA_RULES,
)
_EXPERT = _LAYER + "block_sparse_moe.experts.{expert}."
_MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    hf_config="MixtralConfig",
    module="mixtral",
    model="MixtralModel",
    config=_mixtral_config,
    fields=_FIELDS,
    fixed={"hidden_act": ("silu",), "rope_scaling": (None,), "sliding_window": (None,)},
    settings=_mixtral_settings,
    rules=(
        _EMBEDDING,
        Rule("decoder.layers.self_attention.linear_qkv.layer_norm_weight", (f"{_INPUT_NORM}.weight",)),
        *_ATTENTION,
        Rule("decoder.layers.pre_mlp_layernorm.weight", (f"{_MLP_NORM}.weight",)),
        Rule("decoder.layers.mlp.router.weight", (_LAYER + "block_sparse_moe.gate.weight",)),
        Rule(
            "decoder.layers.mlp.experts.experts.linear_fc1.weight",
            (_EXPERT + "w1.weight", _EXPERT + "w3.weight"),
            stack_gate_up,
        ),
        Rule("decoder.layers.mlp.experts.experts.linear_fc2.weight", (_EXPERT + "w2.weight",)),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    ),
)
_GEMMA = Family(
    architecture="GemmaForCausalLM",
    hf_config="GemmaConfig",
    module="gemma",
    model="GemmaModel",
    config=lambda hf: ("GemmaConfig", {}),  # the norms' weights are centred on zero on both sides
    fields=_FIELDS,
    fixed={"hidden_act": _GELU, "attention_bias": (False,), "rope_scaling": (None,), "tie_word_embeddings": (True,)},
    settings=lambda nemo: {},
    rules=_LLAMA_RULES,
    can_tie=True,
)
_BIGCODE_LAYER = "transformer.h.{layer}."
_STARCODER = Family(
    architecture="GPTBigCodeForCausalLM",
    hf_config="GPTBigCodeConfig",
    module="starcoder",
    model="StarcoderModel",
    config=_starcoder_config,
    fields={
        "num_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "init_method_std": "initializer_range",
        "layernorm_epsilon": "layer_norm_epsilon",
        "seq_length": "n_positions",
    },
    fixed={"activation_function": _GELU, "scale_attn_weights": (True,)},
    settings=_starcoder_settings,
    rules=(
        Rule("embedding.word_embeddings.weight", ("transformer.wte.weight",), pad_vocab),
        Rule("embedding.position_embeddings.weight", ("transformer.wpe.weight",)),
        *_with_bias("decoder.layers.self_attention.linear_qkv.layer_norm_", _BIGCODE_LAYER + "ln_1"),
        *_with_bias("decoder.layers.self_attention.linear_qkv.", _BIGCODE_LAYER + "attn.c_attn"),
        *_with_bias("decoder.layers.self_attention.linear_proj.", _BIGCODE_LAYER + "attn.c_proj"),
        *_with_bias("decoder.layers.mlp.linear_fc1.layer_norm_", _BIGCODE_LAYER + "ln_2"),
        *_with_bias("decoder.layers.mlp.linear_fc1.", _BIGCODE_LAYER + "mlp.c_fc"),
        *_with_bias("decoder.layers.mlp.linear_fc2.", _BIGCODE_LAYER + "mlp.c_proj"),
        *_with_bias("decoder.final_layernorm.", "transformer.ln_f"),
    ),
)
_STARCODER2 = Family(
    architecture="Starcoder2ForCausalLM",
    hf_config="Starcoder2Config",
    module="starcoder2",
    model="Starcoder2Model",
    config=_starcoder2_config,
    fields=_FIELDS | {"layernorm_epsilon": "norm_epsilon"},
    fixed={"hidden_act": _GELU, "use_bias": (True,), "rope_scaling": (None,)},
    settings=_sliding_window_setting,
    rules=(
        _EMBEDDING,
        *_with_bias("decoder.layers.self_attention.linear_qkv.", *_QKV, combine=interleave_qkv),
        *_with_bias("decoder.layers.self_attention.linear_proj.", _PROJ),
        *_with_bias("decoder.layers.mlp.linear_fc1.", _LAYER + "mlp.c_fc"),
        *_with_bias("decoder.layers.mlp.linear_fc2.", _LAYER + "mlp.c_proj"),
        *_LAYER_NORMS,
    ),
)
_NEMOTRON = Family(
    architecture="NemotronForCausalLM",
    hf_config="NemotronConfig",
    module="nemotron",
    model="NemotronModel",
    config=lambda hf: ("NemotronConfig", {}),  # the norms' weights are centred on zero on both sides
    fields=_FIELDS | {"layernorm_epsilon": "norm_eps", "rotary_percent": "partial_rotary_factor"},
    fixed={"hidden_act": ("relu2",), "attention_bias": (False,), "mlp_bias": (False,), "rope_scaling": (None,)},
    settings=lambda nemo: {},
    rules=(
        _EMBEDDING,
        *_ATTENTION,
        Rule("decoder.layers.mlp.linear_fc1.weight", (_LAYER + "mlp.up_proj.weight",)),
        Rule("decoder.layers.mlp.linear_fc2.weight", (_LAYER + "mlp.down_proj.weight",)),
        *_LAYER_NORMS,
    ),
)

FAMILIES: Mapping[str, Family] = {
    family.architecture: family for family in (_LLAMA, _MISTRAL, _MIXTRAL, _GEMMA, _STARCODER, _STARCODER2, _NEMOTRON)
}

# Known families that the readers of quantized checkpoints cannot serve.
REFUSED = ("FalconForCausalLM", "RWForCausalLM")
