# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Families are found by their classes, and those that cannot be quantized say why."""

import subprocess
import sys

import pytest

from nemo_ptq.errors import PtqError
from nemo_ptq.models.registry import class_of_architecture, families, family_of, hugging_face_classes


@pytest.mark.parametrize(
    ("config_class", "name"),
    [
        ("Llama31Config8B", "Llama"),
        ("CodeLlamaConfig7B", "CodeLlama"),
        ("MistralNeMoConfig12B", "Mistral"),
        ("MixtralConfig8x22B", "Mixtral"),
        ("GemmaConfig7B", "Gemma"),
        ("Starcoder2Config15B", "StarCoder 2"),
        ("StarcoderConfig15B", "StarCoder"),
        ("Nemotron4Config340B", "Nemotron"),
        ("NemotronHConfig8B", "Nemotron-H"),
        ("NemotronNano9Bv2", "Nemotron Nano v2"),
        ("GPTConfig5B", "GPT"),
        ("Qwen25Config7B", "Qwen 2"),
        ("Qwen3Config8B", "Qwen 3"),
        ("Qwen3Config30B_A3B", "Qwen 3 MoE"),
        ("Phi3ConfigMini", "Phi 3"),
        ("Gemma2Config9B", "Gemma 2"),
        ("Gemma3Config1B", "Gemma 3"),
        ("MistralSmall3Config24B", "Mistral"),
    ],
)
def test_the_longest_beginning_counts(config_class: str, name: str) -> None:
    assert family_of(config_class).name == name


@pytest.mark.parametrize("family", [family for family in families() if family.refused], ids=lambda family: family.name)
def test_a_refusal_says_why(family: object) -> None:
    (refused,) = [known for known in families() if known is family]
    assert refused.decoder is None and refused.refused is not None
    with pytest.raises(PtqError) as caught:
        family_of(f"{refused.nemo_class}Config1B")
    assert str(caught.value).endswith(refused.refused)
    for architecture in refused.refused_architectures:
        with pytest.raises(PtqError, match=r"is not supported for quantization: .*; supported: LlamaForCausalLM"):
            class_of_architecture(architecture)


def test_a_family_without_decoder_has_a_reason() -> None:
    assert [family.name for family in families() if (family.decoder is None) != (family.refused is not None)] == []


def test_the_users_decoder_is_taken_for_an_unknown_class() -> None:
    assert family_of("OwnConfig", "gemma").hidden_act == "openai-gelu"
    assert family_of("LlamaConfig", "gpt").name == "like GPT"


@pytest.mark.parametrize("architecture", sorted(hugging_face_classes()))
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    import transformers

    found = class_of_architecture(architecture)
    if not hasattr(transformers, found.config_class):
        pytest.skip(f"transformers {transformers.__version__} has no {found.config_class}")
    theirs = getattr(transformers, found.config_class)()
    assert {name: getattr(theirs, name, None) for name in found.defaults} == dict(found.defaults)


def test_reading_families_imports_nothing_heavy() -> None:
    program = (
        "import sys; from nemo_ptq.models.registry import families; families();"
        "print({'torch', 'nemo', 'megatron', 'transformers'} & sys.modules.keys())"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "set()"
