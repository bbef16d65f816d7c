# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Which server loads which export: what is known of each, from which of its versions, and how.

The table is a list of facts, of which the first that fits a question answers it. Rules, plans, model cards and
docs/servers.md are made from it. Imports nothing heavy: the command line reads it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nemo_ptq.config import AUTO, FP8_CACHE, NO_QUANT, NVFP4_CACHE

LOADS, REFUSED, UNKNOWN = "loads", "refused", "unknown"
"""What a server does with an export."""

RAN = "run"
EMULATED = "loaded by it, its GPU kernels replaced by torch"
READ = "read in its source"
"""How that is known."""


@dataclass(frozen=True)
class Server:
    """A program that serves exports.

    Attributes:
        name: What users call it.
        label: What documents call it.
        versions: Those that something is known of, the newest last.
        formats: The export formats that it reads at all.
        commands: Shell commands that serve a directory, {directory} standing for it; none for a library.
        request: Shell command that asks the server for a continuation; empty where nobody has tried one.
        long_rope: What it does with longrope, {} standing for the tokens that the short factors are for.
    """

    name: str
    label: str
    versions: tuple[str, ...]
    formats: tuple[str, ...]
    commands: tuple[str, ...] = ()
    request: str = ""
    long_rope: str = ""


@dataclass(frozen=True)
class Fact:
    """What versions of a server do with certain exports; a field that is None fits all.

    Attributes:
        server: Its name.
        outcome: :data:`LOADS` or :data:`REFUSED`.
        known_by: How that is known.
        formats: Of the export.
        algorithms: That it is quantized with.
        families: Names of the model's family.
        versions: Of the server.
        kv_cache: Whether the KV cache is quantized.
        tied_embeddings: Whether the output layer is the embedding.
        cache_format: What a quantized KV cache is in. None fits FP8, and where the server refuses the export any other.
        note: What a user should know of it.
    """

    server: str
    outcome: str
    known_by: str
    formats: tuple[str, ...] | None = None
    algorithms: tuple[str, ...] | None = None
    families: tuple[str, ...] | None = None
    versions: tuple[str, ...] | None = None
    kv_cache: bool | None = None
    tied_embeddings: bool | None = None
    cache_format: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Export:
    """An export, as far as a server cares.

    Attributes:
        format: Its format.
        algorithm: Name of the algorithm, "no_quant" among them.
        family: Name of the model's family.
        kv_cache: Whether the KV cache is quantized.
        tied_embeddings: Whether the output layer is the embedding.
        cache_format: What the KV cache is in, where it is quantized.
        short_context: Tokens of a text that longrope's short factors are for; None without longrope.
    """

    format: str
    algorithm: str
    family: str
    kv_cache: bool = False
    tied_embeddings: bool = False
    cache_format: str = FP8_CACHE
    short_context: int | None = None


@dataclass(frozen=True)
class Answer:
    """What one version of a server does with an export.

    Attributes:
        server: The server.
        version: Its version.
        outcome: :data:`LOADS`, :data:`REFUSED` or :data:`UNKNOWN`.
        known_by: How that is known; empty where it is not.
        note: What a user should know of it.
    """

    server: Server
    version: str
    outcome: str
    known_by: str = ""
    note: str = ""

    @property
    def label(self) -> str:
        """The server and its version."""
        return f"{self.server.label} {self.version}"


_REQUEST = (
    "curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' \\\n"
    """    -d '{"prompt": "The capital of France is", "max_tokens": 32}'"""
)
_VLLM_LONG_ROPE = (
    "it serves {} tokens with longrope's short factors; a larger --max-model-len has it take the long factors, for "
    "short texts too"
)
SERVERS: Mapping[str, Server] = {
    server.name: server
    for server in (
        Server(
            "vllm",
            "vLLM",
            ("0.24", "0.32"),
            ("hf", "compressed_tensors"),
            ("vllm serve {directory}",),
            _REQUEST,
            _VLLM_LONG_ROPE,
        ),
        Server(
            "tensorrt_llm",
            "TensorRT-LLM's PyTorch backend",
            ("of 2026",),
            ("hf", "compressed_tensors"),
            ("trtllm-serve {directory}",),
        ),
        Server(
            "tensorrt_llm_engines",
            "TensorRT-LLM engines",
            ("up to 1.2",),
            ("trtllm",),
            ("trtllm-build --checkpoint_dir {directory} --output_dir ENGINE",),
        ),
        Server(
            "sglang",
            "SGLang",
            ("0.5.23",),
            ("hf", "compressed_tensors"),
            ("python -m sglang.launch_server --model-path {directory}",),
        ),
        Server("transformers", "transformers", ("4.57", "5.19"), ("hf", "compressed_tensors")),
    )
}

_HF, _COMPRESSED = ("hf",), ("compressed_tensors",)
_LLAMAS = ("Llama", "CodeLlama")
_DENSE = (*_LLAMAS, "Mistral", "Gemma", "Nemotron", "StarCoder", "StarCoder 2")
_KNOWN_FAMILIES = (*_DENSE, "Mixtral")
_NEWER_FAMILIES = ("Qwen 2", "Qwen 3", "Qwen 3 MoE", "Phi 3", "Gemma 2", "Gemma 3")
_EXPERTS = ("Mixtral", "Qwen 3 MoE")
_SERVED_FAMILIES = (*_KNOWN_FAMILIES, *_NEWER_FAMILIES)
_SERVED_DENSE = tuple(family for family in _SERVED_FAMILIES if family not in _EXPERTS)
# vLLM's class for these quantizes the linear layers of state spaces as any other, and has their names for its own.
_HYBRIDS = ("Nemotron-H", "Nemotron Nano v2")
_ASKED = (*_SERVED_FAMILIES, *_HYBRIDS)


def _experts_in_int4(server: str) -> Fact:
    """Says that nobody has looked at INT4 experts yet; stands before facts of all that a server loads."""
    return Fact(server, UNKNOWN, READ, _COMPRESSED, ("int4_awq",), _EXPERTS)


_SGLANGS = tuple(family for family in _KNOWN_FAMILIES if family != "Nemotron")
_EVERY = (
    *(NO_QUANT, "fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4"),
    *("fp8_dynamic", "int8_dynamic", "w4a16_nvfp4"),
)
_AWQ = ("int4_awq", "w4a8_awq")
_USE_COMPRESSED = "use export_format=compressed_tensors"

_NEWER_VLLM = "use vLLM 0.32, or enable_kv_cache=false"
_KV_CACHE_NOTE = f"its loaders of these models fail on the scales of a KV cache; {_NEWER_VLLM}"
_GEMMA_KV_CACHE_NOTE = f"its loader of Gemma fails on the scales of a KV cache; {_NEWER_VLLM}"
_TIED_NOTE = (
    "its reader of ModelOpt's format cannot tie the output layer to the embedding; use vLLM 0.32, or "
    "export_format=compressed_tensors"
)
_RAN_ON_A_GPU = ("Llama", "Mistral", "Qwen 2", "Qwen 3", "Phi 3", "Gemma", "Gemma 2")
_W4A8_NOTE = "on Hopper GPUs alone, with awq_block_size=128; its kernel rounds the scales of the blocks to FP8"
_NVFP4_CACHE_NOTE_24 = "an NVFP4 KV cache needs FlashInfer and a Blackwell GPU of the data centre"
_NVFP4_CACHE_NOTE = "an NVFP4 KV cache needs FlashInfer, and heads of 64 elements a Blackwell GPU of the data centre"
_MIXTRAL_NOTE = (
    "it takes this model's experts for unquantized, since it looks for other names; use vLLM 0.32, or export_format=hf"
)

_VLLM = (
    Fact(
        "vllm",
        REFUSED,
        RAN,
        _HF,
        _AWQ,
        note=f"its reader of ModelOpt's format has no INT4; {_USE_COMPRESSED}",
    ),
    Fact(
        "vllm",
        REFUSED,
        RAN,
        _HF,
        ("fp8", "nvfp4"),
        ("Llama", "Gemma 3"),
        ("0.24",),
        tied_embeddings=True,
        note=_TIED_NOTE,
    ),
    Fact(
        "vllm",
        REFUSED,
        READ,
        _HF,
        ("fp8", "nvfp4", "fp8_dynamic", "w4a16_nvfp4", AUTO),
        (*_LLAMAS, "Mistral", "Phi 3", "Gemma 3"),
        ("0.24",),
        tied_embeddings=True,
        note=_TIED_NOTE,
    ),
    Fact(
        "vllm",
        REFUSED,
        RAN,
        _HF,
        ("fp8",),
        ("Gemma", "Gemma 2", "Mixtral", "Qwen 2", "Qwen 3"),
        versions=("0.24",),
        kv_cache=True,
        note=_KV_CACHE_NOTE,
    ),
    Fact(
        "vllm",
        REFUSED,
        READ,
        _HF,
        families=("Gemma", "Gemma 2", "Mixtral", "Nemotron", "Qwen 2", "Qwen 3", "StarCoder 2"),
        versions=("0.24",),
        kv_cache=True,
        note=_KV_CACHE_NOTE,
    ),
    Fact(
        "vllm",
        REFUSED,
        RAN,
        _COMPRESSED,
        ("fp8",),
        ("Gemma",),
        ("0.24",),
        kv_cache=True,
        note=_GEMMA_KV_CACHE_NOTE,
    ),
    Fact(
        "vllm",
        REFUSED,
        READ,
        _COMPRESSED,
        families=("Gemma",),
        versions=("0.24",),
        kv_cache=True,
        note=_GEMMA_KV_CACHE_NOTE,
    ),
    Fact(
        "vllm",
        LOADS,
        RAN,
        _HF,
        (NO_QUANT,),
        (*_RAN_ON_A_GPU, "Gemma 3", "StarCoder", *_EXPERTS),
        ("0.24",),
        kv_cache=False,
    ),
    Fact("vllm", LOADS, RAN, _HF, ("fp8",), ("Llama", "Phi 3", "Nemotron", "StarCoder 2"), ("0.24",), kv_cache=False),
    Fact("vllm", LOADS, RAN, _HF, ("fp8",), ("Llama", "Mistral", "Qwen 3 MoE"), ("0.24",), kv_cache=True),
    Fact(
        "vllm",
        LOADS,
        RAN,
        _HF,
        ("nvfp4",),
        (*_RAN_ON_A_GPU, *_EXPERTS),
        ("0.24",),
        kv_cache=False,
    ),
    Fact("vllm", LOADS, RAN, _HF, ("fp8_dynamic",), ("Llama",), ("0.24",)),
    Fact("vllm", LOADS, RAN, None, ("w4a16_nvfp4",), ("Llama", *_EXPERTS), ("0.24",)),
    Fact("vllm", LOADS, RAN, _COMPRESSED, (NO_QUANT, "int8_sq"), ("Llama",), ("0.24",), kv_cache=False),
    Fact(
        "vllm", LOADS, RAN, _COMPRESSED, ("fp8",), ("Llama", "Mixtral", "Phi 3", "StarCoder"), ("0.24",), kv_cache=False
    ),
    Fact(
        "vllm",
        LOADS,
        RAN,
        _COMPRESSED,
        ("fp8",),
        ("Llama", "Mistral", "Qwen 2", "Qwen 3", "Gemma 2", "Gemma 3", *_EXPERTS),
        ("0.24",),
        kv_cache=True,
    ),
    Fact(
        "vllm",
        LOADS,
        RAN,
        _COMPRESSED,
        ("int4_awq",),
        (*_RAN_ON_A_GPU, "Gemma 3", "StarCoder"),
        ("0.24",),
        kv_cache=False,
    ),
    Fact("vllm", LOADS, RAN, _COMPRESSED, ("w4a8_awq",), ("Llama",), ("0.24",), kv_cache=False, note=_W4A8_NOTE),
    Fact(
        "vllm",
        LOADS,
        RAN,
        _COMPRESSED,
        ("nvfp4",),
        (*_RAN_ON_A_GPU, *_EXPERTS),
        ("0.24",),
        kv_cache=False,
    ),
    Fact("vllm", LOADS, RAN, _COMPRESSED, ("fp8_dynamic",), ("Llama", *_EXPERTS), ("0.24",)),
    Fact(
        "vllm",
        LOADS,
        RAN,
        _COMPRESSED,
        ("int8_dynamic",),
        (*_RAN_ON_A_GPU, "Gemma 3", *_EXPERTS),
        ("0.24",),
    ),
    Fact("vllm", LOADS, RAN, _HF, (NO_QUANT,), _ASKED, ("0.32",)),
    Fact("vllm", LOADS, RAN, _COMPRESSED, (NO_QUANT,), _LLAMAS, ("0.32",)),
    Fact("vllm", LOADS, RAN, _COMPRESSED, ("int8_sq",), _LLAMAS, ("0.32",), kv_cache=False),
    Fact("vllm", LOADS, EMULATED, _COMPRESSED, ("int8_sq",), (*_DENSE, *_HYBRIDS), ("0.32",), kv_cache=False),
    Fact("vllm", LOADS, RAN, _COMPRESSED, ("int4_awq",), _ASKED, ("0.32",), kv_cache=False),
    Fact("vllm", LOADS, EMULATED, _COMPRESSED, ("int8_dynamic",), (*_EXPERTS, "StarCoder", "StarCoder 2"), ("0.32",)),
    Fact("vllm", LOADS, RAN, _COMPRESSED, ("int8_dynamic",), (*_SERVED_DENSE, *_HYBRIDS), ("0.32",)),
    Fact("vllm", LOADS, EMULATED, None, ("fp8",), _ASKED, ("0.32",)),
    Fact("vllm", LOADS, EMULATED, None, ("nvfp4",), _ASKED, ("0.32",), kv_cache=False),
    Fact("vllm", LOADS, EMULATED, _HF, ("fp8_dynamic",), _LLAMAS, ("0.32",)),
    Fact("vllm", LOADS, EMULATED, _COMPRESSED, ("fp8_dynamic",), (*_LLAMAS, *_EXPERTS), ("0.32",)),
    Fact("vllm", LOADS, EMULATED, None, ("w4a16_nvfp4",), (*_LLAMAS, *_EXPERTS), ("0.32",)),
    Fact("vllm", LOADS, EMULATED, _COMPRESSED, ("w4a8_awq",), _LLAMAS, ("0.32",), kv_cache=False, note=_W4A8_NOTE),
    Fact("vllm", LOADS, EMULATED, None, (AUTO,), (*_LLAMAS, *_EXPERTS, *_HYBRIDS), ("0.32",), kv_cache=False),
    Fact("vllm", LOADS, READ, _COMPRESSED, ("w4a8_awq",), _SERVED_DENSE, note=_W4A8_NOTE),
    Fact("vllm", LOADS, READ, None, _EVERY, _SERVED_FAMILIES),
    Fact("vllm", REFUSED, READ, _COMPRESSED, (AUTO,), ("Mixtral",), ("0.24",), note=_MIXTRAL_NOTE),
    Fact("vllm", LOADS, READ, None, (AUTO,), (*_SERVED_FAMILIES, *_HYBRIDS)),
    Fact("vllm", LOADS, READ, _COMPRESSED, ("w4a8_awq",), _HYBRIDS, note=_W4A8_NOTE),
    Fact("vllm", LOADS, READ, None, _EVERY, _HYBRIDS),
    Fact(
        "vllm",
        LOADS,
        READ,
        _HF,
        families=(*_SERVED_FAMILIES, *_HYBRIDS),
        versions=("0.32",),
        kv_cache=True,
        cache_format=NVFP4_CACHE,
        note=_NVFP4_CACHE_NOTE,
    ),
    Fact(
        "vllm",
        LOADS,
        READ,
        _HF,
        families=(*_SERVED_FAMILIES, *_HYBRIDS),
        versions=("0.24",),
        kv_cache=True,
        cache_format=NVFP4_CACHE,
        note=_NVFP4_CACHE_NOTE_24,
    ),
)
_TENSORRT_LLM = (
    Fact("tensorrt_llm", REFUSED, READ, families=("Gemma", "StarCoder"), note="it has no class for such models"),
    Fact(
        "tensorrt_llm",
        LOADS,
        READ,
        _HF,
        (NO_QUANT, "fp8", "nvfp4", "int4_awq", "w4a8_awq", "fp8_dynamic"),
        _KNOWN_FAMILIES,
    ),
    Fact("tensorrt_llm", LOADS, READ, _COMPRESSED, (NO_QUANT, "fp8_dynamic", "nvfp4"), _KNOWN_FAMILIES),
    Fact(
        "tensorrt_llm",
        REFUSED,
        READ,
        _COMPRESSED,
        ("fp8", "int4_awq", "w4a8_awq"),
        note="its reader of this format takes FP8 with dynamic activations and NVFP4; use export_format=hf",
    ),
    Fact(
        "tensorrt_llm",
        REFUSED,
        READ,
        _COMPRESSED,
        ("int8_sq", "int8_dynamic", "w4a16_nvfp4"),
        note="its reader of this format takes FP8 with dynamic activations and NVFP4",
    ),
)
_ENGINES = (Fact("tensorrt_llm_engines", LOADS, READ, ("trtllm",), _EVERY),)
_SGLANG = (
    Fact(
        "sglang",
        REFUSED,
        READ,
        _HF,
        (*_AWQ, "fp8_dynamic"),
        note=f"its reader of ModelOpt's format takes fp8 and nvfp4; {_USE_COMPRESSED}",
    ),
    Fact("sglang", REFUSED, READ, _COMPRESSED, ("w4a8_awq",), note="it has INT4 with FP8 inputs for experts alone"),
    _experts_in_int4("sglang"),
    Fact("sglang", LOADS, READ, _HF, (NO_QUANT, "fp8", "nvfp4"), _SGLANGS),
    Fact(
        "sglang",
        LOADS,
        READ,
        _COMPRESSED,
        (NO_QUANT, "fp8", "int8_sq", "int4_awq", "nvfp4", "fp8_dynamic", "int8_dynamic", "w4a16_nvfp4"),
        _SGLANGS,
    ),
)
_NEEDS_LIBRARY = "needs the compressed-tensors library"
_TRANSFORMERS = (
    _experts_in_int4("transformers"),
    Fact("transformers", LOADS, RAN, None, (NO_QUANT,), _KNOWN_FAMILIES),
    Fact("transformers", LOADS, RAN, None, (NO_QUANT,), _NEWER_FAMILIES, ("4.57",)),
    Fact(
        "transformers",
        REFUSED,
        RAN,
        _HF,
        ("fp8",),
        versions=("5.19",),
        note=f"not for transformers: it loads with a warning, and answers garbage; {_USE_COMPRESSED}",
    ),
    Fact("transformers", REFUSED, RAN, _HF, ("fp8",), note=f"not for transformers: it fails; {_USE_COMPRESSED}"),
    Fact("transformers", REFUSED, READ, _HF, note=f"not for transformers; {_USE_COMPRESSED}"),
    Fact(
        "transformers",
        REFUSED,
        RAN,
        _COMPRESSED,
        ("int4_awq",),
        ("StarCoder",),
        ("5.19",),
        note="it fails on this model's layers; use transformers 4.57",
    ),
    Fact(
        "transformers",
        LOADS,
        RAN,
        _COMPRESSED,
        ("fp8",),
        ("Mixtral",),
        ("5.19",),
        note="with a warning: it has no use for the scales of the experts' inputs",
    ),
    Fact(
        "transformers",
        LOADS,
        RAN,
        _COMPRESSED,
        ("fp8", "int8_sq", "int4_awq"),
        _KNOWN_FAMILIES,
        note=_NEEDS_LIBRARY,
    ),
    Fact(
        "transformers",
        LOADS,
        RAN,
        _COMPRESSED,
        ("fp8", "int8_sq", "int4_awq"),
        _NEWER_FAMILIES,
        ("4.57",),
        note=_NEEDS_LIBRARY,
    ),
    Fact("transformers", LOADS, RAN, _COMPRESSED, (*_EVERY, AUTO), ("Llama",), ("4.57",), note=_NEEDS_LIBRARY),
    Fact("transformers", LOADS, READ, _COMPRESSED, _EVERY, _KNOWN_FAMILIES, ("4.57",), note=_NEEDS_LIBRARY),
)
FACTS: Sequence[Fact] = (*_VLLM, *_TENSORRT_LLM, *_ENGINES, *_SGLANG, *_TRANSFORMERS)
"""All that is known; the first fact that fits an export answers."""


def answer(server: Server, version: str, export: Export) -> Answer:
    """Returns what is known of one version of a server about an export.

    Args:
        server: The server.
        version: One of its versions.
        export: The export.
    """
    if export.format not in server.formats:
        readable = " or ".join(server.formats)
        return Answer(server, version, REFUSED, READ, f"it reads export_format={readable}")
    for fact in FACTS:
        if fact.server == server.name and _fits(fact, version, export):
            notes = [fact.note]
            if fact.outcome == LOADS and export.short_context is not None:
                notes.append(server.long_rope.format(export.short_context))
            return Answer(server, version, fact.outcome, fact.known_by, "; ".join(filter(None, notes)))
    return Answer(server, version, UNKNOWN)


def _fits(fact: Fact, version: str, export: Export) -> bool:
    wanted = (
        (fact.formats, export.format),
        (fact.algorithms, export.algorithm),
        (fact.families, export.family),
        (fact.versions, version),
    )
    fits = all(values is None or value in values for values, value in wanted)
    fits = fits and fact.kv_cache in (None, export.kv_cache)
    if export.kv_cache and export.cache_format != FP8_CACHE and fact.outcome != REFUSED:
        fits = fits and fact.cache_format == export.cache_format
    else:
        fits = fits and fact.cache_format in (None, export.cache_format)
    return fits and fact.tied_embeddings in (None, export.tied_embeddings)


def answers(export: Export) -> Iterator[Answer]:
    """Yields what is known about an export of all versions of the servers that read its format."""
    for server in SERVERS.values():
        if export.format in server.formats:
            yield from (answer(server, version, export) for version in server.versions)


def refusals(export: Export, servers: Sequence[str]) -> list[str]:
    """Says of each server that refuses an export, in a line, the newest version that does.

    Args:
        export: The export.
        servers: Names of the servers to ask.
    """
    asked = [
        [answer(SERVERS[name], version, export) for version in reversed(SERVERS[name].versions)] for name in servers
    ]
    found = [next((one for one in its if one.outcome == REFUSED), None) for its in asked]
    return [
        f"{one.label} does not load algorithm={export.algorithm} in export_format={export.format}: {one.note}"
        for one in found
        if one is not None
    ]


def commands(export: Export, directory: str) -> dict[str, tuple[str, ...]]:
    """Returns the shell commands that serve an export, by the label of each server that loads it in its newest version.

    Args:
        export: The export.
        directory: Its directory, as a shell reads it.
    """
    newest = {found.server.name: found for found in answers(export)}
    return {
        found.label: tuple(command.format(directory=directory) for command in found.server.commands)
        for found in newest.values()
        if found.outcome == LOADS and found.server.commands
    }
