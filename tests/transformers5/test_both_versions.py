# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Every family, saved by transformers 5 and imported, is the model that transformers 4 and 5 compute.

Reader and exporter of this project could share a mistake about a config.json. transformers' own classes do not.
"""

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.models import hugging_face
from nemo_ptq.models.hf_settings import with_one_spelling
from nemo_ptq.task import ptq
from nemo_ptq.verify.forward_pass import logits
from tests import steps
from tests.export.hugging_face import TOKENS, distance
from tests.families import FAMILIES, TELLING, make_hf

PYTHON = Path(__file__).parents[2] / "build" / "venv-transformers5" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="transformers 5 is not installed: make tf5-env"),
]
# Settings that show in the logits.
_LONGROPE = {"type": "longrope", "short_factor": [1.0 + n / 4 for n in range(8)], "long_factor": [3.0] * 8}
SETTINGS: Mapping[str, dict[str, Any]] = {
    **TELLING,
    "llama32": {"rms_norm_eps": 0.3},
    "phi3": {**TELLING["phi3"], "rope_scaling": _LONGROPE, "original_max_position_embeddings": 64},
}
# It is written as several; the reader takes the size from the tensors.
NOT_ONE_SETTING = ("rope_scaling", "n_inner")
# Relative distance of float32 logits that the order of sums explains.
SAME = 1e-4


def ask(directory: Path, saved: Sequence[tuple[Path, Path]], asked: Sequence[Path]) -> dict[Path, torch.Tensor]:
    """Asks transformers 5 to save models again, and for the logits of directories."""
    questions, answers = directory / "questions.json", directory / "answers.safetensors"
    content = {"tokens": TOKENS.tolist(), "saved": [[str(old), str(new)] for old, new in saved]}
    questions.write_text(json.dumps(content | {"logits": [str(path) for path in asked]}))
    script = Path(__file__).with_name("ask_transformers.py")
    ran = subprocess.run([PYTHON, "-I", script, questions, answers], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    with safe_open(answers, framework="pt") as file:
        assert file.metadata()["transformers"].startswith("5.")
        return {Path(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)


def export(source: Path, output: Path) -> Path:
    """Runs a job that quantizes nothing."""
    ptq(str(source), ExportConfig(str(output), export_format="hf"), quantization_config=QuantizationConfig("no_quant"))
    return output


@dataclass(frozen=True)
class Models:
    """The directories of all families, and what transformers 5 computes from them.

    Attributes:
        root: Holds them: FAMILY.4 as transformers 4 has saved it, FAMILY.5 the same as 5 has, FAMILY.out an export of
            the latter.
        logits: Of transformers 5, by directory.
    """

    root: Path
    logits: Mapping[Path, torch.Tensor]

    def expected(self, family: str) -> torch.Tensor:
        """What transformers 5 computes from its own directory of a family."""
        return self.logits[self.root / f"{family}.5"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        make_hf(family, root / f"{family}.4", **SETTINGS[family])
    ask(root, [(root / f"{family}.4", root / f"{family}.5") for family in FAMILIES], [])
    for family in FAMILIES:
        export(root / f"{family}.5", root / f"{family}.out")
    return Models(root, ask(root, [], [root / f"{family}.{kind}" for family in FAMILIES for kind in ("4", "5", "out")]))


def megatron(directory: Path) -> torch.Tensor:
    """The float32 logits of NeMo's model that a directory is imported as."""
    with steps.loaded(directory) as model:
        steps.in_float32(model)
        found = steps.logits(model, TOKENS)
    assert found is not None
    return found


def transformers_4(directory: Path) -> torch.Tensor:
    import transformers

    assert transformers.__version__.startswith("4.")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        return model(TOKENS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_all_compute_the_same(family: str, models: Models) -> None:
    expected = models.expected(family)
    old, new, out = (models.root / f"{family}.{kind}" for kind in ("4", "5", "out"))
    found = {
        "transformers 5, saved by 4": models.logits[old],
        "transformers 5, exported": models.logits[out],
        "transformers 4, saved by 4": transformers_4(old),
        "transformers 4, exported": transformers_4(out),
        "reader, saved by 4": logits(old, TOKENS),
        "reader, saved by 5": logits(new, TOKENS),
        "reader, exported": logits(out, TOKENS),
    }
    assert {name: d for name, value in found.items() if (d := distance(value, expected)) > SAME} == {}
    for directory in (old, new):
        assert distance(megatron(directory), expected) <= SAME, directory


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"starcoder"}))  # which has learned positions
def test_the_files_have_the_spelling_of_their_version(family: str, models: Models) -> None:
    old, new = (json.loads((models.root / f"{family}.{kind}" / "config.json").read_text()) for kind in ("4", "5"))
    assert "rope_theta" in old and "rope_parameters" not in old
    assert "rope_parameters" in new and not new.keys() & {"rope_theta", "rope_scaling", "rope_local_base_freq"}
    assert "dtype" in old and "dtype" in new


def without(name: str, value: Any) -> Any:
    """A setting of a config.json taken out, also from the objects in it."""
    if not isinstance(value, dict):
        return value
    return {key: without(name, entry) for key, entry in value.items() if key != name}


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for family, settings in SETTINGS.items() for name in settings if name not in NOT_ONE_SETTING],
)
def test_a_setting_that_the_reader_loses_is_seen(family: str, name: str, models: Models, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(models.root / f"{family}.5", tmp_path / family))
    config = json.loads((damaged / "config.json").read_text())
    stored = "rope_theta" if name == "rope_local_base_freq" else name
    changed = without(stored, config)
    assert changed != config
    (damaged / "config.json").write_text(json.dumps(changed))
    try:
        found = logits(damaged, TOKENS)
    except Exception:  # a size, without which the tensors do not fit
        return
    assert not distance(found, models.expected(family)) <= SAME


LOST: Mapping[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "everything of the rotary embedding": ("llama31", lambda content: content.pop("rope_parameters")),
    "its base": ("llama2", lambda content: content["rope_parameters"].pop("rope_theta")),
    "its share": ("nemotron", lambda content: content["rope_parameters"].pop("partial_rotary_factor")),
    "that of some layers": (
        "gemma3",
        lambda content: content["rope_parameters"]["sliding_attention"].update(rope_theta=1e4),
    ),
    "its factor": ("gemma3", lambda content: content["rope_parameters"]["full_attention"].update(factor=1.0)),
    "a scale": ("gemma2", lambda content: content.update(query_pre_attn_scalar=64)),
}


@pytest.mark.parametrize("name", LOST)
def test_a_setting_that_the_import_loses_is_seen(name: str, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    family, lose = LOST[name]

    def forgetful(content: Mapping[str, Any]) -> dict[str, Any]:
        copied = json.loads(json.dumps(content))
        lose(copied)
        return with_one_spelling(copied)

    monkeypatch.setattr(hugging_face, "with_one_spelling", forgetful)
    assert distance(megatron(models.root / f"{family}.5"), models.expected(family)) > 10 * SAME
