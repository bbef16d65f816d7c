# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Stand-ins are there within the block alone, and take the place of nothing that is imported."""

import sys

import pytest

from nemo_ptq.stand_ins import stand_ins

MODULE = "this.module.is_nowhere"


def test_a_stand_in_has_its_content_within_the_block() -> None:
    with stand_ins({"tomllib_": {"loads": len}}):
        from tomllib_ import loads  # type: ignore[import-not-found]

        assert loads is len
    assert "tomllib_" not in sys.modules


def test_an_import_fails_within_the_block_and_works_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with stand_ins({"colorsys": None}), pytest.raises(ImportError):
        import colorsys
    import colorsys

    assert colorsys.rgb_to_hsv


def test_what_is_imported_stays() -> None:
    with stand_ins({"sys": {}}):
        assert sys.modules["sys"] is sys
    assert sys.modules["sys"] is sys


def test_an_error_takes_stand_ins_away() -> None:
    with pytest.raises(RuntimeError), stand_ins({MODULE: {}}):
        assert MODULE in sys.modules
        raise RuntimeError
    assert MODULE not in sys.modules
