# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""docs/servers.md, made from the table of servers: `make servers`, or `python -m tests.servers`."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path

from nemo_ptq.config import NO_QUANT, NVFP4_CACHE
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.export.servers import LOADS, SERVERS, UNKNOWN, Answer, Export, Server, answer, answers
from nemo_ptq.models.registry import Family, families
from nemo_ptq.quantization.algorithms import SELECTABLE

DOCUMENT = Path(__file__).parent.parent / "docs" / "servers.md"

_INTRODUCTION = """# Servers

Made by `make servers` from `nemo_ptq/export/servers.py`; do not edit. Which server loads which [export](formats.md),
from which of its versions, and how that is known:

- **run**: the server has loaded such an export, and answers as this project's reader does;
- **emulated**: the same on a machine without its GPU kernels, in whose place torch computed;
- **source**: its source says so, nobody has tried;
- **?**: not known.

`export_config.server=vllm` refuses what the newest version is not known to load; without it, a job warns of each
server that its format is made for and that refuses it, by the newest version that does. `nemo-ptq plan` shows these
lines for one job, and the model card has the commands.
[How vLLM was run](serving.md).
"""
_SHORT = {"run": "run", "loaded by it, its GPU kernels replaced by torch": "emulated", "read in its source": "source"}


def _known_families(format: str, algorithm: str) -> list[Family]:
    """The families that go into a format with an algorithm."""
    record = FORMATS[format]
    known = [family for family in families() if family.refused is None]
    if record.is_hugging_face:
        known = [family for family in known if family.hugging_face is not None]
    if not SELECTABLE[algorithm].chooses and algorithm not in (NO_QUANT, *record.experts):
        known = [family for family in known if not _has_experts(family)]
    return known


def _has_experts(family: Family) -> bool:
    its = family.hugging_face
    return its is not None and any("{expert}" in name for name in its.module_names())


def cells() -> Iterator[Export]:
    """Yields every export that there can be, but those of ModelOpt configurations."""
    for format, record in FORMATS.items():
        for algorithm in SELECTABLE:
            if algorithm in record.refused or (SELECTABLE[algorithm].chooses and not record.mixes):
                continue
            for family in _known_families(format, algorithm):
                splits = family.hugging_face is None or family.hugging_face.splits_qkv
                caches = SELECTABLE[algorithm].needs_data and (splits or not record.is_hugging_face)
                for kv_cache, tied in product((False, True)[: 1 + caches], _ties(family)):
                    yield Export(format, algorithm, family.name, kv_cache, tied)


def _ties(family: Family) -> tuple[bool, ...]:
    """Whether the output layer of a family's models is the embedding: never, always, or of some."""
    its = family.hugging_face
    if its is None or not its.can_tie:
        return (False,)
    return (True,) if its.fixed.get("tie_word_embeddings") == (True,) else (False, True)


def _said(found: Answer) -> str:
    if found.outcome == UNKNOWN:
        return "?"
    return f"{'yes' if found.outcome == LOADS else '**no**'} ({_SHORT[found.known_by]})"


_CACHED = " with a quantized KV cache"
_TIED = " with tied embeddings"


def _cell(exports: list[Export], server: Server, version: str, notes: list[str]) -> str:
    """What is said of all exports of one format and algorithm: of most of them first, then of the others by family."""
    found: Mapping[tuple[str, str], list[Export]] = defaultdict(list)
    for export in exports:
        its = answer(server, version, export)
        found[_said(its), its.note].append(export)
    texts: list[str] = []
    for (text, note), which in sorted(found.items(), key=lambda item: -len(item[1])):
        if note and note not in notes:
            notes.append(note)
        mark = f" [{notes.index(note) + 1}]" if note else ""
        names = list(dict.fromkeys(export.family for export in which))
        shown = [_name(name, which, exports) for name in names]
        if len(shown) > 1 and {export for export in exports if export.kv_cache} == set(which):
            shown = [_CACHED.strip()]
        texts.append(f"{', '.join(shown)}: {text}{mark}" if texts else f"{text}{mark}")
    return "; ".join(texts)


def _name(family: str, which: list[Export], exports: list[Export]) -> str:
    """A family, and what its exports in a group have that its others do not."""
    its, every = ([export for export in found if export.family == family] for found in (which, exports))
    cached = _CACHED if all(export.kv_cache for export in its) else ""
    tied = all(export.tied_embeddings for export in its) and not all(export.tied_embeddings for export in every)
    return family + (_TIED if tied else "") + cached


def _nvfp4_caches() -> list[str]:
    """What is said of a KV cache in NVFP4, which export format hf alone has."""
    export = Export("hf", "nvfp4", "Llama", kv_cache=True, cache_format=NVFP4_CACHE)
    lines = ["## A KV cache in NVFP4", "", "`kv_cache_qformat=nvfp4` goes into `hf`; the tables above are of FP8.", ""]
    lines += ["| server | | |", "|---|---|---|"]
    return lines + [f"| {found.label} | {_said(found)} | {found.note} |" for found in answers(export)]


def render() -> str:
    """Returns the document."""
    every = list(cells())
    lines = [_INTRODUCTION]
    for server in SERVERS.values():
        notes: list[str] = []
        columns = [(format, version) for format in server.formats for version in server.versions]
        lines += [f"## {server.label}", ""]
        if server.commands:
            lines += [*(f"    {command.format(directory='OUT')}" for command in server.commands), ""]
        lines += ["| | " + " | ".join(f"`{format}`, {version}" for format, version in columns) + " |"]
        lines += ["|" + "---|" * (1 + len(columns))]
        for algorithm in SELECTABLE:
            row = []
            for format, version in columns:
                exports = [export for export in every if (export.format, export.algorithm) == (format, algorithm)]
                row.append(_cell(exports, server, version, notes) if exports else "")
            if any(row):
                lines.append(f"| {algorithm} | " + " | ".join(row) + " |")
        lines += ["", *(f"{index}. {note[0].upper()}{note[1:]}." for index, note in enumerate(notes, 1)), ""]
    lines += _nvfp4_caches()
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(render(), encoding="utf-8")
    print(f"wrote {DOCUMENT}")
