# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The modules of an architecture are those that transformers builds, name by name and size by size."""

import pytest
import torch

from nemo_ptq.models.hf_settings import HARMLESS, NEUTRAL
from nemo_ptq.models.registry import class_of_architecture
from nemo_ptq.verify.huggingface.architectures import ARCHITECTURES, model_config, setting_problems, stored_modules
from tests.families import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_are_transformers(family: str) -> None:
    import transformers

    record = FAMILIES[family]
    config = getattr(transformers, record.config)(**record.arguments, **{record.layers: 3})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    architecture = ARCHITECTURES[type(model).__name__]
    assert config.model_type == architecture.model_type
    found = {}
    for name, module in stored_modules(architecture, model_config(config, architecture)).items():
        found[f"{name}.weight"] = module.shape
        if module.has_bias:
            found[f"{name}.bias"] = module.shape[:1]
        kinds = {"linear": torch.nn.Linear, "embedding": torch.nn.Embedding}
        assert isinstance(model.get_submodule(name), kinds.get(module.kind, torch.nn.Module)), name
    assert found == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reader_takes_every_setting_that_the_import_takes(family: str) -> None:
    """Otherwise an export of what was imported would not verify."""
    import transformers

    record = FAMILIES[family]
    config = getattr(transformers, record.config)(**record.arguments, **{record.layers: 3})
    model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    hf_class = class_of_architecture(model.__name__)
    content = dict.fromkeys(HARMLESS, "anything") | {name: values[0] for name, values in NEUTRAL.items()}
    content |= dict.fromkeys(hf_class.harmless, 3) | {name: values[0] for name, values in hf_class.neutral.items()}
    content |= config.to_dict()
    content |= {"architectures": [model.__name__], "not_set": None}
    window = getattr(config, "sliding_window", None)
    alike = ["full_attention" if window is None else "sliding_attention"] * 3
    content |= {"layer_types": getattr(config, "layer_types", None) or alike}
    hf_class.read(content)
    assert setting_problems(content, config) == []
    other = {"secret_gate": True, "use_qk_norm": not content["use_qk_norm"], "layer_types": ["chunked_attention"]}
    for name, value in other.items():
        (problem,) = setting_problems({**content, name: value}, config)
        assert f"has {name} " in problem


def test_a_switch_that_is_null_is_off() -> None:
    import transformers

    switches = dict.fromkeys(("use_sliding_window", "add_cross_attention", "attention_bias"))
    config = transformers.Qwen2Config(**switches)
    assert setting_problems({**config.to_dict(), **switches}, config) == []
    (problem,) = setting_problems({}, transformers.Qwen2Config(use_sliding_window=True))
    assert problem.startswith("has use_sliding_window True")


def test_layers_with_a_window_may_leave_their_base_to_the_older_name() -> None:
    import transformers

    config = transformers.Gemma3TextConfig()
    kinds = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_type": "default"}}
    content = {"rope_parameters": kinds, "rope_local_base_freq": 3e4}
    assert setting_problems(content, config) == []
    kinds["sliding_attention"]["rope_theta"] = 2e4
    assert "rope_local_base_freq 30000.0" in setting_problems(content, config)[0]
