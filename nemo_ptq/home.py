# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The user's home directory is nobody else's business: files that are passed on say "~" in its place."""

import os
import re
from typing import Any


def without_home(value: Any) -> Any:
    """Returns a value with "~" for the user's home directory where a text, or a part after a semicolon, begins with it.

    Args:
        value: A text, or a mapping with texts, however deep. Anything else is returned as it is.
    """
    if isinstance(value, dict):
        return {name: without_home(inner) for name, inner in value.items()}
    home = os.path.expanduser("~")
    if not isinstance(value, str) or not os.path.isabs(home) or home == "/":
        return value
    return re.sub(rf"(^|;){re.escape(home)}(?=/|$)", r"\1~", value)
