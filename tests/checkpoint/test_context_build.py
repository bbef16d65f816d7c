# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What is made of io.json is what NeMo makes of it; and of a hostile one nothing is made, on any rank."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.errors import ConfigError, PtqError
from nemo_ptq.untrusted import read_yaml
from tests.conftest import Demo
from tests.hostile import NOTHING_TRUSTED, call, change_graph, copy_of, leaf, make_file, pyref, with_argument
from tests.ranks import run_ranks

OF_LLAMA = '"nemo.collections.llm.gpt.model.llama"'


def differences_from_nemo(checkpoint: Path) -> list[str]:
    """Where our configuration of a model is another than NeMo's."""
    from nemo.lightning import io

    from nemo_ptq.checkpoint.context_build import model_config
    from nemo_ptq.checkpoint.context_graph import read_model

    context = checkpoint / "context"
    ours = model_config(read_model(context, NOTHING_TRUSTED), context, NOTHING_TRUSTED)
    nemos = io.load_context(context, subpath="model", build=False)
    return list(_differences(nemos, ours, "model"))


def _differences(nemos: Any, ours: Any, place: str) -> Any:
    import fiddle as fdl

    from nemo_ptq.checkpoint import context_graph

    skipped = context_graph._SKIPPED_OF_MODEL if place == "model" else context_graph._SKIPPED_OF_CONFIG
    if not isinstance(nemos, fdl.Buildable):
        if nemos != ours:
            yield f"{place}: {nemos!r} is {ours!r}"
        return
    if (type(nemos), fdl.get_callable(nemos)) != (type(ours), fdl.get_callable(ours)):
        yield f"{place}: {fdl.get_callable(nemos)} is {fdl.get_callable(ours)}"
    for name in nemos.__arguments__.keys() | ours.__arguments__.keys():
        if name not in skipped:
            theirs, own = nemos.__arguments__.get(name), ours.__arguments__.get(name)
            yield from _differences(theirs, own, f"{place}.{name}")


@pytest.mark.parametrize("model", ["gemma", "llama31", "mixtral", "starcoder", "gpt_swiglu"])
def test_the_configuration_is_nemos(model: str, checkpoint_of: Callable[[str], Path]) -> None:
    assert run_ranks(differences_from_nemo, 1, checkpoint_of(model)) == [[]]


def described_without_its_file(checkpoint: Path, copy: Path) -> tuple[bool, bool]:
    """Whether a checkpoint without model.yaml is the same model, and whether its export has such a file."""
    from nemo_ptq.checkpoint.metadata import described_model, read_metadata
    from nemo_ptq.export.nemo_context import write_context

    shutil.copytree(checkpoint, copy)
    (copy / "context" / "model.yaml").unlink()
    write_context(copy, copy.with_name("exported"), None, False)
    expected, exported = read_yaml(checkpoint / "context" / "model.yaml"), copy.with_name("exported") / "model.yaml"
    if settings := expected["config"].get("generation_config"):  # NeMo writes ./artifacts
        settings["pretrained_model_name_or_path"] = settings["pretrained_model_name_or_path"].removeprefix("./")
    same = described_model(copy) == expected and read_metadata(copy) == read_metadata(checkpoint)
    return same, read_yaml(exported) == expected


@pytest.mark.parametrize("model", ["llama31", pytest.param("gemma", marks=pytest.mark.slow), "gpt"])
def test_a_context_without_model_yaml(model: str, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    copy = tmp_path / "model--val_loss=1.23-step=99-last"
    assert run_ranks(described_without_its_file, 1, checkpoint_of(model), copy) == [(True, True)]


def not_described(copy: Path) -> str:
    """What is said of a context without model.yaml whose model is of a class that is not NeMo's."""
    from nemo_ptq.checkpoint.metadata import read_metadata

    with pytest.raises(ConfigError) as raised:
        read_metadata(copy)
    return str(raised.value)


def test_a_class_of_ones_own_without_model_yaml(demo: Demo, tmp_path: Path) -> None:
    copy = copy_of(demo.checkpoint, tmp_path)
    (copy / "context" / "model.yaml").unlink()
    file = copy / "context" / "io.json"
    file.write_text(file.read_text().replace('"LlamaConfig"', '"MyConfig"').replace(OF_LLAMA, '"my_models"'))
    (problem,) = run_ranks(not_described, 1, copy)
    assert "my_models.MyConfig at model.config" in problem
    assert "model.yaml is missing" in problem


def write_training_context(directory: Path, tokenizer: Path) -> None:
    """Writes the context that NeMo saves with a checkpoint during training."""
    import functools

    import torch
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.enums import AttnBackend
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.lightning.io.pl import TrainerContext
    from nemo.lightning.pytorch.optim import CosineAnnealingScheduler

    config = llm.Llama31Config8B(
        num_layers=2,
        apply_rope_fusion=False,
        attention_backend=AttnBackend.unfused,
        activation_func=torch.nn.functional.gelu,
        init_method=functools.partial(torch.nn.init.normal_, mean=0.0, std=0.01),
        pipeline_dtype=torch.bfloat16,
    )
    optimizer = nl.MegatronOptimizerModule(
        config=OptimizerConfig(optimizer="adam", lr=1e-4, bf16=True), lr_scheduler=CosineAnnealingScheduler()
    )
    model = llm.LlamaModel(config, optim=optimizer, tokenizer=AutoTokenizer(str(tokenizer)))
    trainer = nl.Trainer(
        devices=1,
        accelerator="cpu",
        strategy=nl.MegatronStrategy(sequence_parallel=False),
        plugins=nl.MegatronMixedPrecision(precision="bf16-mixed"),
        callbacks=[nl.ModelCheckpoint(every_n_train_steps=10)],
        logger=False,
    )
    data = llm.SquadDataModule(dataset_root=str(directory), seq_length=64, tokenizer=AutoTokenizer(str(tokenizer)))
    context = TrainerContext(model=model, trainer=trainer, extra={"datamodule": data.__io__})
    context.io_dump(directory / "context", yaml_attrs=["model"])


def test_the_context_of_a_training_job_is_read(demo: Demo, tmp_path: Path) -> None:
    run_ranks(write_training_context, 1, tmp_path, demo.hf)
    assert "SquadDataModule" in (tmp_path / "context" / "io.json").read_text()
    assert run_ranks(differences_from_nemo, 1, tmp_path) == [[]]


def open_on_every_rank(checkpoint: Path, ranks: int, trusted: tuple[str, ...] = ()) -> str:
    """Opens a model and says why that failed."""
    import torch

    from nemo_ptq.checkpoint.loading import open_model
    from nemo_ptq.parallel.environment import read_launch
    from nemo_ptq.parallel.process_groups import process_groups

    device = torch.device("cpu")
    with process_groups(read_launch(), device, tensor_parallel=ranks):
        try:
            open_model(checkpoint, device, trusted=trusted)
        except PtqError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_hostile_context_runs_nothing_on_any_rank(ranks: int, demo: Demo, tmp_path: Path) -> None:
    checkpoint, marker = copy_of(demo.checkpoint, tmp_path / "checkpoint"), tmp_path / "marker"
    change_graph(checkpoint, lambda graph: with_argument(graph, "llama_config", "rotary_base", make_file(marker)))
    for problem in run_ranks(open_on_every_rank, ranks, checkpoint, ranks):
        assert "names subprocess.getoutput at model.config.rotary_base" in problem
    assert not marker.exists()


def test_what_is_trusted_is_called(demo: Demo, tmp_path: Path) -> None:
    checkpoint, marker = copy_of(demo.checkpoint, tmp_path / "checkpoint"), tmp_path / "marker"
    change_graph(checkpoint, lambda graph: with_argument(graph, "llama_config", "rotary_base", make_file(marker)))
    run_ranks(open_on_every_rank, 1, checkpoint, 1, ("subprocess.getoutput",))
    assert marker.exists()  # the context was dangerous indeed


@pytest.mark.parametrize(
    ("argument", "value", "reason"),
    [
        ("no_such", pyref("nemo.collections.llm.gpt.model.no_such.LlamaModel"), "cannot be imported"),
        ("function", "nemo.collections.llm.gpt.model.base.default_layer_spec", "is no model and no config class"),
        ("other class", "nemo.collections.llm.gpt.model.base.OptimizerModule", "is no model and no config class"),
    ],
)
def test_a_name_among_nemos_models_must_be_one(
    argument: str, value: Any, reason: str, demo: Demo, tmp_path: Path
) -> None:
    checkpoint = copy_of(demo.checkpoint, tmp_path / "checkpoint")
    name = value if isinstance(value, str) else f"{value['module']}.{value['name']}"
    change_graph(checkpoint, lambda graph: with_argument(graph, "llama_config", "rotary_base", call(name)))
    (problem,) = run_ranks(open_on_every_rank, 1, checkpoint, 1)
    assert f"names {name}, which {reason}" in problem


def test_code_beside_a_tokenizer_is_not_run(demo: Demo, tmp_path: Path) -> None:
    checkpoint, marker = copy_of(demo.checkpoint, tmp_path / "checkpoint"), tmp_path / "marker"
    tokenizer = checkpoint / "context" / "nemo_tokenizer"
    (tokenizer / "mine.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Mine: pass\n")
    settings = tokenizer / "tokenizer_config.json"
    settings.write_text('{"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}')
    change_graph(checkpoint, lambda graph: with_argument(graph, "auto_tokenizer", "trust_remote_code", leaf(True)))
    (problem,) = run_ranks(open_on_every_rank, 1, checkpoint, 1)
    assert "nemo_tokenizer has no tokenizer that can be loaded (" in problem
    assert "\n" not in problem
    assert not marker.exists()


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_told_in_a_line(file: str, demo: Demo, tmp_path: Path) -> None:
    checkpoint = copy_of(demo.checkpoint, tmp_path / "checkpoint")
    (checkpoint / "context" / "nemo_tokenizer" / file).write_text("{")
    (problem,) = run_ranks(open_on_every_rank, 1, checkpoint, 1)
    assert "nemo_tokenizer has no tokenizer that can be loaded (" in problem
    assert "\n" not in problem
    assert os.listdir(tmp_path) == ["checkpoint"]
