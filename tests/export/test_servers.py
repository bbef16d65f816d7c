# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The table of servers answers for every cell of the support matrix, and the document says what it says."""

from itertools import product

import pytest

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
    commands,
    refusals,
)
from nemo_ptq.models.registry import families
from nemo_ptq.quantization.algorithms import ALGORITHMS
from tests.serve.exports import CELLS
from tests.servers import DOCUMENT, cells, render

NEWEST = {name: server.versions[-1] for name, server in SERVERS.items()}


def outcome(server: str, export: Export, version: str | None = None) -> str:
    return answer(SERVERS[server], version or NEWEST[server], export).outcome


@pytest.mark.parametrize("version", SERVERS["vllm"].versions)
def test_nothing_is_unknown_of_vllm(version: str) -> None:
    asked = [export for export in cells() if export.format in SERVERS["vllm"].formats]
    assert len(asked) > 100
    assert [export for export in asked if outcome("vllm", export, version) == UNKNOWN] == []


def test_what_is_said_of_the_exports_that_make_test_serve_tries_is_what_it_can_find() -> None:
    for cell in CELLS:
        export = Export(cell.format, cell.algorithm, cell.family, cell.kv_cache)
        said = answer(SERVERS["vllm"], NEWEST["vllm"], export)
        if cell.is_refused:
            assert (said.outcome, said.known_by) == (REFUSED, RAN)
        else:
            assert said.outcome == LOADS and said.known_by != (EMULATED if cell.runs_on_a_cpu else RAN), export


def test_facts_name_what_there_is() -> None:
    names = {family.name for family in families()}
    for fact in FACTS:
        assert fact.server in SERVERS and fact.outcome in (LOADS, REFUSED) and fact.known_by
        assert set(fact.formats or ()) <= set(FORMATS)
        assert set(fact.algorithms or ()) <= set(ALGORITHMS)
        assert set(fact.families or ()) <= names
        assert set(fact.versions or ()) <= set(SERVERS[fact.server].versions)
        assert fact.outcome == LOADS or fact.note, "who is refused is told why"


def test_every_fact_answers_something() -> None:
    every = [
        Export(format, algorithm, family.name, kv_cache)
        for format, algorithm, family, kv_cache in product(FORMATS, ALGORITHMS, families(), (False, True))
    ]
    for index, fact in enumerate(FACTS):
        others = [other for other in FACTS if other is not fact]
        server = SERVERS[fact.server]
        questions = [(version, export) for version in server.versions for export in every]
        with pytest.MonkeyPatch.context() as patch:
            before = [answer(server, version, export) for version, export in questions]
            patch.setattr("nemo_ptq.export.servers.FACTS", others)
            after = [answer(server, version, export) for version, export in questions]
        assert before != after, f"fact {index} changes no answer: {fact}"


def test_a_kv_cache_that_a_loader_fails_on_is_refused() -> None:
    for format, family in product(("hf",), ("Gemma", "Mixtral")):
        export = Export(format, "fp8", family, kv_cache=True)
        assert (outcome("vllm", export, "0.24"), outcome("vllm", export)) == (REFUSED, LOADS)
        assert outcome("vllm", Export(format, "fp8", family), "0.24") == LOADS


def test_refusals_say_what_to_do_instead() -> None:
    lines = refusals(Export("hf", "int4_awq", "Llama"))
    assert any(line.startswith("vLLM 0.32 does not load algorithm=int4_awq in export_format=hf: ") for line in lines)
    assert all("use export_format=compressed_tensors" in line for line in lines)
    assert not any("vLLM" in line for line in refusals(Export("compressed_tensors", "int4_awq", "Llama")))
    assert refusals(Export("nemo", "fp8", "Llama")) == []


def test_commands_are_those_of_the_newest_servers_that_load_it() -> None:
    assert commands(Export("compressed_tensors", "int4_awq", "Llama"), "'a b'")["vLLM 0.32"] == ("vllm serve 'a b'",)
    assert list(commands(Export("trtllm", "fp8", "Llama"), "OUT")) == ["TensorRT-LLM engines up to 1.2"]
    assert not any("vLLM" in label for label in commands(Export("hf", "int4_awq", "Llama"), "OUT"))


def test_another_algorithm_or_family_is_unknown() -> None:
    assert outcome("vllm", Export("hf", "custom", "Llama")) == UNKNOWN
    assert outcome("vllm", Export("hf", "fp8", "like Llama")) == UNKNOWN


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == render(), "run `make servers`"
