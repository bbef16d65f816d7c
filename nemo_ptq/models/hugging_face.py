# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model class, and NeMo's configuration for its config.json. Imports nothing heavy.

The results are those of NeMo's own importers (``nemo.collections.llm.gpt.model``). Where an importer there loses
something that the model needs, the family keeps it and says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_ptq.errors import PtqError
from nemo_ptq.models.hf_settings import check_known, check_number, check_size, check_tokens, shown, with_one_spelling
from nemo_ptq.models.mapping import EMBEDDING, OUTPUT, QKV, WeightRule
from nemo_ptq.models.spec import NUMBER_LIMITS

Settings = Mapping[str, Any]
# NeMo's own models.
NEMO = "nemo.collections.llm.gpt.model."
# Fields of NeMo's configurations that are sizes.
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length")
# Fixes for settings that NeMo's classes cannot have, where there are any.
WAYS_OUT = {
    "rope_scaling": (
        ": if it was added for longer texts, take it out, and give it to the server; a model that was trained with it "
        "cannot be quantized"
    )
}
_WAY_OUT = (
    ": if the model was trained with that, it cannot be quantized; otherwise give the config.json that it was "
    "published with"
)
# Sizes of a mixture of experts.
_OF_EXPERTS = ("num_local_experts", "num_experts_per_tok", "moe_intermediate_size")
# Settings that every class may have.
_COMMON = ("vocab_size", "num_key_value_heads", "head_dim", "tie_word_embeddings")


def alike_layers(settings: Settings) -> Sequence[str]:
    """Returns the attention type of all layers, for classes whose `sliding_window` holds for all."""
    return ("full_attention" if settings.get("sliding_window") is None else "sliding_attention",)


@dataclass(frozen=True)
class HuggingFaceClass:
    """A model class of Hugging Face's.

    Attributes:
        architecture: Its name, as in `architectures` of config.json.
        config_class: Its configuration class in transformers.
        nemo_model: NeMo's model class, with its module.
        nemo_config: Gives the name of NeMo's configuration class in the same module, and the arguments that only this
            class has, from the settings of config.json.
        nemo_settings: The other way round: settings of config.json from NeMo's configuration, apart from what
            `fields`, `fixed` and the heads' sizes give.
        nemo_fixed: Fields of NeMo's configuration class that config.json has no setting for.
        defaults: The settings that are read here, and what transformers' configuration class fills in for them.
        fields: NeMo's configuration fields, and Hugging Face's names for them.
        fixed: Settings that NeMo's class cannot vary: for each setting of config.json, the values that it supports.
        rules: Names of the tensors, except the output layer.
        aliases: Common settings that this class has another name for.
        output_layer: Hugging Face's name of the output layer.
        can_tie: Whether embedding and output layer can be one tensor in NeMo; if not, a tied one is written twice.
        harmless: Further settings that do not change what the model computes.
        neutral: Further settings that do not change it with these values alone.
        written: Settings that replace the source's in an export's config.json.
        layer_types: The layers' attention types, from the settings of config.json: one for each layer, or one for all.
        model_type: The `model_type` of config.json, for a class that not every version of transformers has.
        one_spelling: Gives settings that files spell in several ways one name and one value.
    """

    architecture: str
    config_class: str
    nemo_model: str
    nemo_config: Callable[[Settings], tuple[str, dict[str, Any]]]
    nemo_settings: Callable[[Any], dict[str, Any]]
    nemo_fixed: Settings
    defaults: Settings
    fields: Mapping[str, str]
    fixed: Mapping[str, tuple[Any, ...]]
    rules: Sequence[WeightRule]
    aliases: Mapping[str, str] = field(default_factory=dict)
    output_layer: str = "lm_head"
    can_tie: bool = False
    harmless: Sequence[str] = ()
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    written: Settings = field(default_factory=dict)
    layer_types: Callable[[Settings], Sequence[str]] = alike_layers
    model_type: str | None = None
    one_spelling: Callable[[Settings], dict[str, Any]] = dict

    @property
    def nemo_module(self) -> str:
        """The module with NeMo's classes."""
        return self.nemo_model.rpartition(".")[0]

    @property
    def embedding(self) -> str:
        """Hugging Face's name of the embedding's weight."""
        return next(rule.sources[""] for rule in self.rules if rule.target == f"{EMBEDDING}.weight")

    @property
    def splits_qkv(self) -> bool:
        """Whether queries, keys and values are separate layers."""
        return any(tuple(rule.sources) == QKV and not rule.is_fused for rule in self.rules)

    @property
    def orders_qkv(self) -> bool:
        """Whether all queries come before all keys and these before all values, in one layer or in three."""
        return any(tuple(rule.sources) == QKV for rule in self.rules)

    def module_names(self) -> Mapping[str, Mapping[str, str]]:
        """Returns Hugging Face's names of every Megatron module.

        Returns:
            By Megatron's name of a module, with "{layer}" and "{expert}" for the numbers: the name of each group of
            its rows, "" where they are together. Groups with one name are one layer, in which they follow each other.
        """
        weights = [rule for rule in self.rules if rule.field != "bias"]
        return {OUTPUT: {"": self.output_layer}} | {
            rule.module: {rows: name.rpartition(".")[0] for rows, name in rule.sources.items()} for rule in weights
        }

    def read(self, content: Settings) -> Settings:
        """Returns the settings of a config.json, those that it leaves out and the common names included.

        Args:
            content: The file's content, in the spelling of transformers 4 or 5.

        Raises:
            PtqError: If a setting is missing, is not known, or has a value that NeMo's class or no model can have.
        """
        check_tokens(content)
        given = self._with_own_names(with_one_spelling(self.one_spelling(content)))
        settings = {**self.defaults, **given}
        missing = sorted({*self.fields.values(), *self.aliases.values()} - settings.keys())
        if missing:
            raise PtqError(f"config.json has no {', '.join(missing)}: give the file that the model was published with")
        settings |= {common: settings[own] for common, own in self.aliases.items()}
        self._check_values(settings)
        check_known(given, self._known, self.neutral, self.architecture, self.layer_types(settings))
        for name, allowed in self.fixed.items():
            value = settings.get(name)
            # A switch that is null is off.
            if value not in allowed and not (value is None and False in allowed):
                values, model = " or ".join(map(shown, allowed)), self.nemo_model.rpartition(".")[2]
                raise PtqError(
                    f"config.json has {name} {shown(value)}, but NeMo's {model} can only have {values}"
                    f"{WAYS_OUT.get(name, _WAY_OUT)}"
                )
        return settings

    def _with_own_names(self, given: Settings) -> dict[str, Any]:
        """The settings with this class's own names alone: versions of transformers differ in which they write."""
        settings = {name: value for name, value in given.items() if name not in self.aliases}
        for common, own in self.aliases.items():
            if common in given and settings.setdefault(own, given[common]) != given[common]:
                raise PtqError(
                    f"config.json has {own} {shown(settings[own])} and {common} {shown(given[common])}, which are one "
                    "setting: leave the one that the model was trained with"
                )
        return settings

    @property
    def _known(self) -> frozenset[str]:
        """The settings that are read, or need not be."""
        named = (self.defaults, self.fields.values(), self.aliases, self.aliases.values(), self.fixed, self.harmless)
        return frozenset(_COMMON).union(*named)

    def _check_values(self, settings: Settings) -> None:
        for field_name in (name for name in _SIZES if name in self.fields):
            check_size(self.fields[field_name], settings[self.fields[field_name]])
        for field_name, limits in NUMBER_LIMITS.items():
            if field_name in self.fields:
                check_number(self.fields[field_name], settings[self.fields[field_name]], *limits)
        check_size("vocab_size", settings.get("vocab_size"))
        for name in ("num_key_value_heads", "head_dim", "sliding_window", "n_inner"):
            check_size(name, settings.get(name), optional=True)
        for own in (self.aliases.get(name, name) for name in _OF_EXPERTS):
            check_size(own, settings.get(own), optional=self.defaults.get(own) is None)
        experts, chosen = settings.get("num_local_experts"), settings.get("num_experts_per_tok")
        if experts is not None and chosen is not None and chosen > experts:
            raise PtqError(
                f"config.json has num_experts_per_tok {chosen}, and only {experts} experts: give the config.json that "
                "the model was published with"
            )
        if (tied := settings.get("tie_word_embeddings")) not in (True, False, None):
            raise PtqError(f"config.json has tie_word_embeddings {shown(tied)}: it must be true or false")
        heads, groups = settings["num_attention_heads"], settings.get("num_key_value_heads")
        for name, whole, divisor in (
            ("num_key_value_heads", heads, groups or 1),
            ("num_attention_heads", settings["hidden_size"] if settings.get("head_dim") is None else heads, heads),
        ):
            if whole % divisor:
                raise PtqError(
                    f"config.json has {name} {divisor}, which does not divide {whole}: give the config.json that the "
                    "model was published with"
                )

    def nemo_arguments(self, settings: Settings) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Returns NeMo's configuration of a model.

        Args:
            settings: From :meth:`read`.

        Returns:
            The name of NeMo's class, its arguments that every family has, and those that replace or add to them.

        Raises:
            PtqError: If NeMo has no such model.
        """
        name, special = self.nemo_config(settings)
        heads = settings["num_attention_heads"]
        common = {
            **{ours: settings[theirs] for ours, theirs in self.fields.items()},
            "num_query_groups": settings.get("num_key_value_heads") or heads,
            "kv_channels": settings.get("head_dim") or settings["hidden_size"] // heads,
            "share_embeddings_and_output_weights": self.can_tie and bool(settings["tie_word_embeddings"]),
        }
        return name, common, special


def sizes(*values: int, positions: int, **others: Any) -> dict[str, Any]:
    """Returns the defaults of a class of transformers'.

    Args:
        values: Vocabulary, hidden size, inner size, layers, heads.
        positions: Longest sequence.
        others: Further defaults, by their names.
    """
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    common = {"initializer_range": 0.02, "rope_theta": 10000.0, "tie_word_embeddings": False, "rope_scaling": None}
    return {**dict(zip(names, values, strict=True)), "max_position_embeddings": positions, **common, **others}


# Fields of NeMo's configurations, and what Hugging Face mostly calls them.
FIELDS: dict[str, str] = {
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
GELU = ("gelu_pytorch_tanh", "gelu", "gelu_new", "gelu_fast")


def sliding_window_fields(settings: Settings) -> dict[str, Any]:
    """Returns NeMo's fields for a model that attends to the last positions only.

    The number is Hugging Face's, as NeMo's importers and exporters have it: a position counts as one that it attends to
    itself. Megatron's own modules would attend to one more.
    """
    return {"window_size": [settings["sliding_window"], 0], "cp_comm_type": "a2a"}


def sliding_window_setting(nemo: Any) -> dict[str, Any]:
    """Returns config.json's settings for the positions that a model attends to, from NeMo's configuration."""
    window = nemo.window_size
    return {"sliding_window": None if window is None else window[0]}


# Fields of NeMo's GPTConfig, the base of all its classes, that Megatron has with other defaults or not at all.
_BASE: Settings = {
    "rotary_percent": 1.0,
    "seq_len_interpolation_factor": None,
}
ZERO_CENTERED: dict[str, Any] = {"layernorm_zero_centered_gamma": True}
"""Fields of NeMo's classes whose norms add one to their weights."""


def llama_like(activation: str) -> dict[str, Any]:
    """Returns fixed fields of NeMo's classes with RMSNorm, a gated MLP and no biases."""
    return {
        **_BASE,
        "normalization": "RMSNorm",
        "activation_func": activation,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
    }


def gpt_like(activation: str, *, bias: bool, positions: str = "rope") -> dict[str, Any]:
    """Returns fixed fields of NeMo's classes with LayerNorm and an MLP without a gate."""
    return {
        **_BASE,
        "normalization": "LayerNorm",
        "activation_func": activation,
        "gated_linear_unit": False,
        "add_bias_linear": bias,
        "position_embedding_type": positions,
    }
