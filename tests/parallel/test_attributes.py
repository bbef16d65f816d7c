# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Attributes are replaced for a while, and are what they were afterwards."""

import pytest

from nemo_ptq.parallel.attributes import replaced


class Base:
    """Has an attribute."""

    inherited = "base"


class Owner(Base):
    """Has one and inherits one."""

    own = "own"


def test_an_attribute_is_given_back() -> None:
    with replaced(Owner, "own", "other"):
        assert Owner.own == "other"
    assert Owner.own == "own"


def test_an_inherited_attribute_is_inherited_again() -> None:
    with replaced(Owner, "inherited", "other"):
        assert (Owner.inherited, Base.inherited) == ("other", "base")
    assert "inherited" not in vars(Owner)
    assert Owner.inherited == "base"


def test_what_was_not_there_is_removed() -> None:
    owner = Owner()
    with replaced(owner, "new", 3):
        assert vars(owner) == {"new": 3}
    assert not hasattr(owner, "new")


def test_an_error_changes_nothing_of_it() -> None:
    with pytest.raises(ValueError, match="inside"), replaced(Owner, "own", "other"):
        raise ValueError("inside")
    assert Owner.own == "own"
