# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A NeMo 2.0 checkpoint's settings of its model and its tokenizer, read from the context without NeMo."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_ptq.checkpoint.metadata import read_model_yaml
from nemo_ptq.checkpoint.tokenizers import with_nemos_special_tokens
from nemo_ptq.errors import PtqError
from nemo_ptq.pretrained import import_transformers, load_pretrained

_TOKENIZER = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"
_GENERATION_CONFIG = "transformers.generation.configuration_utils.GenerationConfig"


@dataclass(frozen=True)
class Context:
    """A checkpoint's ``context/``.

    Attributes:
        path: The directory.
        config: The fields of NeMo's config, as attributes; sizes that follow from others are filled in.
        config_class: Name of that config's class, e.g. "Llama31Config8B".
        tokenizer: Description of the tokenizer.
    """

    path: Path
    config: Any
    config_class: str
    tokenizer: dict[str, Any]

    @property
    def has_vocab_size(self) -> bool:
        """Whether the configuration names the vocabulary's size itself."""
        return self.config.vocab_size is not None

    @property
    def is_known(self) -> bool:
        """Whether the tokenizer and the generation settings lie in files that transformers reads as NeMo would."""
        return self.tokenizer_is_known and self.generation_is_known

    @property
    def tokenizer_is_known(self) -> bool:
        """Whether transformers reads the tokenizer as NeMo would."""
        settings = {name: value for name, value in self.tokenizer.items() if value not in (None, [], "")}
        defaults = {"include_special_tokens": False, "trust_remote_code": False, "use_fast": True}
        name = str(settings.pop("pretrained_model_name", ""))
        is_plain = settings.pop("_target_", None) == _TOKENIZER and all(
            defaults.get(key, ...) == value for key, value in settings.items()
        )
        return is_plain and self._is_inside(name)

    def _is_inside(self, path: str) -> bool:
        return bool(path) and not Path(path).is_absolute() and (self.path / path).is_dir()

    @property
    def generation_is_known(self) -> bool:
        """Whether transformers reads the generation settings as NeMo would."""
        described = self.config.generation_config
        if not isinstance(described, dict):
            return described is None
        auto = described.get("auto_cls") or {}
        return auto.get("_target_") == _GENERATION_CONFIG and self._is_inside(
            str(described.get("pretrained_model_name_or_path", ""))
        )

    def load_generation_config(self) -> Any:
        """Returns transformers' GenerationConfig, None where there is none; of a context that :attr:`is_known`."""
        described = self.config.generation_config
        if not described:
            return None
        files = self.path / described["pretrained_model_name_or_path"]
        try:
            return import_transformers().GenerationConfig.from_pretrained(files)
        except Exception as error:  # transformers raises any kind of error
            raise PtqError(_unloadable(files, "generation_config.json", error)) from error

    def load_tokenizer(self) -> Any:
        """Returns transformers' tokenizer with the special tokens that NeMo gives it; of a context that `is_known`."""
        files = self.path / self.tokenizer["pretrained_model_name"]
        try:
            return with_nemos_special_tokens(load_pretrained(files))
        except Exception as error:  # every tokenizer class raises its own kinds
            raise PtqError(_unloadable(files, "tokenizer", error)) from error


def _unloadable(files: Path, what: str, error: Exception) -> str:
    reason = str(error).partition("\n")[0]
    return f"{files} has no {what} that can be loaded ({reason}): copy or save the checkpoint again"


def read_context(checkpoint: Path) -> Context:
    """Reads a checkpoint's context.

    Args:
        checkpoint: Directory with ``context/``.

    Raises:
        ConfigError: If it does not describe a model.
    """
    fields = read_model_yaml(checkpoint)
    tokenizer = fields.pop("tokenizer") or {}
    config = SimpleNamespace(**{"generation_config": None, "vocab_size": None, **fields})
    heads = config.num_attention_heads
    config.num_query_groups = config.num_query_groups or heads
    config.kv_channels = config.kv_channels or config.hidden_size // heads
    config.ffn_hidden_size = config.ffn_hidden_size or 4 * config.hidden_size
    config.activation_func = str(fields["activation_func"]["_target_"]).rpartition(".")[2]
    return Context(checkpoint / "context", config, str(fields["_target_"]).rpartition(".")[2], tokenizer)
