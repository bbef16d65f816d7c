# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Hugging Face -> NeMo: equal to NeMo's own importers, nothing executed, all or nothing, readable errors."""

import dataclasses
import importlib
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fiddle as fdl
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from nemo.lightning import get_vocab_size, io
from nemo.lightning.io.state import StateDictTransform, TransformCTX
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_ptq.checkpoint.huggingface import hf_weights
from nemo_ptq.checkpoint.huggingface.hf_weights import load_tokenizer
from nemo_ptq.checkpoint.huggingface.importer import HuggingFaceModel, import_hf
from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.checkpoint.torch_dist import checkpoint_parts
from nemo_ptq.errors import PtqError
from nemo_ptq.models.mapping import interleave_qkv
from tests.families import FAMILIES, TOKENS, VOCAB, make_hf, make_tokenizer

IMPORTERS = {
    "llama2": ("llama", "HFLlamaImporter"),
    "llama3": ("llama", "HFLlamaImporter"),
    "llama31": ("llama", "HFLlamaImporter"),
    "llama32": ("llama", "HFLlamaImporter"),
    "mistral": ("mistral", "HFMistralImporter"),
    "mixtral": ("mixtral", "HFMixtralImporter"),
    "gemma": ("gemma", "HFGemmaImporter"),
    "gemma2": ("gemma2", "HFGemmaImporter"),
    "qwen2": ("qwen2", "HFQwen2Importer"),
    "starcoder": ("starcoder", "HFStarcoderImporter"),
    "starcoder2": ("starcoder2", "HFStarcoder2Importer"),
    "nemotron": ("nemotron", "HFNemotronImporter"),
}
# Some of NeMo's classes name the vocabulary size. Elsewhere NeMo counts tokens, which are fewer than the embedding's
# rows here, and fails on the shapes. Mixtral pads to multiples of 128.
NAMED = ("llama2", "llama3", "llama31", "llama32", "gemma2", "qwen2")
VOCAB_DIFFERENCE = {name: {} if name in NAMED else {"vocab_size": (None, VOCAB)} for name in IMPORTERS}
VOCAB_DIFFERENCE["mixtral"] = {"vocab_size": (None, 1024)}
# What NeMo's importers lose and ours keeps, as (theirs, ours).
ROPE_DIFFERENCE = {"low_freq_factor": (1.0, 1.5), "high_freq_factor": (4.0, 3.0), "old_context_len": (8192, 64)}
CONFIG_DIFFERENCE: dict[str, dict[str, tuple[Any, Any]]] = {
    "llama31": ROPE_DIFFERENCE,
    "llama32": ROPE_DIFFERENCE,
    "gemma": {"kv_channels": (256, 128), "seq_length": (8192, 256)},
    "gemma2": {"kv_channels": (256, 128), "seq_length": (8192, 256)},
    "qwen2": {"make_vocab_size_divisible_by": (128, 1)},
    # NeMo's importer takes the window for the length of the sequences.
    "mistral": {"seq_length": (128, 256)},
    # These two say how the importing process makes the model, not what the model is.
    "mixtral": {"use_cpu_initialization": (True, False), "perform_initialization": (False, True)},
}
# NeMo's importers for these families do not look at generation_config.json.
WITHOUT_GENERATION_CONFIG = ("starcoder", "starcoder2", "nemotron")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """The Hugging Face directory of a family and its import, made once."""
    root = tmp_path_factory.mktemp("families")

    def get(name: str) -> tuple[Path, Path]:
        source, checkpoint = root / f"{name}.hf", root / name
        if not checkpoint.exists():
            import_hf(str(make_hf(name, source)), str(checkpoint))
        return source, checkpoint

    return get


@pytest.fixture
def llama(tmp_path: Path, imported: Callable[[str], tuple[Path, Path]]) -> Path:
    """A copy of a Hugging Face directory, to be damaged."""
    return Path(shutil.copytree(imported("llama2")[0], tmp_path / "llama"))


@pytest.fixture
def rope_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets Megatron's configurations ask for Transformer Engine's fused rotary embedding without having it."""
    monkeypatch.setattr("megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb", object())


def stored_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's weights, read with torch alone."""
    reader = dcp.FileSystemReader(checkpoint / "weights")
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def nemo_importer(name: str, source: Path) -> Any:
    module, importer = IMPORTERS[name]
    made = getattr(importlib.import_module(f"nemo.collections.llm.gpt.model.{module}"), importer)(str(source))
    made.trust_remote_code = False  # some look for it before their import has set it
    return made


def nemo_state(name: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What NeMo's own importer makes of the weights, by the names of a model with Transformer Engine layers."""
    importer = nemo_importer(name, source)
    config = importer.config
    if name in ("gemma", "gemma2"):  # NeMo's importer assumes the head size of the released models
        config.kv_channels = FAMILIES[name].arguments["head_dim"]
    rows = 1024 if name == "mixtral" else VOCAB

    def expand(pattern: str) -> Iterator[str]:
        for layer in range(config.num_layers):
            for expert in range(config.num_moe_experts or 1):
                yield re.sub(r"\*", str(expert), pattern.replace("*", str(layer), 1))

    def apply_transforms(source: Any, target: Any, mapping: dict[str, str], transforms: Any = ()) -> dict[str, Any]:
        targets = [*mapping.values(), *(transform.target_key for transform in transforms)]
        state: dict[str, Any] = {key: None for pattern in targets for key in expand(pattern)}
        if name == "mixtral":  # copies into the model's own, padded tensors
            for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
                state[key] = torch.zeros(rows, config.hidden_size, dtype=torch.bfloat16)
        context = TransformCTX(source=source, source_state=source.state_dict(), target=target, target_state=state)
        for transform in [*(StateDictTransform(*names) for names in mapping.items()), *transforms]:
            context = transform(context)
        return context.target_state

    monkeypatch.setattr("nemo.lightning.io.apply_transforms", apply_transforms)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, torch_dtype="auto")
    with torch.no_grad():
        return importer.convert_state(model, SimpleNamespace(config=config))


@pytest.mark.parametrize("name", IMPORTERS)
def test_tensors_are_those_of_nemos_importer(
    name: str,
    imported: Callable[[str], tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
    rope_fusion: None,
) -> None:
    source, checkpoint = imported(name)
    stored = stored_tensors(checkpoint)
    seen = {key: torch.zeros(tensor.shape, dtype=torch.bool) for key, tensor in stored.items()}
    for key, value in nemo_state(name, source, monkeypatch).items():
        numbers = tuple(int(number) for number in re.findall(r"\.(\d+)\.", key))
        stacked = re.sub(r"\.\d+\.", ".", key.replace("local_experts", "experts"))
        part = stored[f"module.{stacked}"][numbers]
        assert part.dtype == value.dtype == torch.bfloat16
        assert torch.equal(part, value), key
        seen[f"module.{stacked}"][numbers] = True
    assert all(mask.all() for mask in seen.values()), "NeMo has no such tensor"


def _comparable(value: Any) -> Any:
    return (value.func, value.args, value.keywords) if isinstance(value, partial) else value


@pytest.mark.parametrize("name", IMPORTERS)
def test_config_is_that_of_nemos_importer(
    name: str, imported: Callable[[str], tuple[Path, Path]], rope_fusion: None
) -> None:
    source, checkpoint = imported(name)
    theirs = nemo_importer(name, source).config
    ours = fdl.build(io.load_context(checkpoint / "context", subpath="model", build=False).config)
    assert type(ours) is type(theirs)
    settings = [
        (field.name, getattr(theirs, field.name), getattr(ours, field.name)) for field in dataclasses.fields(theirs)
    ]
    differences = {name: (their, our) for name, their, our in settings if _comparable(their) != _comparable(our)}
    if name in WITHOUT_GENERATION_CONFIG:
        assert differences.pop("generation_config")[1] == transformers.GenerationConfig.from_pretrained(source)
    assert differences == VOCAB_DIFFERENCE[name] | CONFIG_DIFFERENCE.get(name, {})


@pytest.mark.parametrize("name", ["llama2", "starcoder"])
def test_tokenizer_lives_in_the_checkpoint(
    name: str, imported: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    source, checkpoint = imported(name)
    moved = Path(shutil.copytree(checkpoint, tmp_path / "moved"))
    original = transformers.AutoTokenizer.from_pretrained(source)
    restored = io.load_context(moved / "context", subpath="model.tokenizer")
    text = "def add(a, b): return a + b"
    assert restored.text_to_ids(text) == original.encode(text)
    assert restored.tokenizer.name_or_path == str(moved / "context" / "nemo_tokenizer")
    assert "pretrained_model_name: nemo_tokenizer" in (moved / "context" / "model.yaml").read_text()
    assert str(source.parent) not in (moved / "context" / "io.json").read_text()


def test_a_tokenizer_that_transformers_5_has_saved_is_loaded(llama: Path) -> None:
    expected = load_tokenizer(llama)
    # As 5.24 writes them: another name of the class, and a list.
    _edit(llama / "tokenizer_config.json", tokenizer_class="TokenizersBackend", backend="tokenizers")
    _edit(llama / "tokenizer_config.json", extra_special_tokens=["</s>"])
    found = load_tokenizer(llama)
    text = "def add(a, b): return a + b</s>"
    assert found(text)["input_ids"] == expected(text)["input_ids"]
    assert found.chat_template == expected.chat_template and found.eos_token == expected.eos_token
    _edit(llama / "tokenizer_config.json", tokenizer_class="SomeBackend")
    with pytest.raises(PtqError, match="has tokenizer_class 'SomeBackend', which transformers does not have; write"):
        load_tokenizer(llama)


def test_tied_llama_has_no_output_layer_and_an_untied_family_gets_a_copy(
    imported: Callable[[str], tuple[Path, Path]],
) -> None:
    assert "module.output_layer.weight" not in stored_tensors(imported("llama32")[1])
    starcoder = stored_tensors(imported("starcoder")[1])
    assert torch.equal(starcoder["module.output_layer.weight"], starcoder["module.embedding.word_embeddings.weight"])


@pytest.mark.parametrize(("rows", "vocab_size"), [(TOKENS, None), (TOKENS + 1, TOKENS + 1)])
def test_vocabulary_follows_the_tokenizer_where_nemo_can(tmp_path: Path, rows: int, vocab_size: int | None) -> None:
    source = make_hf("nemotron", tmp_path / "hf", vocab_size=rows)
    tokens = len(transformers.AutoTokenizer.from_pretrained(source))
    assert TOKENS - 128 < tokens <= TOKENS
    checkpoint = import_hf(str(source), str(tmp_path / "nemo"))
    config = io.load_context(checkpoint / "context", subpath="model", build=False).config
    assert config.vocab_size == vocab_size
    assert stored_tensors(checkpoint)["module.embedding.word_embeddings.weight"].shape[0] == rows


@pytest.mark.usefixtures("rope_fusion")
@pytest.mark.parametrize("name", ["llama2", "mixtral", "nemotron"])
@pytest.mark.parametrize("further", [-130, -1, 0, 1, 130])
def test_the_vocabulary_is_the_models_however_many_tokens_there_are(name: str, further: int, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    tokens = len(transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer"))
    source = make_hf(name, tmp_path / "hf", vocab_size=tokens + further)
    model = HuggingFaceModel(source)
    assert model.vocab_size == read_metadata(source).vocab_size
    (shape,) = {part.shape for part in model.parts if part.key == "embedding.word_embeddings.weight"}
    assert shape[0] == model.vocab_size
    with model.model_config() as config:
        nemo = fdl.build(config)
    # As NeMo's model does when it is made.
    counted = nemo.config.vocab_size or get_vocab_size(
        nemo.config, nemo.tokenizer.vocab_size, nemo.config.make_vocab_size_divisible_by
    )
    assert counted == model.vocab_size


@given(groups=st.integers(1, 4), per_group=st.integers(1, 4), size=st.integers(1, 3), bias=st.booleans())
def test_qkv_rows_are_ordered_by_query_group(groups: int, per_group: int, size: int, bias: bool) -> None:
    def labels(kind: int, heads: int) -> torch.Tensor:
        """Row `r` of head `h` is [kind, h, r]."""
        return torch.tensor([[kind, head, row] for head in range(heads) for row in range(size)])

    q, k, v = labels(0, groups * per_group), labels(1, groups), labels(2, groups)
    expected = []
    for group in range(groups):
        expected += [[0, group * per_group + head, row] for head in range(per_group) for row in range(size)]
        expected += [[1, group, row] for row in range(size)]
        expected += [[2, group, row] for row in range(size)]
    if bias:
        codes = torch.tensor([100, 10, 1])
        merged = interleave_qkv(groups, q @ codes, k @ codes, v @ codes)
        assert merged.tolist() == (torch.tensor(expected) @ codes).tolist()
    else:
        assert interleave_qkv(groups, q, k, v).tolist() == expected


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtype_is_the_sources(tmp_path: Path, dtype: str) -> None:
    source = make_hf("llama2", tmp_path / "hf", num_layers=1, dtype=dtype)
    checkpoint = import_hf(str(source), str(tmp_path / "nemo"))
    config = io.load_context(checkpoint / "context", subpath="model", build=False).config
    assert (config.params_dtype, config.fp16, config.bf16) == (getattr(torch, dtype), dtype == "float16", False)
    assert {tensor.dtype for tensor in stored_tensors(checkpoint).values()} == {getattr(torch, dtype)}


def test_parts_and_pytorch_files_give_the_same_checkpoint(
    llama: Path, tmp_path: Path, imported: Callable[[str], tuple[Path, Path]]
) -> None:
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, part in parts.items():
        torch.save({name: tensors[name] for name in part}, llama / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (llama / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    expected = stored_tensors(imported("llama2")[1])
    stored = stored_tensors(import_hf(str(llama), str(tmp_path / "nemo")))
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[key], expected[key]) for key in expected)


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_code_in_a_pytorch_file_is_refused(llama: Path, tmp_path: Path) -> None:
    (llama / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Malicious(tmp_path / "marker")}, llama / "pytorch_model.bin")
    with pytest.raises(PtqError, match=r"pytorch_model\.bin cannot be read as tensors"):
        import_hf(str(llama), str(tmp_path / "nemo"))
    assert not (tmp_path / "marker").exists()
    with pytest.raises(pickle.UnpicklingError):  # the file is malicious, for those who ask
        torch.load(llama / "pytorch_model.bin", weights_only=True)


def test_code_in_the_directory_is_not_run(llama: Path, tmp_path: Path) -> None:
    evil = "from pathlib import Path\nPath({!r}).touch()\n".format(str(tmp_path / "marker"))
    for module in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (llama / f"{module}.py").write_text(evil)
    _edit(
        llama / "config.json",
        auto_map={"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"},
    )
    _edit(llama / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.T", None]})
    import_hf(str(llama), str(tmp_path / "nemo"))
    _edit(llama / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    with pytest.raises(PtqError, match="no tokenizer that can be loaded"):
        import_hf(str(llama), str(tmp_path / "evil"))
    assert not (tmp_path / "marker").exists()


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _split(directory: Path) -> None:
    transformers.AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory, max_shard_size="1MB")
    (directory / "model.safetensors").unlink(missing_ok=True)
    next(directory.glob("model-00002-of-*.safetensors")).unlink()


def _truncate(directory: Path) -> None:
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:-100])


def _change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return damage


def _change_config(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: _edit(directory / "config.json", **changes)


def _remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def _cast(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    tensors[NORM] = tensors[NORM].to(dtype)


def _twice(directory: Path) -> None:
    """Two files that the index lists have the same tensor."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = {name: "part-2.safetensors" if ".1." in name else "part-1.safetensors" for name in tensors}
    for file in set(files.values()):
        of_file = {name: tensor for name, tensor in tensors.items() if files[name] == file or name == NORM}
        save_file(of_file, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def _whole_beside_parts(directory: Path) -> None:
    whole = (directory / "model.safetensors").read_bytes()
    _twice(directory)
    (directory / "model.safetensors").write_bytes(whole)


KNOWN = "LlamaForCausalLM, MistralForCausalLM"
NORM = "model.layers.1.input_layernorm.weight"
DAMAGE = {
    "no config": (_remove("config.json"), r"lacks config\.json; found there: .*model\.safetensors"),
    "config is not JSON": (lambda d: (d / "config.json").write_text("{"), r"config\.json is not JSON"),
    "no weights": (_remove("model.safetensors"), r"has no weights .*found there: .*config\.json"),
    "a part is missing": (_split, r"lacks model-00002-of-\d+\.safetensors, .*found there: .*model-00001-of-"),
    "truncated": (_truncate, r"model\.safetensors cannot be read as tensors"),
    "no tokenizer": (_remove("tokenizer.json"), r"no tokenizer\.json, and no other vocabulary: .*found there: "),
    "a tensor is missing": (
        _change_tensors(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        r"lack model\.layers\.1\.mlp\.up_proj\.weight; is a file missing\?",
    ),
    "a tensor would be lost": (
        _change_tensors(lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(256)})),
        r"NeMo has no place for 1 tensors .*q_proj\.bias",
    ),
    "other sizes": (
        _change_config(num_key_value_heads=2),
        r"k_proj\.weight has shape \(128, 256\), and the sizes in config\.json make it \(64, 256\)",
    ),
    "another vocabulary": (
        _change_config(vocab_size=VOCAB + 1),
        f"the embedding has {VOCAB} rows, but config.json has vocab_size {VOCAB + 1}",
    ),
    "misspelt": (
        _change_config(architectures=["LLamaForCausalLM"]),
        f"unknown architecture LLamaForCausalLM .*nearest: LlamaForCausalLM; known: {KNOWN}",
    ),
    "no architecture": (
        _change_config(architectures=None),
        r"has architectures None: it must be a list with the name of the model's class, such as \[\"LlamaForCausal",
    ),
    "an architecture without a list": (
        _change_config(architectures="Qwen3MoeForCausalLM", model_type="qwen3_moe"),
        r"has architectures 'Qwen3MoeForCausalLM': it must be a list .*such as \[\"Qwen3MoeForCausalLM\"\]",
    ),
    "falcon": (
        _change_config(architectures=["FalconForCausalLM"]),
        f"FalconForCausalLM is not supported for quantization: its attention .*; supported: {KNOWN}",
    ),
    "quantized": (_change_config(quantization_config={"quant_method": "fp8"}), "of fp8.*before quantization, or multi"),
    "MXFP4": (_change_config(quantization_config={"quant_method": "mxfp4"}), r"Mxfp4Config\(dequantize=True\)"),
    "compressed-tensors": (
        _change_config(compression_config={"quant_method": "compressed-tensors"}),
        r"config\.json has a compression_config of compressed-tensors.*CompressedTensorsConfig\(run_compressed=False\)",
    ),
    "GPTQ": (_change_config(quantization_config={"quant_method": "gptq"}), "of gptq.*before quantization$"),
    "ModelOpt": (lambda d: (d / "hf_quant_config.json").write_text("{}"), r"hf_quant_config\.json is there"),
    "tekken": (
        lambda d: (d / "tokenizer.json").rename(d / "tekken.json"),
        r"tekken\.json alone is not enough, put a tokenizer\.json of the same model beside it",
    ),
    "quantized silently": (_change_config(dtype="float8_e4m3fn"), "has dtype 'float8_e4m3fn': import a model in fl"),
    "integers": (_change_tensors(lambda tensors: _cast(tensors, torch.int8)), rf"{NORM} of int8 among them: give"),
    "doubles": (_change_tensors(lambda tensors: _cast(tensors, torch.float64)), rf"{NORM} of float64 among them"),
    "an unknown setting": (_change_config(attention_multiplier=0.1), r"has attention_multiplier 0\.1: the import of"),
    "no epsilon": (
        _change_config(rms_norm_eps=None),
        "has rms_norm_eps None: it must be a number above 0, and",
    ),
    "a base that is none": (
        _change_config(rope_theta=0.3),
        r"has rope_theta 0\.3: it must be a number above 1",
    ),
    "no type": (_change_config(model_type=None), "has model_type None: it must be the name of the model's type"),
    "a head that is not the embedding": (
        _change_config(tie_word_embeddings=True),
        r"has tie_word_embeddings true, and the files have a lm_head\.weight that is not the embedding",
    ),
    "a head that is lost": (
        _change_tensors(lambda tensors: tensors.pop("lm_head.weight")),
        r"lack lm_head\.weight; .* or has config\.json lost its tie_word_embeddings true\?",
    ),
    "a tensor in two files": (_twice, rf"{NORM} is in part-1\.safetensors and in part-2\.safetensors, and readers"),
    "a model beside another": (
        _whole_beside_parts,
        r"has model\.safetensors and model\.safetensors\.index\.json, which lists other files, and readers differ",
    ),
    "an adapter beside the model": (
        lambda d: (d / "adapter_config.json").write_text("{}"),
        r"has a LoRA adapter \(adapter_config\.json\) beside the model, and readers differ in whether they merge it",
    ),
    "two data types": (
        _change_config(dtype="bfloat16", torch_dtype="float16"),
        "has dtype 'bfloat16' and torch_dtype 'float16', which are one setting",
    ),
    "two types of rope": (
        _change_config(rope_scaling={"rope_type": "linear", "type": "dynamic", "factor": 2.0}),
        "has rope_scaling of rope_type 'linear' and type 'dynamic', which are one setting",
    ),
    "no type of rope": (
        _change_config(rope_scaling={"factor": 2.0}),
        "has rope_scaling of type None; NeMo's Llama knows",
    ),
    "two models": (
        _change_config(model_type="mistral"),
        "has model_type 'mistral', but LlamaForCausalLM in architectures is of another type: transformers goes by the",
    ),
    "no such generation": (
        lambda d: _edit(d / "generation_config.json", max_new_tokens=-1),
        "generation_config.json has max_new_tokens -1: it must be",
    ),
    "no number": (
        lambda d: (d / "generation_config.json").write_text('{"temperature": NaN}'),
        "generation_config.json is not JSON: NaN is not a JSON number",
    ),
    "no settings of the tokenizer": (
        lambda d: (d / "tokenizer_config.json").unlink(),
        r"has no tokenizer_config\.json: give it the tokenizer's files",
    ),
    "no heads": (_change_config(num_attention_heads=0), "has num_attention_heads 0, which is no size"),
    "many layers": (
        _change_config(num_hidden_layers=10**12),
        "num_hidden_layers is 1000000000000: it must be a whole number from 1 to",
    ),
    "dynamic rope": (_change_config(rope_scaling={"type": "dynamic", "factor": 2.0}), "of type 'dynamic'; NeMo's"),
    "another activation": (_change_config(hidden_act="gelu"), "has hidden_act 'gelu', but .*can only have 'silu'"),
    "biases": (_change_config(attention_bias=True), "has attention_bias True"),
    "unknown rope": (
        _change_config(rope_scaling={"rope_type": "yarn", "factor": 2.0}),
        "rope_scaling of type 'yarn'; NeMo's Llama knows default, linear, llama3",
    ),
    "incomplete rope": (
        _change_config(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        "rope_scaling of type 'llama3' without low_freq_factor",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(case: str, llama: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[case]
    damage(llama)
    with pytest.raises(PtqError, match=message) as caught:
        import_hf(str(llama), str(tmp_path / "nemo"))
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["llama"]


# A plan counts a tokenizer's tokens and does not load it, and takes a directory without a config.json for no model.
_BEYOND_A_PLAN = {"no tokenizer", "no settings of the tokenizer", "tekken", "no config", "config is not JSON"}


@pytest.mark.parametrize("case", sorted(set(DAMAGE) - _BEYOND_A_PLAN))
def test_a_plan_knows_what_the_import_refuses(case: str, llama: Path) -> None:
    damage, message = DAMAGE[case]
    damage(llama)
    with pytest.raises(PtqError, match=message):
        read_metadata(llama)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, llama: Path, tmp_path: Path) -> None:
    _change_tensors(lambda tensors: tensors[NORM][3:4].fill_(value))(llama)
    with pytest.raises(PtqError, match=f"^{re.escape(NORM)} has values that are not finite"):
        import_hf(str(llama), str(tmp_path / "nemo"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["llama"]


def test_weights_of_a_nemo_checkpoint_that_are_not_finite_are_refused_by_name(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _change_tensors(lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"][0, :1].fill_(torch.nan))(llama)
    with monkeypatch.context() as careless:
        careless.setattr(hf_weights, "check_finite", lambda *_: None)
        checkpoint = import_hf(str(llama), str(tmp_path / "nemo"))
    parts = {part.live_name: part for part in checkpoint_parts(checkpoint)}
    parts["decoder.layers.0.mlp.linear_fc2.weight"].read()
    with pytest.raises(PtqError, match=r"^module\.decoder\.layers\.mlp\.linear_fc2\.weight has values that are not"):
        parts["decoder.layers.1.mlp.linear_fc2.weight"].read()


def test_a_byte_order_mark_is_passed_over(llama: Path, tmp_path: Path) -> None:
    expected = read_metadata(llama)
    text = (llama / "config.json").read_text(encoding="utf-8")
    (llama / "config.json").write_text(text, encoding="utf-8-sig")
    assert (llama / "config.json").read_bytes().startswith(b"\xef\xbb\xbf")
    assert read_metadata(llama) == expected
    assert read_metadata(import_hf(str(llama), str(tmp_path / "nemo"))) == expected


def test_the_spelling_of_transformers_5_gives_the_same_checkpoint(
    imported: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    source, checkpoint = imported("llama31")
    directory = Path(shutil.copytree(source, tmp_path / "hf"))
    config = json.loads((directory / "config.json").read_text())
    scaling = config.pop("rope_scaling")
    config["rope_parameters"] = {**scaling, "rope_theta": config.pop("rope_theta")}
    (directory / "config.json").write_text(json.dumps(config))
    again = import_hf(str(directory), str(tmp_path / "nemo"))
    model_yaml = (again / "context" / "model.yaml").read_text()
    assert model_yaml == (checkpoint / "context" / "model.yaml").read_text()
    assert "rotary_base: 500000.0" in model_yaml and "scale_factor: 8.0" in model_yaml


def test_linear_rope_scaling_is_kept(llama: Path, tmp_path: Path) -> None:
    _edit(llama / "config.json", rope_scaling={"type": "linear", "factor": 4.0})
    checkpoint = import_hf(str(llama), str(tmp_path / "nemo"))
    config = io.load_context(checkpoint / "context", subpath="model", build=False).config
    assert config.seq_len_interpolation_factor == 4.0


def test_a_failed_write_leaves_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(HuggingFaceModel, "write_context", fail)
    with pytest.raises(OSError, match="No space left"):
        import_hf(str(llama), str(tmp_path / "nemo"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["llama"]


def test_only_a_checkpoint_is_overwritten_and_only_when_asked(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "nemo"
    import_hf(str(llama), str(output))
    with pytest.raises(PtqError, match="exists"):
        import_hf(str(llama), str(output))
    (output / "notes").touch()
    with pytest.raises(PtqError, match="holds notes beside a NeMo checkpoint"):
        import_hf(str(llama), str(output), overwrite=True)
    (output / "notes").unlink()
    (output / "weights" / "stale").touch()
    import_hf(str(llama), str(output), overwrite=True)
    assert sorted(entry.name for entry in output.iterdir()) == ["context", "weights"]
    assert not (output / "weights" / "stale").exists()
    (tmp_path / "precious").mkdir()
    with pytest.raises(PtqError, match="not a NeMo checkpoint"):
        import_hf(str(llama), str(tmp_path / "precious"), overwrite=True)
    for holder in (llama, tmp_path):
        with pytest.raises(PtqError, match="holds the source"):
            import_hf(str(llama), str(holder), overwrite=True)


def test_a_link_out_of_the_source_is_refused(llama: Path, tmp_path: Path) -> None:
    (llama / "extra.jinja").symlink_to("/etc/hostname")
    with pytest.raises(PtqError, match=r"the link .*/extra\.jinja leads out of "):
        import_hf(str(llama), str(tmp_path / "nemo"))


def test_source_must_be_a_directory(tmp_path: Path) -> None:
    with pytest.raises(PtqError, match="not a directory: download the model first"):
        import_hf("meta-llama/Llama-3.1-8B", str(tmp_path / "nemo"))
