# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The settings of a config.json: those that change nothing, and one spelling for those that have two.

A setting is harmless where it does not change the logits that a model computes from tokens. Imports nothing heavy.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nemo_ptq.errors import PtqError

# The kind of the file, and its writer.
_ORIGIN = (
    *("_commit_hash", "_model_name_or_path", "_name_or_path", "architectures", "auto_map", "is_llama_config"),
    *("model_type", "name_or_path"),
    *("torch_dtype", "dtype", "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version"),
)
# How a library computes: its kernels, its precision, and its outputs beside the logits.
_RUNTIME = (
    *("_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled", "attn_implementation"),
    *("attention_softmax_in_fp32", "inference_runner", "max_batch_size", "max_sequence_length"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "output_scores", "pad_key_length"),
    *("pre_allocate_kv_cache", "pretraining_tp", "return_dict", "return_dict_in_generate", "tf_legacy_loss"),
    *("scale_attention_softmax_in_fp32", "torchscript", "use_bfloat16", "use_cache", "validate_runner_input"),
)
# Which tokens are special, and how text is generated.
_GENERATION = (
    *(
        "bos_token_id",
        "cache_implementation",
        "decoder_start_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "tokenizer_class",
        "unk_token_id",
    ),
    *("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id"),
    *("forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size"),
    *("num_beam_groups", "num_beams", "num_return_sequences", "prefix", "remove_invalid_values"),
    *("repetition_penalty", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p"),
)
# How it was trained, and settings of other heads.
_TRAINING = (
    *("attention_dropout", "attn_pdrop", "embd_pdrop", "embedding_dropout", "hidden_dropout", "resid_pdrop"),
    *("residual_dropout", "initializer_range", "router_aux_loss_coef", "router_jitter_noise"),
    *("finetuning_task", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params"),
    *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
)
HARMLESS = frozenset((*_ORIGIN, *_RUNTIME, *_GENERATION, *_TRAINING))
"""Settings that are harmless whatever their value."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "chunk_size_feed_forward": (0,),
    "compression_config": ({},),
    "is_causal": (True,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "pruned_heads": ({},),
    "qk_layernorm": (False,),
    "quantization_config": ({},),
    "rope_interleaved": (False,),
    "scale_attn_weights": (True,),
    "tie_encoder_decoder": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}
"""Settings that are harmless with these values alone, where a class does not read them."""

# Fields of a rotary embedding that are settings of their own in the older spelling.
_ROTARY = ("rope_theta", "partial_rotary_factor")
_LONGEST_VALUE = 60


def check_tokens(content: Mapping[str, Any]) -> None:
    """Checks which tokens a config.json says are special: servers stop at them.

    Raises:
        PtqError: If one is not a number.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = content.get(name)
        numbers = given if isinstance(given, list) and given else [given]
        if given is not None and not all(type(number) is int for number in numbers):
            raise PtqError(
                f"config.json has {name} {shown(given)}: it must be a token's number, a list of them, or null"
            )


def with_one_spelling(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a config.json with one name for each.

    transformers 5 has ``rope_parameters`` in place of the older ``rope_theta``, ``partial_rotary_factor`` and
    ``rope_scaling``, and reads both; files may have both. The older names are kept here. Where layers with a window
    have a rotary embedding of their own, its base is ``rope_local_base_freq``.

    Raises:
        PtqError: If two spellings contradict each other.
    """
    settings = dict(content)
    new, old = settings.pop("rope_parameters", None), settings.get("rope_scaling")
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, Mapping):
            raise PtqError(f"config.json has {name} {shown(value)}: it must be an object or null")
        if value and None not in (kinds := (value.get("rope_type"), value.get("type"))) and kinds[0] != kinds[1]:
            raise PtqError(
                f"config.json has {name} of rope_type {shown(kinds[0])} and type {shown(kinds[1])}, which are one "
                "setting: leave the one that the model was trained with"
            )
    if new and "full_attention" in new:
        local, new = new.get("sliding_attention"), new["full_attention"]
        if not isinstance(new, Mapping) or not isinstance(local, Mapping) or _rotary(local).keys() != {"rope_type"}:
            raise PtqError(
                f"config.json has rope_parameters {shown(content['rope_parameters'])}, by kind of layer: there must be "
                "full_attention, and sliding_attention with a rope_theta and no scaling"
            )
        base, given = local.get("rope_theta"), settings.get("rope_local_base_freq")
        if None not in (base, given) and base != given:
            raise PtqError(
                f"config.json has rope_local_base_freq {shown(given)} and, for layers with a window, rope_theta "
                f"{shown(base)}: leave the one that the model was trained with"
            )
        if base is not None:
            settings["rope_local_base_freq"] = base
    if new and old and _rotary(new) != _rotary(old):
        raise PtqError(
            f"config.json has rope_parameters {shown(new)} and rope_scaling {shown(old)}, which contradict one "
            "another: leave the one that the model was trained with"
        )
    rotary = {**(old or {}), **(new or {})}
    for name in _ROTARY:
        value = rotary.pop(name, None)
        if value is None:
            continue
        if settings.get(name, value) != value:
            raise PtqError(
                f"config.json has {name} {settings[name]!r} and, for the rotary embedding, {value!r}: leave the one "
                "that the model was trained with"
            )
        settings[name] = value
    kind = rotary.get("rope_type", rotary.get("type"))
    if rotary.keys() <= {"rope_type", "type"} and kind in (None, "default"):
        rotary = {}
    if new is not None or old is not None:
        settings["rope_scaling"] = rotary or None
    return settings


def _rotary(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling of a rotary embedding, in either spelling."""
    kind = fields.get("rope_type", fields.get("type", "default"))
    return {"rope_type": kind} | {
        name: value for name, value in fields.items() if name not in ("rope_type", "type", *_ROTARY)
    }


def check_known(
    settings: Mapping[str, Any],
    known: Collection[str],
    neutral: Mapping[str, tuple[Any, ...]],
    architecture: str,
    layer_types: Sequence[str],
) -> None:
    """Refuses settings that may change what a model computes, and that nothing here reads.

    Args:
        settings: From :func:`with_one_spelling`.
        known: The names of those that are read, or harmless in the model's class.
        neutral: Those that are harmless in the model's class with these values alone.
        architecture: The model's class.
        layer_types: The attention types of the model's layers, in config.json's words: one for each layer, or one for
            all.

    Raises:
        PtqError: If there are any.
    """
    values = {**NEUTRAL, **neutral}

    def is_harmless(name: str, value: Any) -> bool:
        if value is None or name in known or name in HARMLESS:
            return True
        if name == "layer_types":  # repeats what other settings say
            return isinstance(value, list) and value == list(layer_types) * (len(value) // len(layer_types))
        return any(type(value) is type(one) and value == one for one in values.get(name, ()))

    unknown = [f"{name} {shown(value)}" for name, value in settings.items() if not is_harmless(name, value)]
    if unknown:
        raise PtqError(
            f"config.json has {', '.join(unknown)}: the import of {architecture} does not know what that changes in "
            "the model; take it out of config.json if it changes nothing"
        )


def check_size(name: str, value: Any, *, optional: bool = False) -> None:
    """Refuses a value that is not a size.

    Args:
        name: The setting.
        value: Its value.
        optional: Whether null stands for none.

    Raises:
        PtqError: If it is not a positive whole number.
    """
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PtqError(
            f"config.json has {name} {shown(value)}, which is no size: it must be a positive whole number"
            f"{', or null where there is none' if optional else ''}"
        )


def check_number(name: str, value: Any, above: float = 0.0, most: float = 1e12) -> None:
    """Refuses a value that is not a possible base or epsilon.

    Args:
        name: The setting.
        value: Its value.
        above: The value must be larger than this.
        most: The largest value.

    Raises:
        PtqError: If it is not such a number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not (above < value <= most):
        raise PtqError(
            f"config.json has {name} {shown(value)}: it must be a number above {above:g}, and at most {most:g}"
        )


def shown(value: Any) -> str:
    """Returns a setting's value as messages show it, which is short."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
