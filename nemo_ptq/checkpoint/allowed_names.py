# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Which functions and classes a checkpoint may name: only those that a NeMo model's configuration needs.

A checkpoint is data, and its context says which Python code builds the model. Only the names listed here, and those
that the user adds with ``trust_checkpoint``, are imported and called.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")

NEMO_MODELS = "nemo.collections.llm.gpt.model."
"""The modules of NeMo's model and configuration classes; importers check that a name from there is such a class."""
_TOKENIZERS = "nemo.collections.common.tokenizers."
GENERATION_CONFIG = "transformers.generation.configuration_utils.GenerationConfig"
_ARTIFACTS = "nemo.lightning.io.artifact.file."

# Those that read their files as data. TabularTokenizer, for one, unpickles them.
_CALLS = frozenset(
    {
        f"{_TOKENIZERS}huggingface.auto_tokenizer.AutoTokenizer",
        f"{_TOKENIZERS}sentencepiece_tokenizer.SentencePieceTokenizer",
        f"{_TOKENIZERS}tiktoken_tokenizer.TiktokenTokenizer",
        f"{_TOKENIZERS}bytelevel_tokenizers.ByteLevelTokenizer",
        f"{_TOKENIZERS}null_tokenizer.NullTokenizer",
        "nemo.lightning.io.artifact.hf_auto.from_pretrained",
        f"{_ARTIFACTS}FileArtifact",
        f"{_ARTIFACTS}DirArtifact",
        f"{_ARTIFACTS}DirOrStringArtifact",
        f"{_ARTIFACTS}PathArtifact",
    }
)
_ACTIVATIONS = frozenset(
    {
        *(
            f"{module}.{name}"
            for module in ("torch.nn.functional", "torch._C._nn", "torch")
            for name in (
                "celu",
                "elu",
                "gelu",
                "hardswish",
                "leaky_relu",
                "logsigmoid",
                "mish",
                "relu",
                "relu6",
                "selu",
                "sigmoid",
                "silu",
                "softplus",
                "tanh",
            )
        ),
        *(f"nemo.collections.llm.fn.activation.{name}" for name in ("openai_gelu", "quick_gelu", "squared_relu")),
        *(f"megatron.core.activations.{name}" for name in ("fast_gelu", "quick_gelu", "squared_relu")),
    }
)
_DTYPES = frozenset(
    f"torch.{name}"
    for name in (
        *("bfloat16", "bool", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"),
        *("int16", "int32", "int64", "int8", "uint8"),
    )
)
# Members of enumerations, as Enum.member.
_ENUMS = ("megatron.core.transformer.enums", "megatron.core.enums")


@dataclass(frozen=True)
class Name:
    """A checkpoint's name of a function, a class or a constant.

    Attributes:
        module: Its module.
        name: Its name there; with dots in it for something inside a class.
    """

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class AllowedNames:
    """The names that a checkpoint may use.

    Attributes:
        trusted: Dotted names that the user has added: functions and classes, or modules with everything in them.
    """

    trusted: Sequence[str] = ()

    def is_trusted(self, name: Name) -> bool:
        """Whether the user has added a name."""
        return any(str(name) == trusted or str(name).startswith(f"{trusted}.") for trusted in self.trusted)

    def allows_call(self, name: Name) -> bool:
        """Whether the model's configuration may call a function or a class."""
        return str(name) in _CALLS or is_nemo_model(name) or self.is_trusted(name)

    def allows_partial(self, name: Name) -> bool:
        """Whether the model's configuration may fix arguments of a function that is called later."""
        return is_activation(name) or self.is_trusted(name)

    def allows_value(self, name: Name) -> bool:
        """Whether a name may stand as a value: it is imported, and not called before the model runs."""
        return (
            is_activation(name)
            or is_dtype(name)
            or str(name) == GENERATION_CONFIG
            or is_enum_member(name)
            or self.is_trusted(name)
        )


def is_nemo_model(name: Name) -> bool:
    """Whether a name stands where NeMo's model and configuration classes are."""
    return name.module.startswith(NEMO_MODELS) and _IDENTIFIER.fullmatch(name.name) is not None


def is_activation(name: Name) -> bool:
    """Whether a name is that of an activation function."""
    return str(name) in _ACTIVATIONS


def is_dtype(name: Name) -> bool:
    """Whether a name is that of one of torch's data types."""
    return str(name) in _DTYPES


def is_enum_member(name: Name) -> bool:
    """Whether a name stands where the members of Megatron's enumerations are."""
    return name.module in _ENUMS and name.name.count(".") == 1


def is_dotted(text: str) -> bool:
    """Whether a text is a dotted name."""
    return _DOTTED.fullmatch(text) is not None


def read_names(text: str | None) -> tuple[str, ...]:
    """Reads ``trust_checkpoint``: dotted names with commas between; none of None.

    Raises:
        ValueError: If a part of it is no dotted name.

    Example:
        >>> read_names("my_models.MyConfig, my_models.MyModel")
        ('my_models.MyConfig', 'my_models.MyModel')
    """
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    for name in names:
        if not is_dotted(name):
            raise ValueError(f"{name!r} is no dotted name")
    return names
