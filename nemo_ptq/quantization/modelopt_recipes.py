# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's recipes, as data: YAML files that are put together from others by `imports`.

ModelOpt's own loader does the same, and takes many seconds to import; a test compares the two with every recipe that
ModelOpt has.
"""

import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemo_ptq.errors import PtqError
from nemo_ptq.untrusted import read_json, read_yaml_documents

_IMPORT = "$import"
_FLOAT_NAME = re.compile(r"[Ee](\d+)[Mm](\d+)")
_ENDINGS = ("", ".yml", ".yaml")
# Files import files, each of which may import others.
_DEEPEST = 8
_MOST_ENTRIES = 10_000


def find_recipe(name: Path) -> Path:
    """Returns the file of that name: the user's own, or else the one of ModelOpt's recipes.

    Args:
        name: A path, or the name of a recipe such as "general/ptq/fp8_default-kv_fp8", with or without ".yaml".
            Where there is neither, it is returned as it is.
    """
    if name.exists() or name.is_absolute() or (library := _library()) is None:
        return name
    found = (library / f"{name}{ending}" for ending in _ENDINGS)
    return next((file for file in found if file.is_file()), name)


def read_recipe(file: Path) -> Any:
    """Reads a JSON or YAML file, and inserts its imports.

    Args:
        file: The file. Its imports are looked for beside it, and then among ModelOpt's recipes.

    Raises:
        FileError: If it, or a file that it imports, cannot be read.
        PtqError: If an import names nothing; the message follows the file's name.
    """
    return read_json(file) if file.suffix.lower() == ".json" else _read(file, ())


def _library() -> Path | None:
    """The folder of the recipes of the installed ModelOpt; older ones have none."""
    spec = find_spec("modelopt_recipes")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None


def _read(file: Path, importing: tuple[Path, ...]) -> Any:
    """Reads one file; `importing` are those that wait for it."""
    if file.resolve() in importing or len(importing) > _DEEPEST:
        raise PtqError(f"{file} is imported by itself, or by more than {_DEEPEST} files in a row")
    documents = read_yaml_documents(file)
    if len(documents) > 2:
        raise PtqError(f"{file} has {len(documents)} YAML documents, and must have one, or two with imports first")
    head, body = documents[0] if documents else None, documents[-1] if documents else None
    settings = dict(head) if isinstance(head, Mapping) else {}
    imports = settings.pop("imports", None)
    if isinstance(body, Mapping):
        body = {**settings, **{key: value for key, value in body.items() if key != "imports"}}
    if not isinstance(imports, Mapping | None):
        raise PtqError(f"{file} has imports {imports!r}, which must be an object of names and files")
    chain = (*importing, file.resolve())
    parts = {name: _read(_imported(file, name, path), chain) for name, path in (imports or {}).items()}
    return _filled(body, parts)


def _imported(file: Path, name: Any, path: Any) -> Path:
    if not isinstance(path, str) or not path or "\0" in path:
        raise PtqError(f"{file} imports {path!r} as {name!r}, which must be the name of a file")
    library = _library()
    for folder in (file.parent, *([] if library is None else [library])):
        for ending in _ENDINGS:
            if (found := folder / f"{path}{ending}").is_file():
                return found
    raise PtqError(f"{file} imports {path}, which is neither beside it nor among the recipes of ModelOpt here")


def _filled(node: Any, parts: Mapping[Any, Any]) -> Any:
    """Puts the imported parts into a document, and writes number formats as ModelOpt's classes have them."""
    if isinstance(node, list):
        filled = [item for entry in node for item in _items(entry, parts)]
        if len(filled) > _MOST_ENTRIES:
            raise PtqError(f"it has a list of more than {_MOST_ENTRIES} entries")
        return filled
    if not isinstance(node, Mapping):
        return node
    filled_in: dict[Any, Any] = {}
    for name in _names(node):
        part = _part(name, parts)
        if not isinstance(part, Mapping):
            raise PtqError(f"it imports the list {name!r} where an object must stand")
        filled_in |= part
    filled_in |= {key: _filled(value, parts) for key, value in node.items() if key != _IMPORT}
    return {key: _number_format(key, value) for key, value in filled_in.items()}


def _items(entry: Any, parts: Mapping[Any, Any]) -> Iterator[Any]:
    """The items that an entry of a list stands for: those of a list that it imports, or itself."""
    if isinstance(entry, Mapping) and entry.keys() == {_IMPORT} and not isinstance(entry[_IMPORT], list):
        part = _part(entry[_IMPORT], parts)
        yield from part if isinstance(part, list) else [part]
    else:
        yield _filled(entry, parts)


def _names(node: Mapping[Any, Any]) -> list[Any]:
    named = node.get(_IMPORT, [])
    return named if isinstance(named, list) else [named]


def _part(name: Any, parts: Mapping[Any, Any]) -> Any:
    if not isinstance(name, str) or name not in parts:
        raise PtqError(f"it has $import: {name}, which its imports do not name")
    return parts[name]


def _number_format(key: Any, value: Any) -> Any:
    """Numbers of exponent and mantissa bits for a text such as "e4m3"."""
    is_one = key in ("num_bits", "scale_bits") and isinstance(value, str)
    match = _FLOAT_NAME.fullmatch(value) if is_one else None
    return value if match is None else [int(match[1]), int(match[2])]
