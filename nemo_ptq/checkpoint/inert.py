# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Pickles read as data: none of the names in them is imported, nothing is called. Needs no torch."""

import io
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

from nemo_ptq.untrusted import FileError, open_file
from nemo_ptq.untrusted_pickles import DataUnpickler, load_saved, size

# The options and counters of a training job have some kilobytes.
_MOST_BYTES = 2**27


class Record:
    """Stands for any class or function in a pickle: keeps its state, runs nothing."""

    state: Any = None

    def __new__(cls, *args: Any) -> "Record":
        """Accepts any arguments, and drops them."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__ = state  # not a copy: a pickle can name one large state many times
        else:
            self.state = state

    # Values that a pickle puts into a container of its own class are dropped.

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Forgets a value."""

    def extend(self, values: Any) -> None:
        """Forgets values."""

    def add(self, value: Any) -> None:
        """Forgets a value."""


class TorchName(str):
    """A name of torch's: a data type, or a function that a pickle would call."""

    def __call__(self, *args: Any) -> Record:
        """Returns a stand-in for the result."""
        return Record()


class InertUnpickler(DataUnpickler):
    """Reads a pickle's data and imports none of the names in it, so that a hostile checkpoint can run no code."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns a stand-in for a name."""
        if module == "torch":
            # A data type is a name alone, a size a call.
            return size if name == "Size" else TorchName(name)
        return Record

    def persistent_load(self, pid: Any) -> Record:
        """Returns a stand-in for the values of a tensor."""
        return Record()


def _part(path: Path, whole: IO[bytes], start: int, length: int) -> IO[bytes]:
    if length > _MOST_BYTES:
        raise FileError(path, f"has an object of more than {_MOST_BYTES} bytes")
    whole.seek(start)
    return io.BytesIO(whole.read(length))


def read_saved(path: Path, start: int = 0, length: int | None = None) -> Any:
    """Reads a file of ``torch.save``, tensors left out.

    Args:
        path: The file.
        start: First byte there.
        length: How many bytes; None for all.

    Raises:
        FileError: If the file is missing or damaged, or is not one of torch's.
    """
    with open_file(path) as whole:
        try:
            file = whole if length is None else _part(path, whole, start, length)
            return load_saved(file, InertUnpickler)
        except BadZipFile as error:
            raise FileError(path, "cannot be read: it is not a file of torch.save") from error
        except FileError:
            raise
        except Exception as error:  # a damaged pickle raises any kind of error
            raise FileError(path, f"cannot be read: {error!r}"[:200]) from error
