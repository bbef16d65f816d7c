# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The valid content of generation_config.json, known without transformers.

Everything that transformers' GenerationConfig refuses is refused here, and so are values of types that servers do not
expect: a plan, which does not import transformers, and a job have one verdict.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_ptq.errors import PtqError, did_you_mean
from nemo_ptq.models.hf_settings import shown

CACHES = (
    *("static", "offloaded_static", "dynamic", "dynamic_full", "offloaded", "quantized"),
    *("sliding_window", "hybrid", "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked"),
)
"""The KV caches that transformers has names for."""

# Arguments of generate() that transformers does not take from the file; and objects that a file cannot hold.
_NOT_SETTINGS = (
    *("assistant_model", "compile_config", "logits_processor", "negative_prompt_attention_mask", "negative_prompt_ids"),
    *("prefix_allowed_tokens_fn", "stopping_criteria", "streamer", "synced_gpus", "use_model_defaults"),
    "watermarking_config",
)


def _is_whole(value: Any, least: int = 0) -> bool:
    return type(value) is int and value >= least


@dataclass(frozen=True)
class _Kind:
    """The values that some settings have.

    Attributes:
        says: The condition on them, in words.
        holds: Whether a value is one of them.
    """

    says: str
    holds: Callable[[Any], bool]


_SWITCH = _Kind("true or false", lambda value: type(value) is bool)
_NUMBER = _Kind("a number", lambda value: type(value) in (int, float))
_COUNT = _Kind("a whole number, and not negative", _is_whole)
_AT_LEAST_ONE = _Kind("a whole number of 1 or more", lambda value: _is_whole(value, 1))
_TOKEN = _Kind("a token's number", lambda value: type(value) is int)
_TOKENS = _Kind(
    "a token's number, or a list of them",
    lambda value: type(value) is int or (isinstance(value, list) and all(type(token) is int for token in value)),
)
_KINDS: Mapping[str, _Kind] = {
    **dict.fromkeys(("do_sample", "renormalize_logits", "remove_invalid_values", "use_cache"), _SWITCH),
    **dict.fromkeys(("diversity_penalty", "epsilon_cutoff", "eta_cutoff", "guidance_scale"), _NUMBER),
    **dict.fromkeys(("length_penalty", "max_time", "min_p", "penalty_alpha", "repetition_penalty"), _NUMBER),
    **dict.fromkeys(("temperature", "top_k", "top_p", "typical_p"), _NUMBER),
    **dict.fromkeys(("max_length", "min_length", "min_new_tokens", "no_repeat_ngram_size"), _COUNT),
    **dict.fromkeys(("max_new_tokens", "num_beam_groups", "num_beams", "num_return_sequences"), _AT_LEAST_ONE),
    "pad_token_id": _TOKEN,
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id", "eos_token_id", "suppress_tokens"), _TOKENS),
    **dict.fromkeys(("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"), _TOKENS),
    "early_stopping": _Kind('true, false or "never"', lambda value: type(value) is bool or value == "never"),
}
# Settings whose absence is no value in transformers.
_NEVER_NULL = ("early_stopping", "num_beams", "num_return_sequences")


def check_generation(content: Mapping[str, Any]) -> None:
    """Checks the content of a generation_config.json; names unknown to transformers are left to the model.

    Raises:
        PtqError: If transformers refuses it, or a value has a wrong type.
    """
    for name, value in content.items():
        if value is None and name not in _NEVER_NULL:
            continue
        if name in _NOT_SETTINGS:
            raise PtqError(
                f"generation_config.json has {name}, which is no setting that a file can hold: take it out, and give "
                "it to generate()"
            )
        if (kind := _KINDS.get(name)) is not None and not kind.holds(value):
            raise PtqError(f"generation_config.json has {name} {shown(value)}: it must be {kind.says}, or left out")
        if name == "cache_implementation" and value not in CACHES:
            raise PtqError(
                f"generation_config.json has cache_implementation {shown(value)}"
                f"{did_you_mean(str(value), CACHES) or ': take it out'} (transformers has {', '.join(CACHES)})"
            )
    beams, sequences = content.get("num_beams", 1), content.get("num_return_sequences", 1)
    if sequences > 1 and (sequences > beams if beams > 1 else not content.get("do_sample", False)):
        raise PtqError(
            f"generation_config.json has num_return_sequences {sequences} with num_beams {beams}: it must be 1, at "
            "most num_beams, or with a single beam have do_sample true"
        )
