# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Pickles from outside, read as data in bounded time and memory. Needs no torch.

A pickle is a program. Beside running code, it can ask for any amount of memory, or build a value that takes forever to
hash or to print. ``torch.save`` writes a zip archive with a pickle in it, and ``torch.load`` with ``weights_only=True``
runs no code, but bounds neither: :func:`check_saved` looks at such an archive first.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import cache
from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from nemo_ptq.untrusted import FileError, open_file

# Values in a pickle, shared ones counted each time: the index of a million chunks has a tenth of them.
_MOST_VALUES = 10**8
# Of a tensor.
_MOST_AXES = 64
# The operations that hash values, and which of those on the stack they hash.
_HASHED: Mapping[bytes, Callable[[list[Any]], Sequence[Any]]] = {
    pickle.SETITEM: lambda stack: stack[-2:-1],
    pickle.SETITEMS: lambda stack: stack[::2],
    pickle.DICT: lambda stack: stack[::2],
    pickle.ADDITEMS: lambda stack: stack,
    pickle.FROZENSET: lambda stack: stack,
}


def size(axes: Iterable[int] = ()) -> tuple[int, ...]:
    """Stands for torch.Size.

    Raises:
        UnpicklingError: If there are more axes than any tensor has.
    """
    found = tuple(axes) if isinstance(axes, tuple | list) and len(axes) <= _MOST_AXES else None
    if found is None:
        raise pickle.UnpicklingError("it has a size that no tensor has")
    return found


def _hashing(operation: bytes) -> Callable[[Any], None]:
    """Returns an operation of the unpickler that looks at values before it hashes them."""
    run, hashed = pickle._Unpickler.dispatch[operation[0]], _HASHED[operation]

    def checked(unpickler: Any) -> None:
        _check_hashed(hashed(unpickler.stack))
        run(unpickler)

    return checked


def _check_hashed(values: Iterable[Any]) -> None:
    """Raises where a hash may have no end: it goes through nested tuples as often as they occur, a trillion times."""
    for value in values:
        if isinstance(value, tuple) and any(isinstance(inner, tuple | frozenset) for inner in value):
            raise pickle.UnpicklingError("it has a key of nested tuples")


class DataUnpickler(pickle._Unpickler):
    """Reads the data of a pickle. Subclasses say what stands for the names in it, of which none is imported.

    It extends Python's unpickler, since the one in C makes room for all memo entries up to the largest number that a
    pickle names, and nine bytes can name the four billionth.
    """

    # Without BYTEARRAY8, which clears as many bytes as it says, whether they follow or not.
    dispatch = {code: run for code, run in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]} | {
        operation[0]: _hashing(operation) for operation in _HASHED
    }

    def load(self) -> Any:
        """Reads the value.

        Raises:
            UnpicklingError: If it would take too much time or memory. A damaged pickle raises any exception.
        """
        value = super().load()
        _check_values(value)
        return value


def _check_values(value: Any) -> None:
    """Raises where a value, printed or compared, would have no end: lists in lists can occur a trillion times."""
    counts: dict[int, int] = {}
    pending = [value]
    while pending:
        current, inner = pending[-1], list(_containers_in(pending[-1]))
        if id(current) not in counts:
            counts[id(current)] = 0  # until those in it are counted
            pending += [one for one in inner if id(one) not in counts]
            continue
        pending.pop()
        if counts[id(current)] == 0:
            counts[id(current)] = len(_values_in(current)) + 1 + sum(counts[id(one)] for one in inner)
        if counts[id(current)] > _MOST_VALUES:
            raise pickle.UnpicklingError(f"it has more than {_MOST_VALUES} values")


def _values_in(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    return list(vars(value).values()) if hasattr(value, "__dict__") and not isinstance(value, type) else ()


def _containers_in(value: Any) -> Iterator[Any]:
    plain = (str, bytes, int, float, type(None))
    return (inner for inner in _values_in(value) if not isinstance(inner, plain))


# What torch calls to put tensors together. Its other names would allocate as much as a number says.
_OF_TENSORS = ("torch._utils._rebuild_", "torch._tensor._rebuild_", "torch.nn.parameter.", "torch.serialization._get_")


class _Name:
    """Stands for a class or function in an archive of torch's; it can be called as ``torch.save`` has it called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments: Any) -> Any:
        if self.name == "torch.Size":
            return size(*arguments)
        if self.name == "collections.OrderedDict" and not arguments:
            return {}
        if self.name.endswith(".set"):
            _check_hashed(arguments[0] if arguments else ())
        allocates = self.name.startswith("torch.") and not self.name.startswith((*_OF_TENSORS, "torch.device"))
        if allocates or self.name.endswith((".bytearray", ".OrderedDict", ".Counter")):
            raise pickle.UnpicklingError(f"it calls {self.name}")
        return _Result()


class _Result:
    """Stands for what a call returns, whose content is not kept."""

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def _new_object(unpickler: Any) -> None:
    """Puts what stands for a new object in the place of its class and arguments."""
    unpickler.stack[-2:] = [_Result()]


class _SavedUnpickler(DataUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _Name(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return None  # torch compares each storage with its record

    dispatch = DataUnpickler.dispatch | {pickle.NEWOBJ[0]: _new_object}


def check_saved(file: IO[bytes], length: int) -> list[ZipInfo]:
    """Checks an archive that ``torch.save`` has written, before ``torch.load`` reads it.

    Args:
        file: The archive.
        length: Size of the archive in bytes.

    Returns:
        The archive's records.

    Raises:
        BadZipFile: If it is no such archive: records are not compressed, and fit into it.
        UnpicklingError: If its pickle asks for what no tensor needs. A damaged pickle raises any exception.
    """
    with ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.compress_type != ZIP_STORED for record in records):
            raise BadZipFile("its records are compressed, which torch.save does not do")
        if len({record.filename for record in records}) < len(records):
            raise BadZipFile("it has several records of one name")
        if sum(record.file_size for record in records) > length:
            raise BadZipFile("its records are larger than the file")
        with archive.open(_pickle_in(archive)) as content:
            _SavedUnpickler(content).load()
        return records


@cache
def check_saved_file(path: Path) -> Path:
    """Checks a file as :func:`check_saved` does, once for each process, and returns its path.

    Raises:
        FileError: If it cannot be read, is no archive of torch's, or asks for what no tensor needs.
    """
    with open_file(path) as file:
        try:
            check_saved(file, path.stat().st_size)
        except Exception as error:  # a damaged pickle raises any exception
            reason = str(error) or type(error).__name__
            raise FileError(path, f"cannot be read as tensors ({reason})") from error
    return path


def load_saved(file: IO[bytes], unpickler: type[DataUnpickler]) -> Any:
    """Reads the pickle of an archive that ``torch.save`` has written, without the values of tensors.

    Args:
        file: The archive.
        unpickler: Class that reads the pickle.

    Raises:
        BadZipFile: If it is no such archive.
        UnpicklingError: As :meth:`DataUnpickler.load`. A damaged pickle raises any exception.
    """
    with ZipFile(file) as archive, archive.open(_pickle_in(archive)) as content:
        return unpickler(content).load()


def _pickle_in(archive: ZipFile) -> ZipInfo:
    records = archive.infolist()
    pickles = [record for record in records if record.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise BadZipFile("it is not a file of torch.save")
    if pickles[0].compress_type != ZIP_STORED:
        raise BadZipFile("its records are compressed, which torch.save does not do")
    if not any(record.CRC for record in records):  # written after torch.serialization.set_crc32_options(False)
        pickles[0] = copy(pickles[0])
        del pickles[0].CRC
    return pickles[0]
