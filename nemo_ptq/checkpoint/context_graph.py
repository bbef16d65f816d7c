# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The model in a NeMo 2.0 checkpoint's ``context/io.json``, read as data: nothing in it is imported or called.

The file is a graph of fiddle configurations, as ``fiddle.experimental.serialization`` writes it. It describes a whole
training job, of which the model's configuration and tokenizer are read here; trainer, optimizer, data and callbacks are
ignored. The names in the rest are checked by :class:`~nemo_ptq.checkpoint.allowed_names.AllowedNames`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ptq.checkpoint.allowed_names import AllowedNames, Name, is_dotted
from nemo_ptq.errors import ConfigError
from nemo_ptq.untrusted import FileError, read_json

_CONFIG, _PARTIAL = "Config", "Partial"
_BUILDABLES = {
    "fiddle._src.config.Config": _CONFIG,
    "nemo_run.config.Config": _CONFIG,
    "fiddle._src.partial.Partial": _PARTIAL,
    "nemo_run.config.Partial": _PARTIAL,
}
_METADATA = "fiddle._src.config.BuildableTraverserMetadata"
_SEQUENCES: Mapping[str, type] = {"builtins.list": list, "builtins.tuple": tuple}
_NO_VALUE = "fiddle._src.config.NoValue"
# The functions and objects of training, and fields that would write files.
_SKIPPED_OF_MODEL = frozenset({"optim", "model_transform", "model_context_managers"})
_SKIPPED_OF_CONFIG = frozenset(
    {
        "_cpu_offloading_context",
        "config_logger_dir",
        "data_step_fn",
        "embedding_init_method",
        "finalize_model_grads_func",
        "forward_step_fn",
        "fp4_quantizer_factory",
        "fp8_quantizer_factory",
        "grad_scale_func",
        "grad_sync_func",
        "init_method",
        "no_sync_func",
        "output_layer_init_method",
        "param_sync_func",
        "quant_recipe",
        "timers",
        "tp_comm_overlap_cfg",
        "transformer_layer_spec",
    }
)
# Code from beside a tokenizer is never run, whatever a checkpoint asks for.
_FORCED = {"trust_remote_code": False}
# A model's part of the graph has about a hundred values. References can make more of them, or a circle.
_MOST_VALUES = 100_000
_DEEPEST = 50
# Characters of the file that a message shows.
_SHOWN = 80


@dataclass(frozen=True)
class Call:
    """A function or class, and the arguments that it is to be called with.

    Attributes:
        function: Its name.
        arguments: Plain values, names, and further calls, by the names of the parameters.
        is_partial: Whether the arguments are only fixed, for a later call.
    """

    function: Name
    arguments: Mapping[str, Any]
    is_partial: bool = False


def is_of_training(field: str) -> bool:
    """Whether a field of a model's configuration is a function or an object of training, or would write files."""
    return field in _SKIPPED_OF_CONFIG


class _Malformed(Exception):
    """The graph is not one that fiddle writes."""


def read_model(context: Path, allowed: AllowedNames) -> Call:
    """Reads how a checkpoint's model is built.

    Args:
        context: The directory with io.json.
        allowed: The names that the file may use.

    Returns:
        The call of NeMo's model class. Its "config" is one of a configuration class.

    Raises:
        ConfigError: If the file cannot be read, holds no model, or names something else; with a line for each name.
    """
    file = context / "io.json"
    try:
        graph = read_json(file, finite=False)  # many trainers' settings have infinity as a limit
    except FileError as error:
        raise ConfigError([f"{error}: copy or save the checkpoint again"]) from error
    try:
        reader = _Reader(graph, file, allowed)
        model = reader.model()
    except _Malformed as error:
        raise ConfigError([f"{file} does not describe a model ({error}): copy or save the checkpoint again"]) from error
    if reader.problems:
        raise ConfigError(reader.problems)
    return model


def read_transform(context: Path) -> Call | None:
    """Reads the additions of a training job to its model, such as adapters.

    Args:
        context: The directory with io.json.

    Returns:
        The call of its class, with the arguments that are numbers or text; None if there is none. It must not be
        called: its name is not checked.

    Raises:
        ConfigError: If the file cannot be read, or holds no model.
    """
    file = context / "io.json"
    try:
        return _Reader(read_json(file, finite=False), file, AllowedNames()).transform()
    except FileError as error:
        raise ConfigError([f"{error}: copy or save the checkpoint again"]) from error
    except _Malformed as error:
        raise ConfigError([f"{file} does not describe a model ({error}): copy or save the checkpoint again"]) from error


class _Reader:
    """Turns nodes of the graph into values.

    Args:
        graph: The content of io.json.
        file: Its name, for messages.
        allowed: The names that it may use.

    Attributes:
        problems: A line for each name found that is not allowed.
    """

    def __init__(self, graph: Any, file: Path, allowed: AllowedNames) -> None:
        if not isinstance(graph, dict) or not isinstance(graph.get("objects"), dict) or "root" not in graph:
            raise _Malformed("it has no root and objects")
        self._root, self._objects = graph["root"], graph["objects"]
        self._file, self._allowed = file, allowed
        self._values = 0
        self.problems: list[str] = []

    def _model(self) -> Any:
        """The node of the model, which is an argument of the root, or the root."""
        root = self._node(self._root)
        arguments = self._arguments(root) if self._buildable(root) else {}
        model = self._node(arguments["model"]) if "model" in arguments else root
        if self._buildable(model) != _CONFIG:
            raise _Malformed("its root has no model")
        return model

    def transform(self) -> Call | None:
        """The addition to the model, with its plain arguments."""
        transform = self._node(self._arguments(self._model()).get("model_transform"))
        if self._buildable(transform) is None:
            return None
        values = {name: self._node(node) for name, node in self._arguments(transform).items()}
        leaves = {
            name: node.get("value") if isinstance(node, dict) and node.get("type") == "leaf" else node
            for name, node in values.items()
        }
        plain = {name: value for name, value in leaves.items() if isinstance(value, str | int | float)}
        return Call(self._name(self._metadata(transform)[0]), plain)

    def model(self) -> Call:
        """The model."""
        model = self._model()
        arguments = self._arguments(model)
        config = self._node(arguments.get("config"))
        if self._buildable(config) != _CONFIG:
            raise _Malformed("the model has no config")
        values = {
            "config": self._call(config, "model.config", _SKIPPED_OF_CONFIG),
            **{
                name: self._value(node, f"model.{name}")
                for name, node in arguments.items()
                if name not in _SKIPPED_OF_MODEL and name != "config"
            },
        }
        return Call(self._callable(model, "model"), values)

    def _node(self, node: Any) -> Any:
        """The node that a reference leads to."""
        for _ in range(_DEEPEST):
            if not isinstance(node, dict) or node.get("type") != "ref":
                return node
            key = node.get("key")
            if not isinstance(key, str) or key not in self._objects:
                raise _Malformed(f"nothing has the key {str(key)[:_SHOWN]!r}")
            node = self._objects[key]
        raise _Malformed("references go in a circle")

    def _type(self, node: Any) -> Name | None:
        """The type of an object; None for anything else."""
        kind = node.get("type") if isinstance(node, dict) else None
        return None if not isinstance(kind, dict) else self._name(kind)

    def _buildable(self, node: Any) -> str | None:
        """The kind of configuration that an object is; None for anything else."""
        kind = self._type(node)
        if kind is None or str(kind) in _BUILDABLES:
            return _BUILDABLES.get(str(kind))
        # An object that NeMo has saved by its own configuration; a pickle of one has no such metadata.
        return _CONFIG if str(self._type(self._node(node.get("metadata")))) == _METADATA else None

    def _name(self, node: Any) -> Name:
        parts = (node.get("module"), node.get("name")) if isinstance(node, dict) else ()
        if not parts or not all(isinstance(part, str) and is_dotted(part) for part in parts):
            raise _Malformed(f"{repr(parts)[:_SHOWN]} is no name")
        return Name(*map(str, parts))

    def _items(self, node: Any) -> list[Any]:
        items = node.get("items") if isinstance(node, dict) else None
        if not isinstance(items, list) or not all(isinstance(item, list) and len(item) == 2 for item in items):
            raise _Malformed("an object has no items")
        return [value for _, value in items]

    def _metadata(self, node: Any) -> list[Any]:
        """Fiddle's metadata of a configuration: the callable, and the names of the arguments that it is sure of."""
        fields = self._items(self._node(node.get("metadata")))
        if len(fields) < 2:
            raise _Malformed("a configuration has no callable")
        return fields

    def _arguments(self, node: Any) -> dict[str, Any]:
        """A configuration's arguments, as nodes."""
        names, values = self._items(self._node(self._metadata(node)[1])), self._items(node)
        if len(names) != len(values) or not all(isinstance(name, str) and name.isidentifier() for name in names):
            raise _Malformed("a configuration's arguments have no names")
        return dict(zip(names, values, strict=True))

    def _callable(self, node: Any, place: str) -> Name:
        """The callable of a configuration; a problem if it is not allowed."""
        name, is_partial = self._name(self._metadata(node)[0]), self._buildable(node) == _PARTIAL
        if not (self._allowed.allows_partial(name) if is_partial else self._allowed.allows_call(name)):
            self._refuse(name, place, "called")
        return name

    def _call(self, node: Any, place: str, skipped: frozenset[str] = frozenset()) -> Call:
        function = self._callable(node, place)
        arguments = {
            name: _FORCED[name] if name in _FORCED else self._value(value, f"{place}.{name}")
            for name, value in self._arguments(node).items()
            if name not in skipped and not self._is_unset(value)
        }
        return Call(function, arguments, self._buildable(node) == _PARTIAL)

    def _is_unset(self, node: Any) -> bool:
        return str(self._type(self._node(node))) == _NO_VALUE

    def _value(self, node: Any, place: str) -> Any:
        node = self._node(node)
        self._values += 1
        if self._values > _MOST_VALUES or place.count(".") + place.count("[") > _DEEPEST:
            raise _Malformed(f"more than {_MOST_VALUES} values, or more than {_DEEPEST} of them in one another")
        if not isinstance(node, dict):
            return self._plain(node, place)
        if node.get("type") == "leaf":
            return self._plain(node.get("value"), place)
        if node.get("type") == "pyref":
            name = self._name(node)
            if not self._allowed.allows_value(name):
                self._refuse(name, place, "imported")
            return name
        kind = self._type(node)
        if kind is None:
            raise _Malformed(f"{place} is of no type that fiddle has")
        if self._buildable(node) is not None:
            return self._call(node, place)
        if str(kind) in _SEQUENCES:
            values = [self._value(item, f"{place}[{index}]") for index, item in enumerate(self._items(node))]
            return _SEQUENCES[str(kind)](values)
        if str(kind) == "builtins.dict":
            return self._mapping(node, place)
        self.problems.append(
            f"{self._file} has an object of {kind} at {place}, which may be a pickle: none is ever read; save the "
            "checkpoint without it"
        )
        return None

    def _mapping(self, node: Any, place: str) -> dict[Any, Any]:
        keys, values = self._items(self._node(node.get("metadata"))), self._items(node)
        if len(keys) != len(values) or not all(isinstance(key, str | int) for key in keys):
            raise _Malformed(f"{place} has values without keys")
        return {key: self._value(value, f"{place}[{key!r}]") for key, value in zip(keys, values, strict=True)}

    def _plain(self, value: Any, place: str) -> Any:
        """A value that JSON can hold itself."""
        if isinstance(value, list):
            return [self._value(item, f"{place}[{index}]") for index, item in enumerate(value)]
        if isinstance(value, dict):
            raise _Malformed(f"{place} is of no type that fiddle has")
        if isinstance(value, float) and not math.isfinite(value):
            raise _Malformed(f"{place} is {value}")
        return value

    def _refuse(self, name: Name, place: str, done: str) -> None:
        self.problems.append(
            f"{self._file} names {name} at {place}, which is none of the model, config and tokenizer classes that a "
            f"checkpoint may name, so it is not {done}: if you trust it, add trust_checkpoint={name}"
        )
