# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What transformers refuses of a generation_config.json is known without transformers."""

from typing import Any

import pytest
from hypothesis import given, settings

from nemo_ptq.checkpoint.generation import CACHES, check_generation
from nemo_ptq.errors import PtqError
from tests.plan.mutations import generation

# As published models have them.
PUBLISHED: list[dict[str, Any]] = [
    {"bos_token_id": 128000, "do_sample": True, "eos_token_id": [128001, 128008, 128009], "temperature": 0.6},
    {"pad_token_id": 151643, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05, "max_new_tokens": 2048},
    {"cache_implementation": "hybrid", "pad_token_id": 0, "eos_token_id": [1, 106], "top_k": 64},
    {"_from_model_config": True, "pad_token_id": -1, "max_length": 4096, "transformers_version": "4.31.0"},
    {"temperature": None, "top_p": None, "chat_format": "chatml", "max_window_size": 24000},
]


@pytest.mark.parametrize("content", PUBLISHED)
def test_published_settings_are_taken(content: dict[str, Any]) -> None:
    from transformers import GenerationConfig

    check_generation(content)
    GenerationConfig.from_dict(content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"max_new_tokens": -1}, "has max_new_tokens -1: it must be a whole number of 1 or more, or left out"),
        ({"cache_implementation": "hybird"}, "has cache_implementation 'hybird': did you mean hybrid? (transformers"),
        ({"cache_implementation": {}}, r"has cache_implementation {}: take it out (transformers has static, "),
        ({"temperature": "0.7"}, "has temperature '0.7': it must be a number"),
        ({"eos_token_id": [1, "</s>"]}, "has eos_token_id [1, '</s>']: it must be a token's number, or a list of them"),
        ({"pad_token_id": [0]}, "has pad_token_id [0]: it must be a token's number, or left out"),
        ({"early_stopping": None}, "has early_stopping None: it must be true, false or"),
        ({"num_return_sequences": 2}, "has num_return_sequences 2 with num_beams 1: it must"),
        ({"num_return_sequences": 4, "num_beams": 2, "do_sample": True}, "has num_return_sequences 4 with num_beams 2"),
        ({"logits_processor": []}, "has logits_processor, which is no setting that a file can hold"),
        ({"compile_config": {}}, "has compile_config, which is no setting"),
    ],
)
def test_what_is_refused(content: dict[str, Any], said: str) -> None:
    with pytest.raises(PtqError) as caught:
        check_generation(content)
    assert f"generation_config.json {said}" in str(caught.value)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(generation({"do_sample": True}))
def test_transformers_refuses_nothing_else(content: dict[str, Any]) -> None:
    from transformers import GenerationConfig

    try:
        check_generation(content)
    except PtqError:
        return
    GenerationConfig.from_dict(content)


def test_the_caches_are_those_of_transformers() -> None:
    from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

    assert set(CACHES) == set(ALL_CACHE_IMPLEMENTATIONS)
