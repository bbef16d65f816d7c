# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says about itself is read right, fast and safely, and what it lacks is named."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_ptq.checkpoint.huggingface.description import read_settings, settings_spec
from nemo_ptq.checkpoint.metadata import EMBEDDING, read_metadata, read_model_yaml
from nemo_ptq.errors import ConfigError
from nemo_ptq.models.registry import class_of_architecture, hugging_face_classes
from nemo_ptq.models.spec import spec_of
from tests.conftest import Demo
from tests.families import FAMILIES


@pytest.fixture
def checkpoint(demo: Demo, tmp_path: Path) -> Path:
    """A copy of the demo's checkpoint, to be damaged."""
    return Path(shutil.copytree(demo.checkpoint, tmp_path / "checkpoint"))


def problem_of(checkpoint: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_metadata(checkpoint)
    (problem,) = caught.value.problems
    assert "\n" not in problem
    return problem


def change_config(checkpoint: Path, **changes: object) -> None:
    file = checkpoint / "context" / "model.yaml"
    model = yaml.safe_load(file.read_text())
    model["config"].update(changes)
    file.write_text(yaml.safe_dump(model))


def test_sizes_are_those_of_the_model_that_nemo_builds(demo: Demo) -> None:
    import fiddle as fdl
    from megatron.core.dist_checkpointing import load_tensors_metadata
    from nemo.lightning import io

    model = io.load_context(demo.checkpoint / "context", subpath="model", build=False)
    model.config.apply_rope_fusion = False  # needs Transformer Engine
    config = fdl.build(model.config)
    stored = load_tensors_metadata(str(demo.checkpoint / "weights"))
    metadata = read_metadata(demo.checkpoint)
    assert metadata.model_class.endswith("llama.LlamaModel")
    assert metadata.config_class.rpartition(".")[2] == type(config).__name__
    assert metadata.num_layers == config.num_layers
    assert metadata.hidden_size == config.hidden_size
    assert metadata.num_attention_heads == config.num_attention_heads
    assert metadata.num_query_groups == config.num_query_groups < config.num_attention_heads
    assert metadata.head_size == config.kv_channels
    assert metadata.ffn_hidden_size == config.ffn_hidden_size
    assert metadata.gated_mlp is config.gated_linear_unit is True
    assert metadata.vocab_size == stored[EMBEDDING].global_shape[0]
    assert metadata.num_experts is None
    assert metadata.seq_length == config.seq_length
    assert metadata.position_embedding_type == config.position_embedding_type
    assert metadata.normalization == config.normalization
    assert metadata.tied_embeddings is config.share_embeddings_and_output_weights


def test_sizes_that_the_config_leaves_open_are_megatrons(checkpoint: Path) -> None:
    change_config(checkpoint, kv_channels=None, num_query_groups=None)
    metadata = read_metadata(checkpoint)
    assert metadata.num_query_groups == metadata.num_attention_heads
    assert metadata.head_size == metadata.hidden_size // metadata.num_attention_heads
    experts = spec_of(read_model_yaml(checkpoint) | {"num_moe_experts": 8, "moe_ffn_hidden_size": 96}, 1)
    assert (experts.num_experts, experts.ffn_hidden_size) == (8, 96)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 0, "kv_channels": None}, "num_attention_heads is 0: it must be a whole number"),
        ({"ffn_hidden_size": 12.5}, "ffn_hidden_size is 12.5: it must be a whole number"),
        ({"layernorm_epsilon": float("nan")}, "layernorm_epsilon nan: it must be a number above 0, and at most 1"),
        ({"layernorm_epsilon": None}, "layernorm_epsilon None: it must be"),
        ({"rotary_base": 0.3}, "rotary_base 0.3: it must be a number above 1, and at most 1e+12"),
        ({"rotary_base": 10**17}, "rotary_base 100000000000000000: it must be"),
        ({"num_query_groups": 5}, "num_query_groups 5, which does not divide num_attention_heads"),
        ({"num_moe_experts": 8}, "has no place for 2 tensors of the checkpoint, module.decoder.layers.mlp.linear_fc1"),
    ],
)
def test_a_context_that_no_model_can_have(changes: dict[str, object], said: str, checkpoint: Path) -> None:
    change_config(checkpoint, **changes)
    assert said in problem_of(checkpoint)


def test_reading_needs_neither_torch_nor_nemo(demo: Demo) -> None:
    program = (
        "import sys; from pathlib import Path; from nemo_ptq.checkpoint.metadata import read_metadata;"
        "read_metadata(Path(sys.argv[1])); print({'torch', 'nemo', 'megatron', 'fiddle'} & sys.modules.keys())"
    )
    output = subprocess.run(
        [sys.executable, "-c", program, demo.checkpoint], capture_output=True, text=True, check=True, cwd=_ROOT
    )
    assert output.stdout.strip() == "set()"


_ROOT = Path(__file__).parent.parent.parent


class _Hostile:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.witness),)


def test_code_in_the_weights_index_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    hostile = pickle.dumps(_Hostile(witness))
    (checkpoint / "weights" / ".metadata").write_bytes(hostile)
    assert ".metadata cannot be read" in problem_of(checkpoint)
    assert not witness.exists()
    pickle.loads(hostile)
    assert witness.exists()  # the pickle was dangerous indeed


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert problem_of(tmp_path / "nowhere") == (
        f"nemo_checkpoint={tmp_path}/nowhere does not exist: give the directory of a NeMo 2.0 checkpoint "
        "(context/ and weights/), a Hugging Face model (config.json and weights) or a checkpoint of Megatron's "
        "(iter_XXXXXXX/)"
    )


def test_another_directory_is_told_with_what_it_holds(tmp_path: Path) -> None:
    for name in "hgfedcba":
        (tmp_path / name).touch()
    problem = problem_of(tmp_path)
    assert "is not the directory of a NeMo 2.0 checkpoint (context/ and weights/), a Hugging Face model" in problem
    assert problem.endswith("; found a, b, c, d, e, f and 2 more: give the directory of a checkpoint")
    model = tmp_path / "snapshots" / "0a1b2c"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "llama"}')
    assert problem_of(tmp_path).endswith(f": give {model}")


def test_a_name_on_the_hub_is_told_how_to_be_a_directory() -> None:
    assert "; `hf download owner/model --local-dir DIR` gets one of that name" in problem_of(Path("owner/model"))
    assert "hf download" not in problem_of(Path("here/or/not"))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_hugging_face_directory_is_described_as_its_import_is(
    name: str, checkpoint_of: Callable[[str], Path]
) -> None:
    imported = checkpoint_of(name)
    assert read_metadata(imported.with_name(f"{name}.hf")) == read_metadata(imported)


@pytest.mark.parametrize("architecture", sorted(hugging_face_classes()))
def test_settings_that_a_config_leaves_out_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    import transformers

    given: dict[str, Any] = {"architectures": [architecture]}
    if architecture == "Qwen3MoeForCausalLM":
        given["norm_topk_prob"] = (
            True  # as its published files have it, and NeMo's class; transformers' default is false
        )
    if architecture == "NemotronHForCausalLM" and not hasattr(transformers, "NemotronHConfig"):
        pytest.skip("transformers 4 has no such class")
    full = getattr(transformers, class_of_architecture(architecture).config_class)(**given)
    found = []
    for content in (full.to_dict(), {**given, "model_type": full.model_type}):
        (tmp_path / "config.json").write_text(json.dumps(content))
        found.append(settings_spec(*read_settings(tmp_path)))
    assert found[0] == found[1]


def test_a_hugging_face_directory_must_be_whole(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint_of("llama2").with_name("llama2.hf")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    assert "has no weights" in problem_of(tmp_path)
    (tmp_path / "model.safetensors").touch()
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    assert "is quantized already" in problem_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Unheard"]}))
    assert "unknown architecture Unheard in config.json; nearest: " in problem_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": None, "head_dim": None}))
    assert "has num_attention_heads None, which is no size" in problem_of(tmp_path)


@pytest.mark.parametrize("kind", ["archive", "directory"])
def test_a_nemo_1_checkpoint_is_told(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.nemo" if kind == "archive" else tmp_path
    (path if kind == "archive" else tmp_path / "model_config.yaml").touch()
    problem = problem_of(path)
    assert "is a NeMo 1 checkpoint" in problem
    assert "`nemo-ptq import-hf SRC OUT`" in problem


def test_half_of_a_checkpoint_names_the_whole(checkpoint: Path) -> None:
    assert problem_of(checkpoint / "weights").endswith(f"is one half of a checkpoint: give {checkpoint}")


@pytest.mark.parametrize("file", ["context/io.json", "weights/.metadata", "weights/common.pt", "weights/metadata.json"])
def test_a_missing_file_is_named_and_those_that_are_there(file: str, checkpoint: Path) -> None:
    (checkpoint / file).unlink()
    problem = problem_of(checkpoint)
    missing, _, found = problem.partition("missing; found ")
    assert missing.endswith(f"is incomplete: {file} ")
    assert found.count("/") == 4
    assert file not in found


def test_missing_weights_are_told(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "weights")
    problem = problem_of(checkpoint)
    assert "weights/.metadata, weights/common.pt, weights/metadata.json missing; found context/io.json" in problem


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    (checkpoint / "weights" / "__0_0.distcp").unlink()
    assert "weights/ lacks __0_0.distcp; found 0 of 1 shards" in problem_of(checkpoint)


def test_a_shard_cut_short_is_named(checkpoint: Path) -> None:
    shard = checkpoint / "weights" / "__0_0.distcp"
    os.truncate(shard, shard.stat().st_size // 2)
    assert "is damaged: __0_0.distcp cut short" in problem_of(checkpoint)


def test_another_weights_format_is_told(checkpoint: Path) -> None:
    (checkpoint / "weights" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert "weights are in zarr format: save them in torch_dist format" in problem_of(checkpoint)


@pytest.mark.parametrize("content", ["", "[1", "model: 3", "config: {}\n_target_: x.Y"])
def test_a_damaged_model_yaml_is_told(content: str, checkpoint: Path) -> None:
    (checkpoint / "context" / "model.yaml").write_text(content)
    assert str(checkpoint / "context" / "model.yaml") in problem_of(checkpoint)


def test_weights_of_an_adapter_are_told(checkpoint: Path) -> None:
    index = checkpoint / "weights" / ".metadata"
    index.write_bytes(index.read_bytes().replace(EMBEDDING.encode(), EMBEDDING.encode().upper()))
    assert f"holds no {EMBEDDING}" in problem_of(checkpoint)
