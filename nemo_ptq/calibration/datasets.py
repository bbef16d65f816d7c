# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Calibration data sets: one function each. Imports nothing heavy, since the command line lists their names."""

from collections.abc import Callable, Iterator
from itertools import islice

from nemo_ptq.calibration.text_files import Sample, read_text_file
from nemo_ptq.config import is_text_file
from nemo_ptq.errors import PtqError

# Yields a data set's samples, in an order that does not change.
Dataset = Callable[[], Iterator[Sample]]


def _cnn_dailymail() -> Iterator[Sample]:
    from datasets import load_dataset

    return (row["article"] for row in load_dataset("cnn_dailymail", "3.0.0", split="train"))


def _wikitext() -> Iterator[Sample]:
    from datasets import load_dataset

    return (row["text"] for row in load_dataset("wikitext", "wikitext-103-v1", split="train") if row["text"].strip())


DATASETS: dict[str, Dataset] = {"cnn_dailymail": _cnn_dailymail, "wikitext": _wikitext}
"""The data sets that `quantization_config.calibration_dataset` names, in the order in which messages list them."""


def register(name: str, dataset: Dataset) -> None:
    """Adds a data set; a plugin (:mod:`nemo_ptq.plugins`) calls it when it is imported.

    Args:
        name: What users call it.
        dataset: Yields its samples when it is called. What it needs to do so, it imports then.

    Raises:
        PtqError: If there is a data set of that name.
    """
    if name in DATASETS:
        raise PtqError(f"there is a data set {name} already: give yours another name")
    DATASETS[name] = dataset


def read_samples(dataset: str, size: int) -> list[Sample]:
    """Returns the first ``size`` samples of a data set, or as many as it has.

    Args:
        dataset: A local .jsonl, .json or .txt file, or a name of :data:`DATASETS`. Data sets of the hub are fetched by
            the ``datasets`` library or found in its cache (``HF_DATASETS_OFFLINE`` and ``HF_HUB_OFFLINE`` are
            honoured).
        size: Samples wanted.

    Raises:
        PtqError: If the file cannot be read, or the data set is not available.
    """
    if is_text_file(dataset):
        return list(islice(read_text_file(dataset), size))
    try:
        return list(islice(DATASETS[dataset](), size))
    except (OSError, ValueError, RuntimeError) as error:
        raise PtqError(
            f"calibration_dataset={dataset!r} could not be loaded ({type(error).__name__}: {error}); "
            "give a local .jsonl, .json or .txt file instead, or fill the datasets cache on a machine with a network"
        ) from error
