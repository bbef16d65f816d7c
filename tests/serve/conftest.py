# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The exports that vLLM is asked about on this machine's CPU."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Demo
from tests.serve.environment import PYTHON
from tests.serve.exports import CELLS, make_exports


@pytest.fixture(scope="session")
def exports(demo: Demo, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every export that a selected test is about, below one directory."""
    assert PYTHON.exists(), "run `make serve-env`"
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    paths = {found["cell"].path if "cell" in found else found["path"] for found in parameters}
    directory = tmp_path_factory.mktemp("served")
    make_exports(directory, [cell for cell in CELLS if cell.path in paths])
    return directory


@pytest.fixture(scope="session")
def predicted(exports: Path) -> dict[str, dict[str, Any]]:
    """What is asked of each, and our reader's log probabilities, by path."""
    requests = json.loads((exports / "requests.json").read_text(encoding="utf-8"))
    return {request["directory"]: request for request in requests}
