# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Makes an unbuilt fiddle configuration of NeMo's model from a call of :mod:`~nemo_ptq.checkpoint.context_graph`."""

import enum
import inspect
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fiddle as fdl
import yaml
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo.collections.llm.gpt.model.base import GPTModel
from nemo.lightning.io.artifact import Artifact
from nemo.lightning.io.mixin import IOMixin

from nemo_ptq.checkpoint.allowed_names import AllowedNames, Name, is_enum_member, is_nemo_model
from nemo_ptq.checkpoint.context_graph import Call
from nemo_ptq.errors import PtqError


def model_config(model: Call, context: Path, allowed: AllowedNames) -> fdl.Config:
    """Makes the fiddle configuration of a model; its modules are imported, and nothing is called.

    Args:
        model: The content of io.json, whose names are all allowed.
        context: The directory that files are named relative to.
        allowed: The allowed names.

    Raises:
        PtqError: If the installed packages have no such class.
    """
    return _Maker(context, allowed).value(model)


def description(model: Call, context: Path, allowed: AllowedNames) -> dict[str, Any]:
    """Makes the content of NeMo's model.yaml: a model's arguments with the defaults of its classes, as plain data.

    Args:
        model: The content of io.json, whose names are all allowed.
        context: The directory that files are named relative to.
        allowed: The allowed names.

    Raises:
        PtqError: If the installed packages have no such class.
    """
    holder = SimpleNamespace(model=model_config(model, context, allowed))
    text = IOMixin._io_dump_yaml(None, holder, ["model"])["model"]
    return dict(_relative(yaml.safe_load(text), f"{context}{os.sep}"))


def _relative(value: Any, root: str) -> Any:
    """Plain data with the paths below a directory relative to it."""
    if isinstance(value, dict):
        return {key: _relative(item, root) for key, item in value.items()}
    if isinstance(value, list):
        return [_relative(item, root) for item in value]
    return value.removeprefix(root) if isinstance(value, str) else value


class _Maker:
    def __init__(self, context: Path, allowed: AllowedNames) -> None:
        self._context, self._allowed = context, allowed

    def value(self, value: Any) -> Any:
        if isinstance(value, Call):
            return self._configuration(value)
        if isinstance(value, Name):
            return self._imported(value)
        if isinstance(value, list | tuple):
            return type(value)(map(self.value, value))
        if isinstance(value, dict):
            return {key: self.value(item) for key, item in value.items()}
        return value

    def _configuration(self, call: Call) -> fdl.Buildable:
        function = self._imported(call.function)
        arguments = _known(function, {name: self.value(value) for name, value in call.arguments.items()})
        if call.is_partial:
            return fdl.Partial(function, **arguments)
        for artifact in getattr(function, "__io_artifacts__", ()):
            if artifact.attr in arguments:
                arguments[artifact.attr] = self._artifact(artifact, arguments[artifact.attr])
        return fdl.Config(function, **arguments)

    def _artifact(self, artifact: Artifact, value: Any) -> Any:
        """The path of a file that NeMo has put into the context, or the text that is no file of it."""
        if isinstance(value, fdl.Config):
            return value.attr
        return value if artifact.skip or value is None else str(self._context / str(value))

    def _imported(self, name: Name) -> Any:
        try:
            value = import_module(name.module)
            for part in name.name.split("."):
                value = getattr(value, part)
        except (ImportError, AttributeError) as error:
            raise PtqError(
                f"{self._context} names {name}, which cannot be imported ({error}): install the NeMo that wrote it"
            ) from error
        if not self._allowed.is_trusted(name) and not _is_expected(name, value):
            raise PtqError(f"{self._context} names {name}, which is no model and no config class: save it again")
        return value


def _is_expected(name: Name, value: Any) -> bool:
    """Whether an allowed name refers to an object of the right kind for its place."""
    if is_nemo_model(name):
        return isinstance(value, type) and issubclass(value, GPTModel | TransformerConfig)
    return not is_enum_member(name) or isinstance(value, enum.Enum)


def _known(function: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out arguments of other NeMo versions."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a function of torch's in C++
        return dict(arguments)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}
