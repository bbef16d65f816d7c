# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness gets from our reader what it gets from transformers (needs `pip install nemo_ptq[eval]`)."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nemo_ptq.cli.app import app
from nemo_ptq.errors import PtqError
from tests.families import make_hf

KINDS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "num_fewshot": 1,
        "fewshot_split": "test",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        ],
    },
    "generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{continued}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 20},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_tasks(directory: Path, documents: list[dict[str, Any]]) -> list[str]:
    """Writes a task of each kind; returns the paths of their files."""
    data = directory / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    files = []
    for name, task in KINDS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        file = directory / f"{name}.yaml"
        file.write_text(json.dumps({"task": name, **source, **task}))  # JSON is YAML
        files.append(str(file))
    return files


def test_figures_are_those_that_transformers_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_ptq.engine.harness import run_tasks

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    directory = make_hf("llama31", tmp_path / "model", max_position_embeddings=64)
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    questions = [f"def add(a, b): return {number} + a" + " and the fox" * (20 * number) for number in range(5)]
    continued = []
    for question in questions:
        prompt = tokenizer(question, return_tensors="pt")["input_ids"][:, -44:]
        tokens = model.float().generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :]
        continued.append(tokenizer.decode(tokens, skip_special_tokens=True).split("\n")[0])
    documents = [
        {"question": question, "choices": [" + b", " the lazy dog"], "answer": number % 2, "continued": text}
        for number, (question, text) in enumerate(zip(questions, continued, strict=True))
    ]
    files = write_tasks(tmp_path, documents)
    manager = TaskManager(include_defaults=False)
    theirs = HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=1)
    expected = lm_eval.simple_evaluate(model=theirs, tasks=files, task_manager=manager, limit=4)["results"]
    figures = run_tasks(directory, directory, files, limit=4)
    assert {(figure.task, figure.metric) for figure in figures} == {
        *(("choice", "acc"), ("generation", "exact_match")),
        *(("rolling", "bits_per_byte"), ("rolling", "word_perplexity")),
    }
    for figure in figures:
        assert figure.value == pytest.approx(expected[figure.task][f"{figure.metric},none"], rel=1e-4), figure
        assert figure.baseline == figure.value and figure.documents == 4
        assert figure.shots == (1 if figure.task == "choice" else 0)
        assert figure.higher_is_better is (figure.task != "rolling")
    assert {figure.value for figure in figures if figure.task == "generation"} == {1.0}
    with pytest.raises(PtqError, match=r"--tasks .*missing.yaml could not be run \(.*`lm-eval ls tasks` lists what"):
        run_tasks(directory, None, [str(tmp_path / "missing.yaml")], limit=1)


def refusal(*words: Any) -> str:
    """What `nemo-ptq evaluate` says when it refuses."""
    ended = CliRunner().invoke(app, ["evaluate", *map(str, words)])
    assert isinstance(ended.exception, PtqError)
    return str(ended.exception)


def test_options_that_do_not_go_with_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal(tmp_path, "--tasks", "a", "--text", tmp_path / "b.txt")
    assert said.startswith("--tasks cannot be combined with --text")
    assert refusal(tmp_path, "--tasks", "a", "--baseline", tmp_path, "--min-recovery", 0.9).startswith(
        "--tasks cannot be combined with --min-recovery"
    )
    assert refusal(tmp_path, "--limit", 3).startswith("--limit says how many documents of a task are run")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "nemo_ptq.engine.harness", raising=False)
    assert refusal(tmp_path, "--tasks", "a").endswith("pip install 'nemo_ptq[eval]'")
