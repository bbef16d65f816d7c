# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Data sets and tokenizers from the Hugging Face hub or its cache; which of the two is known within seconds.

The libraries themselves would retry for minutes. Imports nothing heavy.
"""

import logging
import os
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from nemo_ptq.errors import PtqError

# Seconds that the hub has to answer.
_PATIENCE = 4.0
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
WAYS_OUT = (
    "quantization_config.calibration_dataset=builtin needs no network, and neither does a local .jsonl, .json, .txt or "
    ".parquet file"
)


def cache_directory() -> Path:
    """Returns where the ``datasets`` library keeps what it has fetched."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets").expanduser()


def in_cache(names: Sequence[str]) -> str | None:
    """Returns the first of some names of a data set under which it is in the cache; None where it is not there."""
    return next((name for name in names if (cache_directory() / name.replace("/", "___")).is_dir()), None)


def is_offline() -> bool:
    """Whether the user wants the hub left alone."""
    return any(os.environ.get(name, "0").lower() not in ("", "0", "false", "no", "off") for name in _OFFLINE)


@cache
def answers() -> bool:
    """Whether the hub answers, asked once for a process; proxies are used as the environment says."""
    found: list[bool] = []
    # Looking up a name without a name server may take longer than any timeout that Python can set.
    thread = threading.Thread(target=lambda: found.append(_ask()), daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return bool(found and found[0])


def _ask() -> bool:
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_PATIENCE).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError) as error:
        # Its certificate may be one that Python does not know, and the library does.
        return isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True


HUB, CACHE, DIRECTORY = "hub", "cache", "directory"
"""Where a data set is loaded from."""


def where_to_load(dataset: str, names: Sequence[str]) -> tuple[str, str]:
    """Says how a data set is loaded.

    Args:
        dataset: The user's name for it.
        names: Its present and former names on the hub.

    Returns:
        The name to load, and where from. A directory of that name in the working directory comes first, as the
        library looks there first.

    Raises:
        PtqError: If it is neither on a hub that answers nor in the cache.
    """
    if Path(names[0]).is_dir():
        return names[0], DIRECTORY
    offline = is_offline()
    if not offline and answers():
        return names[0], HUB
    if cached := in_cache(names):
        return cached, CACHE
    why = f"{_offline_switch()} is set" if offline else "the Hugging Face hub does not answer"
    raise PtqError(
        f"quantization_config.calibration_dataset={dataset} is not available: {why}, and {cache_directory()} does not "
        f"hold it; {WAYS_OUT}"
    )


@cache
def why_no_tokenizer(name: str) -> str | None:
    """Says why a tokenizer is available neither in the cache nor on the hub; None where it may be.

    Args:
        name: A model's name, as OWNER/NAME or one of the hub's short names.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError

    file = "tokenizer_config.json"
    try:
        if isinstance(try_to_load_from_cache(name, file), str):
            return None
        if is_offline():
            return f"its cache of the Hugging Face hub does not hold it, and {_offline_switch()} is set"
        if not answers():
            return "the Hugging Face hub, where one of that name might be, does not answer"
        get_hf_file_metadata(hf_hub_url(name, file), timeout=_PATIENCE)
    except HFValidationError:
        return "it is no name on the Hugging Face hub either"
    except GatedRepoError:  # there is one, for those with access: the job says so
        return None
    except (RepositoryNotFoundError, EntryNotFoundError):
        return "the Hugging Face hub has no tokenizer of that name"
    except Exception:  # a hub that is slow or has a fault: the job says so
        return None
    return None


def _offline_switch() -> str:
    """The environment variable that forbids access to the hub."""
    return next(filter(os.environ.get, _OFFLINE))


@contextmanager
def _quiet(place: str) -> Iterator[None]:
    """Silences the libraries, and keeps them from asking the hub for what is in the cache."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    if place == CACHE:
        # For libraries imported from now on, and for those imported already.
        os.environ["HF_HUB_OFFLINE"] = "1"
        for name in ("huggingface_hub.constants", "datasets.config"):
            if name in sys.modules:
                sys.modules[name].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def load_rows(
    dataset: str, names: Sequence[str], config: str | None, split: str, streams: bool = False
) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of a data set.

    Args:
        dataset: The user's name for it.
        names: Its present and former names on the hub, the present name first.
        config: Its configuration; None is the default.
        split: Its split.
        streams: Whether rows are fetched as they are needed, rather than all of them into the cache.

    Raises:
        PtqError: If it cannot be loaded.
    """
    name, place = where_to_load(dataset, names)
    with _quiet(place):
        from datasets import load_dataset

        options: dict[str, Any] = {"streaming": True} if streams and place == HUB else {}
        try:
            yield from load_dataset(name, config, split=split, **options)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise PtqError(
                f"quantization_config.calibration_dataset={dataset!r} could not be loaded ({type(error).__name__}: "
                f"{reason}); {WAYS_OUT}"
            ) from error
