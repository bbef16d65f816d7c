# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Reads a tokenizer's files without transformers: whether they are all there, and the largest token."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_ptq.checkpoint.huggingface.hf_files import found_in, read_json
from nemo_ptq.errors import PtqError
from nemo_ptq.pretrained import OF_TRANSFORMERS_5, TOKENS_WITHOUT_ROWS, is_tokenizer_class, tokenizer_settings

# Files of a Hugging Face tokenizer with tokens by name.
_BY_NAME = ("vocab.json", "added_tokens.json")
_SENTENCEPIECE = "tokenizer.model"
_VOCABULARIES = ("tokenizer.json", _SENTENCEPIECE, "vocab.json", "vocab.txt", "spiece.model")
# Without a tokenizer.json, which files classes read.
_BYTE_PAIRS = ("vocab.json", "merges.txt")
_FILES_OF = {
    **dict.fromkeys(("CodeLlamaTokenizer", "GemmaTokenizer", "LlamaTokenizer"), (_SENTENCEPIECE,)),
    **dict.fromkeys(("CodeGenTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer"), _BYTE_PAIRS),
    **dict.fromkeys((OF_TRANSFORMERS_5, "PreTrainedTokenizer"), ("tokenizer.json",)),
}
# Files of tekken and tiktoken, which transformers reads only through the model's own code, or not at all.
_OTHER_TOKENIZERS = ("tekken.json", "*.tiktoken", "tokenizer.model*")


def tokenizer_problem(directory: Path) -> str | None:
    """Says in one line why a Hugging Face directory has no tokenizer that can be loaded; None where it may have one."""
    if not (directory / "tokenizer_config.json").is_file():  # transformers would make one up, with other tokens
        lacks = "no tokenizer_config.json"
    elif not any((directory / name).is_file() for name in _VOCABULARIES):
        lacks = "no tokenizer.json, and no other vocabulary"
    else:
        return _class_problem(directory)
    return f"{directory} has {lacks}: {tokenizer_way_out(directory)}; {found_in(directory)}"


def _class_problem(directory: Path) -> str | None:
    """Says why the class that a tokenizer names cannot load it; None where it may."""
    settings = tokenizer_settings(directory)
    name = settings.get("tokenizer_class")
    if name is None:
        return None  # that of the model's type
    if not isinstance(name, str) or not is_tokenizer_class(name):
        code = ", and the code that the model brings is not run" if "auto_map" in settings else ""
        return (
            f"{directory} has no tokenizer that can be loaded: its tokenizer_config.json has tokenizer_class {name!r}, "
            f'which transformers does not have{code}; write "PreTrainedTokenizerFast" there, and put a tokenizer.json '
            "of the same tokens beside it if there is none"
        )
    if (directory / "tokenizer.json").is_file():
        return None
    missing = [file for file in _FILES_OF.get(name.removesuffix("Fast"), ()) if not (directory / file).is_file()]
    if not missing:
        return None
    return (
        f"{directory} has no {' and no '.join(dict.fromkeys(('tokenizer.json', *missing)))} for its {name}: "
        f"{tokenizer_way_out(directory)}; {found_in(directory)}"
    )


def tokenizer_way_out(directory: Path) -> str:
    """Says what to do about a Hugging Face directory whose tokenizer cannot be loaded."""
    others = [name for name in _OTHER_TOKENIZERS if any(directory.glob(name))]
    if not others or (directory / "tokenizer.json").is_file():
        return "give it the tokenizer's files that the model was published with"
    return f"{others[0]} alone is not enough, put a tokenizer.json of the same model beside it"


def tokenizer_of(checkpoint: Path, settings: Any = None) -> Path | None:
    """Returns the place of a checkpoint's tokenizer.

    Args:
        checkpoint: A Hugging Face directory, or a NeMo checkpoint.
        settings: The tokenizer's settings in a NeMo checkpoint's context; None for a Hugging Face directory.

    Returns:
        A Hugging Face directory, or a file of sentencepiece's; None where it is not in the checkpoint.
    """
    if settings is None:
        return checkpoint
    name = settings.get("pretrained_model_name") or settings.get("model_path")
    path = checkpoint / "context" / str(name)
    return path if name and path.exists() else None


def largest_token(tokenizer: Path) -> tuple[int, str] | None:
    """Returns the largest token id of a tokenizer that has a row in its model's embedding, and the token.

    Args:
        tokenizer: A Hugging Face directory, or a file of sentencepiece's.

    Returns:
        None where no file there lists the tokens.

    Raises:
        PtqError: If a file is damaged.
    """
    if tokenizer.is_file():
        return max(_of_sentencepiece(tokenizer), default=None)
    try:
        tokens = (token for token in _of_directory(tokenizer) if token[1] not in TOKENS_WITHOUT_ROWS)
        return max(tokens, default=None)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PtqError(f"the tokenizer in {tokenizer} cannot be read: {error!r}; copy it again") from error


def _of_directory(directory: Path) -> Iterator[tuple[int, str]]:
    if (directory / "tokenizer.json").is_file():
        content = read_json(directory / "tokenizer.json")
        yield from _of_model(content["model"]["vocab"])
        for token in content.get("added_tokens") or ():
            yield int(token["id"]), str(token["content"])
    else:
        for name in _BY_NAME:
            if (directory / name).is_file():
                yield from _of_model(read_json(directory / name))
        if (directory / _SENTENCEPIECE).is_file():
            yield from _of_sentencepiece(directory / _SENTENCEPIECE)
    if (directory / "tokenizer_config.json").is_file():
        # Tokens that were added when it was saved; transformers takes them from here as well.
        added = read_json(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
        for number, token in added.items():
            yield int(number), str(token["content"])


def _of_model(vocabulary: Any) -> Iterator[tuple[int, str]]:
    if isinstance(vocabulary, dict):
        yield from ((int(number), str(token)) for token, number in vocabulary.items())
    else:  # of tokens with their scores, in the order of their ids
        yield from ((number, str(token[0])) for number, token in enumerate(vocabulary))


def _of_sentencepiece(file: Path) -> Iterator[tuple[int, str]]:
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise PtqError(f"{file} is no sentencepiece model: copy it again") from error
    if last := processor.get_piece_size():
        yield last - 1, processor.id_to_piece(last - 1)
