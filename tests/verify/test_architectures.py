# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The modules of an architecture are those that transformers builds, name by name and size by size."""

import pytest
import torch

from nemo_ptq.verify.huggingface.architectures import ARCHITECTURES, model_config, stored_modules
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
