# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Models whose output layer is their embedding, and whose files have an output layer all the same."""

from collections.abc import Mapping

from nemo_ptq.checkpoint.huggingface.stored_tensors import StoredTensor
from nemo_ptq.errors import PtqError
from nemo_ptq.models.hugging_face import HuggingFaceClass, Settings
from nemo_ptq.untrusted import open_file, parse_json

# Rows that are compared: training changes all of them.
_ROWS = 64


def check_tied_head(hf_class: HuggingFaceClass, settings: Settings, stored: Mapping[str, StoredTensor]) -> None:
    """Refuses an output layer that is not the embedding, although config.json says so.

    Args:
        hf_class: The model's class.
        settings: The settings of its config.json.
        stored: The tensors in the files; some rows of the two tensors are read.

    Raises:
        PtqError: If there is one.
    """
    head = f"{hf_class.output_layer}.weight"
    if not settings["tie_word_embeddings"] or head not in stored or head == hf_class.embedding:
        return
    one, other = stored[hf_class.embedding], stored[head]
    same = (one.dtype, one.shape) == (other.dtype, other.shape)
    if not same or _some_rows(hf_class.embedding, one) != _some_rows(head, other):
        raise PtqError(
            f"config.json has tie_word_embeddings true, and the files have a {head} that is not the embedding, and "
            "readers differ in which they take: set tie_word_embeddings to false if the head was trained, or take the "
            "tensor out of the files"
        )


def _some_rows(name: str, stored: StoredTensor) -> list[bytes]:
    """The bytes of rows that are spread over a matrix."""
    rows = range(0, stored.shape[0], max(1, stored.shape[0] // _ROWS))
    if stored.file.suffix != ".safetensors":
        import torch

        from nemo_ptq.checkpoint.huggingface.hf_weights import load_tensors

        tensor = load_tensors(stored.file)[name]
        return [tensor[row].contiguous().view(torch.uint8).numpy().tobytes() for row in rows]
    with open_file(stored.file) as file:
        length = int.from_bytes(file.read(8), "little")
        start, end = parse_json(file.read(length).decode())[name]["data_offsets"]
        size = (end - start) // stored.shape[0]
        found = []
        for row in rows:
            file.seek(8 + length + start + row * size)
            found.append(file.read(size))
    return found
