# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Rules are applied: all of them, and each to what is sound."""

import inspect
from dataclasses import replace
from types import ModuleType

import pytest

from nemo_ptq.options import OPTIONS
from nemo_ptq.plan.rules import (
    RULES,
    data,
    exclusions,
    findings,
    format_limits,
    layerwise,
    model,
    parallelism,
    paths,
    quantization_limits,
    saved_calibration,
)
from nemo_ptq.plan.rules.gathering import with_derived
from tests.plan.models import LLAMA_8B

SUBJECTS = (
    *(data, exclusions, format_limits, layerwise, model),
    *(parallelism, paths, quantization_limits, saved_calibration),
)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_rule_is_applied(subject: ModuleType) -> None:
    functions = [function for _, function in inspect.getmembers(subject, inspect.isfunction)]
    own = {function for function in functions if function.__module__ == subject.__name__}
    rules = {function for function in own if not function.__name__.startswith("_")}
    assert rules == {rule for rule in RULES if rule.__module__ == subject.__name__}


def test_rules_look_at_what_there_is() -> None:
    options = {name.rpartition(".")[2] for name in OPTIONS}
    gathered = {"world_size", "launcher", "header", "state", "entries", "checkpoint", "model"}
    given = {"export_format": "trtllm", "model": LLAMA_8B, "decoder_type": None}
    given |= {"exclude": None, "kv_cache_only": False}
    derived = with_derived(given).keys()
    for rule in RULES:
        assert inspect.signature(rule).parameters.keys() <= options | gathered | derived, rule.__name__


def test_a_mistake_is_one_line() -> None:
    values = {"model": LLAMA_8B, "decoder_type": None, "export_format": "[trtllm,hf]"}
    applied = dict(findings(values))
    assert {model.family_is_supported, model.norm_fits_decoder, format_limits.family_has_class} <= applied.keys()
    assert not any(applied.values())
    unknown = dict(findings({**values, "model": replace(LLAMA_8B, config_class="my.Own", normalization="LayerNorm")}))
    assert [rule for rule, problem in unknown.items() if problem] == [model.family_is_supported]
