# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Patterns of layers are compared as fnmatch compares them, in order, and names without wildcards at once."""

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_ptq.errors import PtqError
from nemo_ptq.verify.huggingface.hf_quantization import Patterns

SHORT = st.text("ab.", min_size=1, max_size=4)
PATTERNS = st.lists(st.text("ab.*?[]!", min_size=1, max_size=4), max_size=6)


@given(PATTERNS, st.sets(SHORT, max_size=6))
def test_they_fit_what_fnmatch_says(patterns: list[str], names: set[str]) -> None:
    found = Patterns(patterns)
    for name in names:
        expected = [place for place, pattern in enumerate(patterns) if fnmatchcase(name, pattern)]
        assert found.first(name) == (expected[0] if expected else None)
    assert found.idle(names) == [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]


def test_more_wildcards_than_an_export_has_are_refused() -> None:
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(100_000)]
    found = Patterns([*names, "*lm_head"])
    assert (found.first(names[-1]), found.first("lm_head"), found.first("x")) == (99_999, 100_000, None)
    with pytest.raises(PtqError, match="1001 patterns of layers have wildcards"):
        Patterns([f"*{number}" for number in range(1001)])
