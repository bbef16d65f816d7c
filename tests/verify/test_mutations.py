# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Whatever is done to a finished directory, verify() notices: every kind of mutation, on every algorithm.

Most mutations are tried with a manifest that matches the damage, so that only the content can give them away. One
kind cannot be noticed like that: another byte inside the weights is just another weight. The manifest's checksums are
there for it, and it is tried without touching them.
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .conftest import Copy
from .damage import LAYOUTS, failures, rank_file, replace_file
from .qnemo_writer import write_manifest

SEED = 20241124
# Of one layout, at the least. There are eight.
LEAST, LEAST_KINDS = 100, 15

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Mutation:
    """One thing that is done to a directory.

    Attributes:
        kind: What is done.
        label: To what.
        apply: Does it; files are hard links, so they are replaced and not written into.
        signed: Whether the manifest is made to match afterwards.
    """

    kind: str
    label: str
    apply: Callable[[Path], None]
    signed: bool = True


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


# --- bytes and files --------------------------------------------------------------------------------------------------


def flipped_bytes(directory: Path, chance: random.Random) -> Iterator[Mutation]:
    """Anywhere: only the checksums can tell, and they do."""
    for path in files_of(directory):
        name = path.relative_to(directory)
        size = path.stat().st_size
        for position in {0, size - 1, *(chance.randrange(size) for _ in range(3))}:
            bit = 1 << chance.randrange(8)

            def flip(directory: Path, name: Path = name, position: int = position, bit: int = bit) -> None:
                content = bytearray((directory / name).read_bytes())
                content[position] ^= bit
                replace_file(directory / name, bytes(content))

            yield Mutation("flipped byte", f"{name} at {position}", flip, signed=False)


def truncated_files(directory: Path, chance: random.Random) -> Iterator[Mutation]:
    for path in files_of(directory):
        name, size = path.relative_to(directory), path.stat().st_size
        if name.name == "manifest.json":
            continue
        for length in (0, chance.randrange(1, size), size - 1):

            def cut(directory: Path, name: Path = name, length: int = length) -> None:
                replace_file(directory / name, (directory / name).read_bytes()[:length])

            yield Mutation("truncated file", f"{name} to {length} bytes", cut, signed=False)
            if name.suffix != ".yaml" or length == 0:  # the beginning of a YAML file is a YAML file
                yield Mutation("truncated file, signed", f"{name} to {length} bytes", cut)


def deleted_files(directory: Path, chance: random.Random) -> Iterator[Mutation]:
    for path in files_of(directory):
        name = path.relative_to(directory)

        def delete(directory: Path, name: Path = name) -> None:
            (directory / name).unlink()

        yield Mutation("deleted file", str(name), delete, signed=name.name != "manifest.json")


def swapped_ranks(directory: Path, chance: random.Random) -> Iterator[Mutation]:
    """With the header as it is, which says whose file it is; and with a header that lies."""
    world = len(list(directory.glob("rank*.safetensors")))
    for first in range(world):
        for second in range(first + 1, world):

            def swap(directory: Path, first: int = first, second: int = second) -> None:
                contents = [rank_file(directory, rank).read_bytes() for rank in (first, second)]
                replace_file(rank_file(directory, first), contents[1])
                replace_file(rank_file(directory, second), contents[0])

            def swap_headers_too(directory: Path, first: int = first, second: int = second) -> None:
                left, right = (load_file(rank_file(directory, rank)) for rank in (first, second))
                for rank, tensors in ((first, right), (second, left)):
                    rank_file(directory, rank).unlink()
                    save_file(tensors, rank_file(directory, rank), metadata={"rank": str(rank)})

            yield Mutation("swapped ranks", f"{first} and {second}", swap)
            yield Mutation("swapped ranks, headers too", f"{first} and {second}", swap_headers_too)


# --- tensors ----------------------------------------------------------------------------------------------------------


def with_tensors(rank: int, change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    """Changes the tensors of one rank's file, whose header keeps its metadata."""

    def apply(directory: Path) -> None:
        path = rank_file(directory, rank)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = {name: value.clone() for name, value in load_file(path).items()}
        change(tensors)
        path.unlink()
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=metadata)

    return apply


def on_ranks(ranks: range, change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    changes = [with_tensors(rank, change) for rank in ranks]

    def apply(directory: Path) -> None:
        for change in changes:
            change(directory)

    return apply


def deleted_tensors(directory: Path, chance: random.Random) -> Iterator[Mutation]:
    """Every tensor of every rank."""
    for path in sorted(directory.glob("rank*.safetensors")):
        rank = int(path.stem.removeprefix("rank"))
        for name in load_file(path):
            yield Mutation(
                "deleted tensor",
                f"{name} of rank {rank}",
                with_tensors(rank, lambda t, name=name: t.pop(name)),
            )


def renamed_retyped_reshaped(directory: Path, chance: random.Random) -> Iterator[Mutation]:
    """One of the three for each tensor, and the next for the next."""

    def rename(tensors: Tensors, name: str) -> None:
        tensors[f"{name}_"] = tensors.pop(name)

    def retype(tensors: Tensors, name: str) -> None:
        value = tensors[name]
        if value.element_size() == 1:
            tensors[name] = value.view(torch.int8 if value.dtype == torch.uint8 else torch.uint8)
        else:
            tensors[name] = value.to(torch.float16 if value.dtype == torch.float32 else torch.float32)

    def reshape(tensors: Tensors, name: str) -> None:
        tensors[name] = tensors[name][None]

    ways = (("renamed tensor", rename), ("retyped tensor", retype), ("reshaped tensor", reshape))
    for index, name in enumerate(load_file(rank_file(directory, 0))):
        kind, change = ways[index % len(ways)]
        yield Mutation(kind, name, with_tensors(0, lambda t, name=name, change=change: change(t, name)))


def impossible_values(directory: Path, chance: random.Random) -> Iterator[Mutation]:
    """NaN, infinity, zero and less in scales; NaN in whatever can hold it."""
    for name, value in load_file(rank_file(directory, 1)).items():
        is_scale = "scaling_factor" in name
        if not value.is_floating_point():
            continue
        numbers = {"NaN": float("nan")}
        if value.element_size() > 1:
            numbers["infinity"] = float("inf")
        if is_scale:
            numbers |= {"zero": 0.0, "negative": -1.0}
            if value.element_size() > 1:
                numbers["denormal"] = torch.finfo(value.dtype).tiny / 4
        for what, number in numbers.items():
            position = chance.randrange(max(1, value.numel()))

            def put(tensors: Tensors, name: str = name, position: int = position, number: float = number) -> None:
                flat = tensors[name].float().reshape(-1)
                flat[position] = number
                tensors[name] = flat.reshape(tensors[name].shape).to(tensors[name].dtype)

            yield Mutation(f"{what} in a {'scale' if is_scale else 'tensor'}", name, with_tensors(1, put))


# The largest codes of each way to store a weight, as bytes.
SATURATED = {torch.float8_e4m3fn: 0x7E, torch.int8: 0x7F, torch.uint8: 0x77}


def unlikely_weights(directory: Path, chance: random.Random) -> Iterator[Mutation]:
    """Weights that are all zero, and quantized ones that all have the largest code, on every rank of a stage."""
    packed = json.loads((directory / "config.json").read_text())["quantization"]["quant_algo"] in (
        "W4A16_AWQ",
        "W4A8_AWQ",
    )
    ranks = range(2)
    for name, value in load_file(rank_file(directory, 0)).items():
        if value.dim() < 2 or not name.endswith(".weight"):
            continue
        yield Mutation("zeroed weight", name, on_ranks(ranks, lambda t, name=name: t[name].zero_()))
        if value.element_size() == 1:
            byte = 0x77 if packed else SATURATED[value.dtype]
            yield Mutation(
                "saturated weight",
                name,
                on_ranks(ranks, lambda t, name=name, byte=byte: t[name].view(torch.uint8).fill_(byte)),
            )


def disagreeing_ranks(directory: Path, chance: random.Random) -> Iterator[Mutation]:
    """A tensor that all ranks of a stage share has another value on one of them."""
    first, second = (load_file(rank_file(directory, rank)) for rank in (0, 1))
    for name, value in second.items():
        if value.dim() < 2 and torch.equal(first[name].float(), value.float()):
            yield Mutation("disagreeing ranks", name, with_tensors(1, lambda t, name=name: t[name].mul_(1.25)))


# --- config.json ------------------------------------------------------------------------------------------------------


def says_nothing(config: dict[str, Any], key: str, value: Any, other: Any) -> bool:
    """Whether a directory means the same with another value of a field; an ellipsis deletes it."""
    if key in ("producer.name", "producer.version"):
        return other is not ...  # who wrote it
    if key in ("mapping.moe_tp_size", "mapping.moe_ep_size"):
        return other is ...  # what readers take for granted
    if key == "rotary_pct":
        return config["position_embedding_type"] == "learned_absolute"
    # The row that two ranks pad an odd vocabulary with is zero, as that of a token that was never seen.
    return key == "vocab_size" and other == value + 1


def fields_of(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from fields_of(value, f"{prefix}{key}.")
        yield f"{prefix}{key}", value


def other_values(value: Any) -> list[Any]:
    """Values of the same type that mean something else, and one of another type."""
    if isinstance(value, bool):
        return [not value, int(value)]
    if isinstance(value, int):
        return [value + 1, 2 * value or 7, -value or -1, str(value)]
    if isinstance(value, float):
        return [value * 1.5, -value, str(value)]
    if isinstance(value, str):
        return [f"{value}x", value.swapcase(), "", 1]
    if value is None:
        return ["x", 1]
    return [[], {}, 1]


def edited_config(directory: Path, chance: random.Random) -> Iterator[Mutation]:
    """Every field: deleted, and with other values. Only the checksums notice those that mean the same."""
    config = json.loads((directory / "config.json").read_text())
    for key, value in fields_of(config):
        for other in (..., *other_values(value)):

            def edit(directory: Path, key: str = key, other: Any = other) -> None:
                config = json.loads((directory / "config.json").read_text())
                *outer, last = key.split(".")
                section = config
                for name in outer:
                    section = section[name]
                if other is ...:
                    del section[last]
                else:
                    section[last] = other
                replace_file(directory / "config.json", json.dumps(config).encode())

            same = says_nothing(config, key, value, other)
            kind = "edited config field, not signed" if same else "edited config field"
            yield Mutation(kind, f"{key}: {value!r} -> {other!r}", edit, signed=not same)


KINDS = (
    flipped_bytes,
    truncated_files,
    deleted_files,
    swapped_ranks,
    deleted_tensors,
    renamed_retyped_reshaped,
    impossible_values,
    unlikely_weights,
    disagreeing_ranks,
    edited_config,
)


def at_most(count: int, mutations: list[Mutation], chance: random.Random) -> list[Mutation]:
    """Chooses so many of each kind."""
    chosen: dict[str, list[Mutation]] = defaultdict(list)
    for mutation in chance.sample(mutations, len(mutations)):
        chosen[mutation.kind].append(mutation)
    return [mutation for of_kind in chosen.values() for mutation in of_kind[:count]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of_each_kind", [6, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_mutation_is_noticed(
    copy: Copy, capsys: pytest.CaptureFixture[str], layout: str, of_each_kind: int
) -> None:
    directory = copy(*LAYOUTS[layout])
    chance = random.Random(SEED)
    originals = {path: path.read_bytes() for path in files_of(directory)}
    mutations = [mutation for kind in KINDS for mutation in kind(directory, chance)]
    tried: Counter[str] = Counter()
    undetected = []
    for mutation in at_most(of_each_kind, mutations, chance):
        mutation.apply(directory)
        if mutation.signed:
            write_manifest(directory)
        if not failures(directory):
            undetected.append(f"{mutation.kind}: {mutation.label}")
        tried[mutation.kind] += 1
        for path, content in originals.items():
            if not path.exists() or path.read_bytes() != content:
                path.unlink(missing_ok=True)
                path.write_bytes(content)
    with capsys.disabled():
        print(f"\n{layout}: {tried.total()} mutations of {len(tried)} kinds, {len(undetected)} undetected")
    assert undetected == []
    assert tried.total() >= LEAST and len(tried) >= LEAST_KINDS
    assert failures(directory) == []
