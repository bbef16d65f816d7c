# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""LoRA checkpoints of NeMo's: merged as NeMo merges them, or refused before a model is loaded."""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_ptq.checkpoint.adapters.adapter import check_adapter
from nemo_ptq.checkpoint.adapters.nemo_adapter import read_nemo_adapter
from nemo_ptq.checkpoint.allowed_names import AllowedNames
from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.config import NO_QUANT, ExportConfig, QuantizationConfig
from nemo_ptq.errors import ConfigError, PtqError
from nemo_ptq.plan.rules import check_job
from tests.ranks import run_ranks

RANK, ALPHA = 4, 12


def save_adapter(base: Path, adapter: Path, tp: int, peft: str = "LoRA") -> None:
    """Saves the checkpoint that NeMo's fine-tuning leaves: adapters with random values, and their context."""
    import fiddle as fdl
    from megatron.core import dist_checkpointing
    from nemo.collections import llm

    from nemo_ptq.checkpoint.context_build import model_config
    from nemo_ptq.checkpoint.metadata import read_model
    from nemo_ptq.checkpoint.writer import write_context
    from nemo_ptq.export.sharded_model import InTurn
    from tests import steps

    lora = getattr(llm.peft, peft)
    with steps.loaded(base, tp=tp) as model:
        with_adapters(model.module, lora(dim=RANK, alpha=ALPHA))
        _fill(model.module)
        state = {
            name: value for name, value in model.module.sharded_state_dict(prefix="module.").items() if _is_of(name)
        }
        (adapter / "weights").mkdir(parents=True, exist_ok=True)
        dist_checkpointing.save(state, str(adapter / "weights"), InTurn())
        if torch.distributed.get_rank() == 0:
            context = model_config(read_model(base, AllowedNames()), base / "context", AllowedNames())
            context.config.generation_config = None
            context.model_transform = fdl.Config(lora, dim=RANK, alpha=ALPHA)
            write_context(adapter / "context", context)
            (adapter / "weights" / "adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": str(base)}))
        torch.distributed.barrier()


def with_adapters(module: Any, lora: Any) -> None:
    """Has NeMo wrap the layers of a model; it asks for a class of Transformer Engine's even where that is missing."""
    from nemo.collections.llm.fn.base import walk
    from nemo.collections.llm.peft import lora as nemo_lora
    from nemo.collections.llm.peft import utils

    from nemo_ptq.parallel.attributes import replaced

    with ExitStack() as without:
        if not nemo_lora.HAVE_TE:
            without.enter_context(replaced(nemo_lora, "te", SimpleNamespace(Linear=None)))
            without.enter_context(replaced(utils, "HAVE_TE", False))
        walk(module, lora.transform)


def _is_of(name: str) -> bool:
    return ".adapter." in name


def _fill(module: Any) -> None:
    generator = torch.Generator().manual_seed(7 + torch.distributed.get_rank())
    for name, parameter in module.named_parameters():
        if _is_of(name):
            parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.05).to(parameter.dtype)


def merged_by_nemo(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The linear layers after NeMo's own merge in float32, rounded to bfloat16."""
    from megatron.core import dist_checkpointing
    from nemo.collections import llm
    from nemo.collections.llm.fn.base import walk
    from nemo.collections.llm.peft.lora import LoRAMerge

    from tests import steps

    with steps.loaded(base) as model:
        with_adapters(model.module, llm.peft.LoRA(dim=RANK, alpha=ALPHA))
        wanted = {
            name: value for name, value in model.module.sharded_state_dict(prefix="module.").items() if _is_of(name)
        }
        state = dist_checkpointing.load(wanted, str(adapter / "weights"))
        found = model.module.load_state_dict({key.removeprefix("module."): state[key] for key in state}, strict=False)
        assert not found.unexpected_keys
        model.module.float()
        walk(model.module, LoRAMerge().transform)
        weights = {name.replace(".to_wrap.", "."): value for name, value in model.module.named_parameters()}
        return {name: value.bfloat16() for name, value in weights.items() if ".linear_" in name and not _is_of(name)}


def merged_here(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from nemo_ptq.checkpoint.reader import open_checkpoint

    return {part.live_name: part.read() for part in open_checkpoint(base, AllowedNames(), adapter).parts}


FAMILIES = (
    ("llama31", 2),
    pytest.param("mixtral", 2, marks=pytest.mark.slow),
    pytest.param("gpt", 1, marks=pytest.mark.slow),
)


@pytest.mark.parametrize(("name", "tp"), FAMILIES)
def test_it_is_merged_as_nemo_merges_it(
    name: str, tp: int, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base, adapter = checkpoint_of(name), tmp_path / "lora--val_loss=1.23-step=99-last"
    run_ranks(save_adapter, tp, base, adapter, tp)
    (expected,) = run_ranks(merged_by_nemo, 1, base, adapter)
    check_adapter(adapter, base, read_metadata(base), is_hugging_face=False)
    found, before = merged_here(base, adapter), merged_here_without(base)
    linears = {key for key in before if ".linear_" in key and key.endswith(".weight")}
    assert {key for key in before if not torch.equal(before[key], found[key])} == linears
    assert all(torch.equal(found[key], expected[key]) for key in linears)


def merged_here_without(base: Path) -> dict[str, torch.Tensor]:
    from nemo_ptq.checkpoint.torch_dist import checkpoint_parts

    return {part.live_name: part.read() for part in checkpoint_parts(base)}


@pytest.fixture(scope="module")
def adapter(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA of the tiny Llama 3.1."""
    made = tmp_path_factory.mktemp("lora") / "adapter"
    run_ranks(save_adapter, 1, checkpoint_of("llama31"), made, 1)
    return made


def run_task(arguments: dict[str, Any]) -> None:
    """Runs a job without quantization."""
    from tests import steps

    steps.run_job(check_job(world_size=torch_world(), **arguments))


def torch_world() -> int:
    from nemo_ptq.parallel.environment import read_launch

    return read_launch().world_size


def arguments(base: Path, output: Path, adapter: Path | None, tp: int = 1, pp: int = 1) -> dict[str, Any]:
    return {
        "nemo_checkpoint": str(base),
        "adapter": None if adapter is None else str(adapter),
        "calibration_tp": tp,
        "calibration_pp": pp,
        "quantization_config": QuantizationConfig(NO_QUANT, evaluation_dataset_size=0),
        "export_config": ExportConfig(path=str(output), export_format="hf"),
    }


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_job_exports_what_convert_merges(
    tp: int, pp: int, checkpoint_of: Callable[[str], Path], adapter: Path, tmp_path: Path
) -> None:
    from nemo_ptq.console.reporter import Reporter
    from nemo_ptq.engine.convert import convert

    base = checkpoint_of("llama31")
    convert(base, tmp_path / "merged", "hf", None, Reporter(False), adapter)
    run_ranks(run_task, tp * pp, arguments(base, tmp_path / "out", adapter, tp, pp))
    names = [file.name for file in (tmp_path / "merged").glob("*.safetensors")]
    assert names
    for name in names:
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def export_twice(base: Path, adapter: Path, directory: Path) -> list[str]:
    """Quantizes a model with an adapter, exports it again from the calibration alone; returns the files that differ."""
    from nemo_ptq.engine.reexport import is_possible, run_reexport
    from tests import steps
    from tests.files import digests

    quantized = {"quantization_config": QuantizationConfig("fp8", quality="fast", enable_kv_cache=False)}
    first = {**arguments(base, directory / "out", adapter), **quantized, "forward_loop": print}
    steps.run_job(check_job(world_size=1, **first))
    export = ExportConfig(path=str(directory / "again"), export_format="hf")
    again = check_job(world_size=1, calibration_state=directory / "out", export_config=export)
    assert again.adapter == adapter
    assert is_possible(again, 1)
    run_reexport(again)
    found, expected = digests(directory / "again"), digests(directory / "out")
    return [name for name in expected if name.endswith(".safetensors") and found.get(name) != expected[name]]


def test_a_calibration_remembers_its_adapter(
    checkpoint_of: Callable[[str], Path], adapter: Path, tmp_path: Path
) -> None:
    assert run_ranks(export_twice, 1, checkpoint_of("llama31"), adapter, tmp_path) == [[]]


def test_what_an_adapter_is_merged_into(
    checkpoint_of: Callable[[str], Path], adapter: Path, demo: Any, tmp_path: Path
) -> None:
    base = checkpoint_of("llama31")
    with pytest.raises(ConfigError, match=f"is a LoRA adapter, not a model: give nemo_checkpoint= .*{base}"):
        read_metadata(adapter)
    with pytest.raises(ConfigError, match=r"the adapter .* has matrices .*: give the model that it was trained on"):
        check_job(world_size=1, **arguments(demo.checkpoint, tmp_path / "out", adapter))
    with pytest.raises(ConfigError, match="adapter=none does not exist"):
        check_job(world_size=1, **arguments(base, tmp_path / "out", Path("none")))


def edited(adapter: Path, to: Path, old: str, new: str) -> Path:
    """A copy of an adapter whose context says something else."""
    shutil.copytree(adapter, to)
    file = to / "context" / "io.json"
    content = file.read_text()
    assert old in content
    file.write_text(content.replace(old, new))
    return to


def test_another_kind_of_adapter(checkpoint_of: Callable[[str], Path], adapter: Path, tmp_path: Path) -> None:
    dora = edited(adapter, tmp_path / "dora", '"nemo.collections.llm.peft.lora"', '"nemo.collections.llm.peft.dora"')
    with pytest.raises(PtqError, match=r"was made by nemo.collections.llm.peft.dora.LoRA, and only"):
        read_nemo_adapter(dora)
    with pytest.raises(PtqError, match=r"was made by nothing, and only"):
        read_nemo_adapter(checkpoint_of("llama31"))
    assert read_nemo_adapter(adapter).scale == ALPHA / RANK


def test_files_that_are_missing(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    next((tmp_path / "adapter" / "weights").glob("*.distcp")).unlink()
    with pytest.raises(ConfigError, match=r"^adapter=.* is incomplete: weights/ lacks"):
        read_nemo_adapter(tmp_path / "adapter")
