# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps the libraries beneath us from talking over our own output. Errors still come through."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Silences what NeMo and Megatron say of packages that they could use and do not need."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


def import_nemo() -> None:
    """Imports NeMo's models in silence; what is imported from NeMo afterwards says nothing more."""
    with quiet_imports():
        import nemo.collections.llm  # noqa: F401


@contextmanager
def quiet_prints() -> Iterator[Callable[[Callable[[T], R]], Callable[[T], R]]]:
    """Silences what a library prints on every rank.

    Yields:
        Makes of a function that the library calls back, such as the user's calibration loop, one that is heard.
    """
    heard = sys.stdout

    def aloud(function: Callable[[T], R]) -> Callable[[T], R]:
        def call(argument: T) -> R:
            with redirect_stdout(heard):
                return function(argument)

        return call

    with redirect_stdout(io.StringIO()):
        yield aloud


def quiet_libraries() -> None:
    """Leaves only what a user can act upon of what NeMo and ModelOpt say while a model is built and calibrated.

    ModelOpt's quantizers warn on every rank of defaults that are right here; what its export has to say is kept.
    """
    logging.getLogger("nemo_logger").setLevel(logging.WARNING)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells when it looks for fonts
    warnings.filterwarnings("ignore", module=r"(modelopt\.torch\.(quantization|opt)|megatron)\b")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.checkpoint\b")


def transformers_without_torch() -> None:
    """Has transformers leave torch alone when it is imported: tokenizers and configurations then load in a second.

    For a process that needs nothing else of it, as a command's does: its models cannot be had there afterwards.
    """
    os.environ.setdefault("USE_TORCH", "0")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
