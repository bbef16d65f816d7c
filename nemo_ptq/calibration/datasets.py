# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Calibration data sets: one function each. Imports nothing heavy, since the command line lists their names."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.resources import as_file, files
from itertools import islice
from typing import TypeVar

from nemo_ptq.calibration.chats import Chat, Sample, read_sample
from nemo_ptq.calibration.hub import load_rows, where_to_load
from nemo_ptq.calibration.text_files import read_text_file
from nemo_ptq.config import BUILT_IN_DATA, DataSource, read_sources
from nemo_ptq.errors import PtqError

T = TypeVar("T")

# Yields a data set's samples, in an order that does not change.
Dataset = Callable[[], Iterator[Sample]]

ON_HUB = {"cnn_dailymail": ("cnn_dailymail", "abisee/cnn_dailymail"), "wikitext": ("wikitext", "Salesforce/wikitext")}
"""Our data sets that are on the hub, with every name under which the library may have cached them."""
# Passages of the package's own data set that are kept for the report, if no others are left for it.
_KEPT_APART = 16


def _cnn_dailymail() -> Iterator[Sample]:
    rows = load_rows("cnn_dailymail", ON_HUB["cnn_dailymail"], "3.0.0", "train")
    return (row["article"] for row in rows)


def _wikitext() -> Iterator[Sample]:
    rows = load_rows("wikitext", ON_HUB["wikitext"], "wikitext-103-v1", "train")
    return (row["text"] for row in rows if row["text"].strip())


def _builtin() -> Iterator[Sample]:
    with as_file(files("nemo_ptq.calibration") / "builtin" / "passages.jsonl") as path:
        for sample in read_text_file(str(path)):
            yield sample if isinstance(sample, str | Chat) else Chat(sample, may_be_plain=True)


DATASETS: dict[str, Dataset] = {"cnn_dailymail": _cnn_dailymail, "wikitext": _wikitext, BUILT_IN_DATA: _builtin}
"""The data sets that `quantization_config.calibration_dataset` names, in the order in which messages list them."""


def register(name: str, dataset: Dataset) -> None:
    """Adds a data set; a plugin (:mod:`nemo_ptq.plugins`) calls it when it is imported.

    Args:
        name: What users call it.
        dataset: Yields its samples when it is called, and imports what it needs only then.

    Raises:
        PtqError: If there is a data set of that name.
    """
    if name in DATASETS:
        raise PtqError(f"there is a data set {name} already: give yours another name")
    DATASETS[name] = dataset


def read_samples(dataset: str, size: int) -> list[Sample]:
    """Returns the first ``size`` samples of a data set, or as many as it has.

    Args:
        dataset: What `quantization_config.calibration_dataset` takes: see :func:`nemo_ptq.config.read_sources`. Data
            sets of the hub are fetched by the ``datasets`` library or found in its cache (``HF_DATASETS_OFFLINE`` and
            ``HF_HUB_OFFLINE`` are honoured).
        size: Samples wanted.

    Raises:
        PtqError: If a file cannot be read, or a data set is not available.
    """
    sources = read_sources(dataset)
    samples = interleaved([_samples(source) for source in sources], [source.weight for source in sources])
    return list(islice(samples, size))


def _samples(source: DataSource) -> Iterator[Sample]:
    if source.is_file:
        return read_text_file(source.name, source.column)
    if source.is_on_hub:
        rows = load_rows(source.name, [source.name], source.config, source.split, streams=True)
        where = f"calibration_dataset={source.name}:{source.split}"
        return (read_sample(row, f"{where}, row {number}", source.column) for number, row in enumerate(rows, start=1))
    return DATASETS[source.name]()


def interleaved(sources: Sequence[Iterable[T]], weights: Sequence[float]) -> Iterator[T]:
    """Yields from several sources in turn, so that at any point each has given its share as nearly as possible.

    An exhausted source is skipped.

    Example:
        >>> list(interleaved(["aaaa", "bb"], [2.0, 1.0]))
        ['a', 'b', 'a', 'a', 'b', 'a']
    """
    iterators = dict(enumerate(map(iter, sources)))
    given = dict.fromkeys(iterators, 0)
    while iterators:
        # The source whose next item is due first.
        place = min(iterators, key=lambda place: ((given[place] + 0.5) / weights[place], place))
        try:
            item = next(iterators[place])
        except StopIteration:
            del iterators[place]
            continue
        given[place] += 1
        yield item


def check_available(sources: Sequence[DataSource]) -> None:
    """Checks within seconds whether the data sets of the hub are available on this machine.

    Raises:
        PtqError: If one is not.
    """
    for source in sources:
        if source.is_on_hub or source.name in ON_HUB:
            where_to_load(source.name, ON_HUB.get(source.name, (source.name,)))


def split_samples(dataset: str, samples: Sequence[Sample], wanted: int) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Splits samples into those to calibrate on and those held out.

    Args:
        dataset: Where they come from. Of the package's own data set, which is small, the last ones are always held out.
        samples: All samples that were read.
        wanted: How many to calibrate on.
    """
    if [source.name for source in read_sources(dataset)] == [BUILT_IN_DATA]:
        whole = sum(1 for _ in DATASETS[BUILT_IN_DATA]())
        wanted = min(wanted, whole - _KEPT_APART)
    return samples[:wanted], samples[wanted:]
