# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""verify() on sound directories, on damaged bytes and manifests, on foreign contexts, and on garbage."""

import random
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_ptq.verify.checks import Check, verify

from .conftest import Copy, Pristine
from .damage import ALGORITHMS, LAYOUTS, assert_noticed, edited_json, failures, replace_file
from .qnemo_writer import Recipe, write_manifest
from .reference import FAMILIES


@pytest.mark.parametrize(
    "family, algorithm",
    # The format describes experts for FP8 only.
    [pair for pair in product(FAMILIES, ALGORITHMS) if pair[0] != "mixtral" or pair[1] in ("no_quant", "fp8")],
)
def test_sound_directories_pass(pristine: Pristine, family: str, algorithm: str) -> None:
    for tp, pp in ((1, 1), (2, 2)):
        kv_cache = "FP8" if algorithm == "fp8" else None
        assert failures(pristine(family, Recipe(algorithm, tp=tp, pp=pp, dtype="bfloat16", kv_cache=kv_cache))) == []


@pytest.mark.parametrize("algorithm", ["no_quant", "fp8", "int8_sq"])
def test_copies_of_key_and_value_heads_pass(pristine: Pristine, algorithm: str) -> None:
    assert failures(pristine("llama3", Recipe(algorithm, tp=4))) == []


def test_names_are_unique_and_the_tokenizer_can_be_loaded(pristine: Pristine) -> None:
    checks = verify(pristine(*LAYOUTS["fp8"]), load_tokenizer=True)
    assert all(check.ok for check in checks)
    assert len({check.name for check in checks}) == len(checks)
    assert checks[-1] == Check("tokenizer round trip", True, "the text is unchanged")


def test_coverage_says_what_is_not_quantized_and_why(pristine: Pristine) -> None:
    recipe = Recipe("fp8", exclude=("lm_head", "transformer.layers.1.mlp.fc", "*attention.dense"))
    coverage = {check.name: check.detail for check in verify(pristine("llama", recipe))}["coverage"]
    assert coverage == (
        "FP8: attention.qkv 2/2, mlp.fc 1/2, mlp.gate 2/2, mlp.proj 2/2; not: "
        "attention.dense (excluded by *attention.dense), mlp.fc (excluded by transformer.layers.1.mlp.fc), "
        "lm_head (excluded by lm_head), embeddings and norms (never)"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_flipped_bit_in_any_file_is_noticed(copy: Copy, layout: str) -> None:
    directory = copy(*LAYOUTS[layout])
    for path in [path for path in directory.rglob("*") if path.is_file()]:
        original = path.read_bytes()
        for position in (0, len(original) // 3, len(original) - 1):
            damaged = bytearray(original)
            damaged[position] ^= 1 << random.Random(position).randrange(8)
            replace_file(path, bytes(damaged))
            assert_noticed(directory)
        replace_file(path, original)
    assert failures(directory) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_truncated_file_is_noticed_with_and_without_the_manifest(copy: Copy, layout: str) -> None:
    directory = copy(*LAYOUTS[layout])
    for path in [*directory.glob("*.safetensors"), directory / "config.json", directory / "nemo_context/model.yaml"]:
        original = path.read_bytes()
        for content in (b"", original[:5], original[: len(original) // 2], original[:-2]):
            replace_file(path, content)
            assert_noticed(directory, "checksums")
            write_manifest(directory)
            assert_noticed(directory)
        replace_file(path, original)
    write_manifest(directory)
    assert failures(directory) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("version"),
        lambda content: content.update(version=3),
        lambda content: content.update(files=[]),
        lambda content: content["files"].pop("config.json"),
        lambda content: content["files"].update({"gone.txt": {"size": 0, "sha256": "0"}}),
        lambda content: content["files"].update({"../config.json": {"size": 0, "sha256": "0"}}),
        lambda content: content["files"]["config.json"].update(size=1),
        lambda content: content["files"]["config.json"].update(sha256="0" * 64),
        lambda content: content["files"].update({"config.json": None}),
    ],
)
def test_edits_of_the_manifest_are_noticed(copy: Copy, change: Callable[[dict[str, Any]], None]) -> None:
    directory = copy(*LAYOUTS["fp8"])
    with edited_json(directory / "ptq/manifest.json") as content:
        change(content)
    assert_noticed(directory, "manifest", "files", "checksums")


def test_a_missing_manifest_an_unlisted_file_and_a_link_are_noticed(copy: Copy) -> None:
    directory = copy(*LAYOUTS["fp8"])
    (directory / "ptq/manifest.json").unlink()
    assert_noticed(directory, "manifest")
    directory = copy(*LAYOUTS["fp8"])
    (directory / "ptq/notes.txt").write_text("x")
    assert_noticed(directory, "files")
    directory = copy(*LAYOUTS["fp8"])
    target = directory / "nemo_context/model.yaml"
    outside = directory.parent / "model.yaml"
    target.rename(outside)
    target.symlink_to(outside)
    assert_noticed(directory, "files")


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.pop("config"),
        lambda model: model["config"].update(rotary_base=10000),
        lambda model: model["config"].update(scale_factor=32.0),
        lambda model: model["config"].update(old_context_len=None),
        lambda model: model["config"].update(num_query_groups=4),
        lambda model: model["config"].update(normalization="LayerNorm"),
        lambda model: model["config"].update(add_qkv_bias=True),
        lambda model: model["config"].update(num_moe_experts=8),
        lambda model: model["config"].update(vocab_size=1000),
    ],
)
def test_a_context_of_another_model_is_noticed(copy: Copy, change: Callable[[dict[str, Any]], None]) -> None:
    directory = copy(*LAYOUTS["fp8"])
    edit_model_yaml(directory, change)
    assert_noticed(directory, "context")


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.pop("tokenizer"),
        lambda model: model["tokenizer"].update(_target_="my.Tokenizer"),
        lambda model: model["tokenizer"].update(pretrained_model_name="meta-llama/Llama-3.1-8B"),
        lambda model: model["tokenizer"].update(pretrained_model_name="/models/tokenizer"),
        lambda model: model["tokenizer"].update(pretrained_model_name="../../tokenizer"),
        lambda model: model["tokenizer"].update(pretrained_model_name=None),
        lambda model: model["tokenizer"].update(pretrained_model_name="."),
    ],
)
def test_a_tokenizer_that_is_not_in_the_context_is_noticed(
    copy: Copy, change: Callable[[dict[str, Any]], None]
) -> None:
    directory = copy(*LAYOUTS["fp8"])
    edit_model_yaml(directory, change)
    assert_noticed(directory, "tokenizer")


def edit_model_yaml(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "nemo_context/model.yaml"
    content = yaml.safe_load(path.read_text())
    change(content)
    replace_file(path, yaml.safe_dump(content).encode())
    write_manifest(directory)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: (path / "tokenizer.json").unlink(),
        lambda path: (path / "tokenizer_config.json").unlink(),
        lambda path: replace_file(path / "tokenizer.json", b"{}"),
        lambda path: replace_file(path / "tokenizer.json", b'{"model": {"vocab": {"a": 131}}}'),
        lambda path: replace_file(path / "tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": "evil.py"}}'),
        shutil.rmtree,
    ],
)
def test_a_tokenizer_that_cannot_be_restored_is_noticed(copy: Copy, change: Callable[[Path], None]) -> None:
    directory = copy(*LAYOUTS["fp8"])
    change(directory / "nemo_context/nemo_tokenizer")
    write_manifest(directory)
    assert_noticed(directory, "tokenizer")


def test_a_sentencepiece_model_is_looked_for_beside_model_yaml(copy: Copy) -> None:
    directory = copy(*LAYOUTS["fp8"])
    target = "nemo.collections.common.tokenizers.sentencepiece_tokenizer.SentencePieceTokenizer"
    tokenizer = {"_target_": target, "model_path": "tokenizer.model"}
    edit_model_yaml(directory, lambda model: model.update(tokenizer=tokenizer))
    assert_noticed(directory, "tokenizer")
    (directory / "nemo_context/tokenizer.model").touch()
    write_manifest(directory)
    assert_noticed(directory, "tokenizer")
    (directory / "nemo_context/tokenizer.model").write_bytes(b"pieces")
    write_manifest(directory)
    assert failures(directory) == []


def test_yaml_that_names_code_is_read_without_running_it(copy: Copy, tmp_path: Path) -> None:
    directory = copy(*LAYOUTS["fp8"])
    path, witness = directory / "nemo_context/model.yaml", tmp_path / "witness"
    code = f"extra: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{witness}']]\n"
    replace_file(path, path.read_bytes() + code.encode())
    write_manifest(directory)
    assert failures(directory) == []
    assert not witness.exists()


def test_what_is_no_directory_fails_and_does_not_raise(tmp_path: Path) -> None:
    assert [check.name for check in failures(tmp_path / "nowhere")] == ["directory"]
    assert {check.name for check in failures(tmp_path)} == {"manifest", "config.json", "tokenizer"}


@pytest.mark.parametrize("seed", range(40))
def test_garbage_never_raises(copy: Copy, seed: int) -> None:
    """A matching manifest, and random bytes in a random file: some change nothing that matters, none may escape."""
    chance = random.Random(seed)
    directory = copy(*chance.choice(list(LAYOUTS.values())))
    path = chance.choice(sorted(path for path in directory.rglob("*") if path.is_file()))
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 10, 1000])):
        # Headers and other structure stand at the front.
        content[chance.randrange(chance.choice([8, 64, 4096, len(content)])) % len(content)] = chance.randrange(256)
    replace_file(path, bytes(content))
    if path.name != "manifest.json":
        write_manifest(directory)
    assert all(isinstance(check, Check) for check in verify(directory))
