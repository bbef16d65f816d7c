# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Looking at several tensors at a time: reading one and computing with another take turns otherwise."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

# Tensors that are in memory at a time.
_MOST = 4
# Threads of what keeps no tensor in memory.
_MOST_IN_PIECES = 16

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def side_by_side(look: Callable[[_Item], _Result], items: Iterable[_Item], in_pieces: bool = False) -> list[_Result]:
    """Returns what ``look`` finds of each item, in the order of the items; raises what it raises.

    Args:
        look: Looks at an item.
        items: Such as names of tensors.
        in_pieces: Whether it holds only a small piece of a tensor in memory at a time.
    """
    with ThreadPoolExecutor(min(_MOST_IN_PIECES if in_pieces else _MOST, os.cpu_count() or 1)) as pool:
        return list(pool.map(look, items))
