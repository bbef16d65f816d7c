# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The table of servers answers for every cell of the support matrix, and the document says what it says."""

import shlex
from collections import defaultdict
from dataclasses import replace
from itertools import product

import pytest

from nemo_ptq.config import AUTO, CUSTOM, NO_QUANT, NVFP4_CACHE
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.export.servers import (
    EMULATED,
    FACTS,
    LOADS,
    RAN,
    REFUSED,
    SERVERS,
    UNKNOWN,
    Export,
    answer,
    answers,
    commands,
    refusals,
)
from nemo_ptq.models.registry import families
from nemo_ptq.quantization.algorithms import SELECTABLE
from tests.serve.exports import CELLS, FAMILIES, ONE_PROJECTION, PHI3_LONG_ROPE, Cell
from tests.servers import DOCUMENT, cells, render

NEWEST = {name: server.versions[-1] for name, server in SERVERS.items()}


def outcome(server: str, export: Export, version: str | None = None) -> str:
    return answer(SERVERS[server], version or NEWEST[server], export).outcome


@pytest.mark.parametrize("version", SERVERS["vllm"].versions)
def test_nothing_is_unknown_of_vllm(version: str) -> None:
    asked = [export for export in cells() if export.format in SERVERS["vllm"].formats]
    asked += [
        replace(export, cache_format=NVFP4_CACHE) for export in asked if export.format == "hf" and export.kv_cache
    ]
    assert {export.algorithm for export in asked} == set(SELECTABLE)
    assert {export.family for export in asked} == set(CLASSES)
    assert [export for export in asked if outcome("vllm", export, version) == UNKNOWN] == []


CLASSES = {
    family.name: family.hugging_face.architecture
    for family in families()
    if family.hugging_face is not None and family.refused is None
}


def of_one_class(format: str, algorithm: str, family: str, kv_cache: bool) -> tuple[str, str, str, bool]:
    """What vLLM sees of an export: CodeLlama's directories are Llama's, Nemotron Nano v2's are Nemotron-H's."""
    return format, algorithm, CLASSES[family], kv_cache


def test_what_is_said_to_have_been_run_is_what_make_test_serve_asks() -> None:
    asked = {
        of_one_class(cell.format, cell.algorithm, cell.family, cell.kv_cache): EMULATED if cell.is_emulated else RAN
        for cell in CELLS
        if cell.algorithm != CUSTOM and not cell.is_refused
    }
    said = {}
    for export in cells():
        if export.format in SERVERS["vllm"].formats:
            found = answer(SERVERS["vllm"], NEWEST["vllm"], export)
            if found.outcome == LOADS and found.known_by in (RAN, EMULATED):
                key = of_one_class(export.format, export.algorithm, export.family, export.kv_cache)
                assert said.setdefault(key, found.known_by) == found.known_by
    assert said == asked


def test_what_make_test_serve_finds_refused_is_said_to_be() -> None:
    refused = {(cell.format, cell.algorithm) for cell in CELLS if cell.is_refused}
    assert refused == {("hf", "int4_awq"), ("hf", "w4a8_awq")}
    for format, algorithm in refused:
        said = answer(SERVERS["vllm"], NEWEST["vllm"], Export(format, algorithm, "Llama"))
        assert (said.outcome, said.known_by) == (REFUSED, RAN)


def is_older(cell: Cell) -> bool:
    """Whether `make serve-exports` made an export already when a GPU was asked."""
    is_newer = cell.model in ("nemotron_h", *PHI3_LONG_ROPE) or (cell.model, cell.job) in NEWER
    return not cell.variant and cell.algorithm not in (AUTO, CUSTOM) and not is_newer


NEWER = [
    *((model, "int8_sq") for model in ("mistral", "gemma", "starcoder", "starcoder2", "nemotron")),
    *((model, "fp8") for model in FAMILIES if model not in ONE_PROJECTION),
]
# Of the exports that it made then, those that benchmarks/serve_gpu.sh had no time for.
NOT_ASKED = {
    ("gemma3", "nvfp4", "compressed_tensors"),
    *(("starcoder", algorithm, "compressed_tensors") for algorithm in ("nvfp4", "int8_dynamic")),
    *(("starcoder", algorithm, "hf") for algorithm in ("fp8", "nvfp4")),
    *((model, "int4_awq", "compressed_tensors") for model in ("mixtral", "qwen3_moe")),
    *((cell.model, cell.algorithm, cell.format) for cell in CELLS if cell.model in ("starcoder2", "nemotron")),
}


def test_what_was_run_on_a_gpu_is_said_to_have_been() -> None:
    asked = [cell for cell in CELLS if is_older(cell) and (cell.model, cell.algorithm, cell.format) not in NOT_ASKED]
    assert len(asked) == 101
    refused = set()
    for cell in asked:
        export = Export(cell.format, cell.algorithm, cell.family, cell.kv_cache, cell.tied_embeddings)
        said = answer(SERVERS["vllm"], "0.24", export)
        assert said.known_by == RAN, export
        if said.outcome == REFUSED:
            refused.add(cell.path)
    assert refused == {
        *("demo/int4_awq/hf", "demo/w4a8_awq/hf"),
        *("llama32/fp8-kv/hf", "llama32/nvfp4/hf", "gemma3/fp8-kv/hf", "gemma3/nvfp4/hf"),
        *(f"{model}/fp8-kv/hf" for model in ("gemma", "gemma2", "mixtral", "qwen2", "qwen3")),
        "gemma/fp8-kv/compressed_tensors",
    }


def test_facts_name_what_there_is() -> None:
    names = {family.name for family in families()}
    for fact in FACTS:
        assert fact.server in SERVERS and fact.outcome in (LOADS, REFUSED, UNKNOWN) and fact.known_by
        assert set(fact.formats or ()) <= set(FORMATS)
        assert set(fact.algorithms or ()) <= set(SELECTABLE)
        assert set(fact.families or ()) <= names
        assert set(fact.versions or ()) <= set(SERVERS[fact.server].versions)
        assert fact.outcome != REFUSED or fact.note, "who is refused is told why"


def test_every_fact_answers_something() -> None:
    every = [
        Export(format, algorithm, family.name, kv_cache, tied)
        for format, algorithm, family, kv_cache, tied in product(
            FORMATS, SELECTABLE, families(), (False, True), (False, True)
        )
    ]
    every += [Export("hf", "fp8", family.name, kv_cache=True, cache_format=NVFP4_CACHE) for family in families()]
    said = defaultdict(list)  # by question, what each fact that fits says of it
    for index, fact in enumerate(FACTS):
        server = SERVERS[fact.server]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nemo_ptq.export.servers.FACTS", [fact])
            for version, export in product(server.versions, every):
                found = answer(server, version, export)
                if export.format in server.formats and found.known_by:
                    said[version, server.name, export].append((index, found))
    needed = {its[0][0] for its in said.values() if len(its) == 1 or its[0][1] != its[1][1]}
    assert [fact for index, fact in enumerate(FACTS) if index not in needed] == [], "they change no answer"


def test_a_kv_cache_that_a_loader_fails_on_is_refused() -> None:
    for format, family in product(("hf",), ("Gemma", "Mixtral")):
        export = Export(format, "fp8", family, kv_cache=True)
        assert (outcome("vllm", export, "0.24"), outcome("vllm", export)) == (REFUSED, LOADS)
        assert outcome("vllm", Export(format, "fp8", family), "0.24") == LOADS


@pytest.mark.parametrize("family", ["Llama", "CodeLlama", "Phi 3", "Gemma 3"])
@pytest.mark.parametrize("algorithm", ["fp8", "nvfp4", "fp8_dynamic", "w4a16_nvfp4"])
def test_a_quantized_model_with_tied_embeddings_is_refused_in_hf(family: str, algorithm: str) -> None:
    tied = Export("hf", algorithm, family, tied_embeddings=True)
    assert (outcome("vllm", tied, "0.24"), outcome("vllm", tied)) == (REFUSED, LOADS)
    (line,) = refusals(tied, ("vllm",))
    assert line.startswith(f"vLLM 0.24 does not load algorithm={algorithm} in export_format=hf: ")
    assert "use vLLM 0.32, or export_format=compressed_tensors" in line
    for other in (Export("hf", algorithm, family), Export("hf", NO_QUANT, family, tied_embeddings=True)):
        assert outcome("vllm", other, "0.24") == LOADS
    assert outcome("vllm", Export("compressed_tensors", algorithm, family, tied_embeddings=True), "0.24") == LOADS
    assert outcome("vllm", Export("hf", algorithm, "Qwen 3", tied_embeddings=True), "0.24") == LOADS


def test_a_kv_cache_in_nvfp4_is_for_vllm_alone() -> None:
    export = Export("hf", "fp8", "Llama", kv_cache=True, cache_format=NVFP4_CACHE)
    assert (outcome("vllm", export, "0.24"), outcome("vllm", export)) == (LOADS, LOADS)
    assert "FlashInfer" in answer(SERVERS["vllm"], NEWEST["vllm"], export).note
    assert "Blackwell" in answer(SERVERS["vllm"], "0.24", export).note
    assert outcome("vllm", replace(export, family="Gemma"), "0.24") == REFUSED
    assert outcome("sglang", export) == UNKNOWN and outcome("transformers", export) == REFUSED
    assert outcome("vllm", Export("hf", "int4_awq", "Llama", kv_cache=True, cache_format=NVFP4_CACHE)) == REFUSED


def test_refusals_say_what_to_do_instead() -> None:
    lines = refused("hf", "int4_awq")
    assert lines[0].startswith("vLLM 0.32 does not load algorithm=int4_awq in export_format=hf: ")
    assert all("use export_format=compressed_tensors" in line for line in lines)
    assert refused("compressed_tensors", "int4_awq") == []


def test_a_job_hears_of_the_newest_version_that_refuses_of_each_server_that_its_format_is_made_for() -> None:
    """Others refuse these, which the document says."""
    for export in (Export("hf", "fp8", "Llama"), Export("compressed_tensors", "int8_sq", "Llama")):
        assert REFUSED in {found.outcome for found in answers(export)}
        assert refused(export.format, export.algorithm) == []
    gemma = Export("hf", "fp8", "Gemma", kv_cache=True)
    (line,) = refusals(gemma, ("vllm",))
    assert line.startswith(
        "vLLM 0.24 does not load algorithm=fp8 in export_format=hf: its loaders of these models fail"
    )
    assert {name for name in FORMATS if not FORMATS[name].servers} == {"nemo", "megatron"}
    for format in FORMATS.values():
        assert all(format.name in SERVERS[name].formats for name in format.servers)


def refused(format: str, algorithm: str) -> list[str]:
    return refusals(Export(format, algorithm, "Llama"), FORMATS[format].servers)


def test_commands_are_those_of_the_newest_servers_that_load_it() -> None:
    assert commands(Export("compressed_tensors", "int4_awq", "Llama"), "'a b'")["vLLM 0.32"] == ("vllm serve 'a b'",)
    assert list(commands(Export("trtllm", "fp8", "Llama"), "OUT")) == ["TensorRT-LLM engines up to 1.2"]
    assert not any("vLLM" in label for label in commands(Export("hf", "int4_awq", "Llama"), "OUT"))


def test_longrope_has_vllm_serve_what_the_short_factors_are_for() -> None:
    """Its sources: without --max-model-len its limit is config.json's original_max_position_embeddings."""
    stretched = Export("hf", "fp8", "Phi 3", short_context=4096)
    notes = {found.label: found.note for found in answers(stretched)}
    plain = {found.label: found.note for found in answers(Export("hf", "fp8", "Phi 3"))}
    for version in SERVERS["vllm"].versions:
        its = notes.pop(f"vLLM {version}")
        assert its.startswith("it serves 4096 tokens") and "--max-model-len" in its
        assert plain.pop(f"vLLM {version}") == ""
    assert notes == plain


# Of tensorrt_llm/commands/build.py and serve.py, and of SGLang's server_args.py.
OPTIONS = {
    "trtllm-build": {"--checkpoint_dir", "--output_dir", "--max_batch_size", "--max_seq_len", "--workers"},
    "trtllm-serve": {"--tokenizer", "--host", "--port", "--backend", "--tp_size"},
    "python -m sglang.launch_server": {"--model-path", "--host", "--port", "--tp-size"},
}


@pytest.mark.parametrize("name", [name for name in SERVERS if name != "vllm"])
def test_commands_of_servers_that_are_not_run_here_have_options_that_they_know(name: str) -> None:
    for command in SERVERS[name].commands:
        (program,) = (known for known in OPTIONS if command.startswith(f"{known} "))
        words = shlex.split(command.removeprefix(program))
        assert {word for word in words if word.startswith("-")} <= OPTIONS[program]
        assert words.count("{directory}") == 1


def test_another_algorithm_or_family_is_unknown() -> None:
    assert outcome("vllm", Export("hf", "custom", "Llama")) == UNKNOWN
    assert outcome("vllm", Export("hf", "fp8", "like Llama")) == UNKNOWN


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == render(), "run `make servers`"
