# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The contract of bits: every export of tiny models, as checksums, before and after a change of the code.

    python -m tests.bits record FILE     exports every cell and writes the checksums of its files
    python -m tests.bits compare FILE    exports them again and prints what differs; exit status 1 if anything does

A cell is one job: a family of tests/families.py, an algorithm, a parallelism, and all formats that can hold the result.
Left out is what may differ from run to run: the report and the manifest. A checkpoint of format "nemo" is compared by
tensors, since torch writes a random id into its files. Files name their checkpoint by its path, so both commands work
in one directory, whose models are made once; several runs may do so at a time. Bits also depend on the processor and on
the versions of the packages: compare on the machine that has recorded.
"""

import argparse
import difflib
import fcntl
import hashlib
import json
import os
import runpy
import shutil
import signal
import struct
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nemo_ptq
from tests.families import FAMILIES, GPT_VARIANTS, make_nemo
from tests.matrix import MIXTURES
from tests.ranks import run_ranks

DIRECTORY = Path("build/bits")
MODELS = (*FAMILIES, *GPT_VARIANTS)
ALGORITHMS = ("no_quant", "fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4")
FORMATS = ("trtllm", "hf", "compressed_tensors", "nemo")

# Given in full, so that another default is no other job.
CALIBRATION: Mapping[str, Any] = {
    "awq_block_size": 128,
    "sq_alpha": 0.5,
    "calibration_dataset_size": 8,
    "calibration_batch_size": 4,
    "calibration_seq_len": 32,
    "evaluation_dataset_size": 0,
}
IMPORT = "import-hf"
"""What a cell has as its algorithm that makes a NeMo checkpoint of a Hugging Face directory, and nothing else."""
CUSTOM = "custom"
CUSTOM_CONFIG: Mapping[str, Any] = {  # FP8, but for one layer's output projection
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": [4, 3], "axis": None}},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": [4, 3], "axis": None}},
        {"quantizer_name": "*output_layer*", "enable": False},
        {"quantizer_name": "*layers.1.self_attention.linear_proj*", "enable": False},
    ],
    "algorithm": "max",
}
TEXTS = 16
# Names a run: several at once share the models, and nothing else.
RUN = "NEMO_PTQ_BITS_RUN"
TIMEOUT = 900.0
# Of text files up to this size the record holds the content, so that a difference can be shown.
LONGEST_TEXT = 32_000
VARYING = ("ptq/manifest.json", "ptq/README.md", "ptq/report.json", "ptq/report.html", "ptq/report.png")


@dataclass(frozen=True)
class Cell:
    """One job, and where it starts from.

    Attributes:
        name: Unique.
        model: Key of tests/families.py.
        algorithm: How to quantize.
        formats: What to export to.
        kv_cache: Whether the KV cache is quantized.
        source: "nemo" or "hf": the model's checkpoint; or the name of another cell, whose calibration is exported
            again or, with `resumes`, whose checkpoint of format "nemo" is exported.
        resumes: Whether `source` is taken as a checkpoint.
        ranks: Processes of the job.
        task: Arguments of the task that are not the default.
        quantization: Settings that differ from :data:`CALIBRATION`.
        export: Settings of the export that are not the default.
    """

    name: str
    model: str
    algorithm: str
    formats: tuple[str, ...]
    kv_cache: bool = False
    source: str = "nemo"
    resumes: bool = False
    ranks: int = 1
    task: Mapping[str, Any] = field(default_factory=dict)
    quantization: Mapping[str, Any] = field(default_factory=dict)
    export: Mapping[str, Any] = field(default_factory=dict)


def formats_of(model: str, algorithm: str, kv_cache: bool = False) -> tuple[str, ...]:
    """The formats that can hold a model quantized so; the others refuse it."""
    if model in MIXTURES:
        return {"no_quant": FORMATS, "fp8": FORMATS, "nvfp4": ("hf",)}.get(algorithm, ())
    refused = {"int8_sq": {"hf"}, "w4a8_awq": {"compressed_tensors"}, "nvfp4": {"compressed_tensors"}}
    left_out = set(refused.get(algorithm, ()))
    if model in GPT_VARIANTS or (model == "starcoder" and kv_cache):
        left_out |= {"hf", "compressed_tensors"}
    return tuple(name for name in FORMATS if name not in left_out)


def cells() -> list[Cell]:
    """All cells; one that starts from another comes after it."""
    found = [
        Cell(f"{model}/{algorithm}/{'kv' if kv_cache else 'plain'}", model, algorithm, formats, kv_cache)
        for model in MODELS
        for algorithm in ALGORITHMS
        for kv_cache in (False, True)
        if (formats := formats_of(model, algorithm, kv_cache)) and not (kv_cache and algorithm == "no_quant")
    ]
    found += [
        Cell(f"{model}/{algorithm}/from-hf", model, algorithm, formats_of(model, algorithm), source="hf")
        for model, algorithm in (
            ("llama31", "fp8"),
            ("llama32", "int4_awq"),
            ("mistral", "w4a8_awq"),
            ("mixtral", "fp8"),
            ("gemma", "int8_sq"),
            ("starcoder", "int4_awq"),
            ("starcoder2", "nvfp4"),
            ("nemotron", "no_quant"),
        )
    ]
    found += [
        Cell(
            f"{model}/{algorithm}/inference-{size}", model, algorithm, ("trtllm",), export={f"inference_{size[:2]}": 2}
        )
        for model, algorithm in (
            ("llama2", "fp8"),
            ("llama32", "int4_awq"),
            ("gemma", "w4a8_awq"),
            ("mixtral", "fp8"),
            ("starcoder", "int8_sq"),
            ("starcoder2", "nvfp4"),
            ("gpt", "no_quant"),
        )
        for size in ("tp2", "pp2")
    ]
    found += [
        Cell(f"{model}/{algorithm}/{name}", model, algorithm, formats_of(model, algorithm), **changes)
        for model, algorithm, name, changes in (
            ("llama2", "int4_awq", "block-64", {"quantization": {"awq_block_size": 64}}),
            ("mistral", "int8_sq", "alpha-0.8", {"quantization": {"sq_alpha": 0.8}}),
            ("llama3", "fp8", "evaluated", {"quantization": {"evaluation_dataset_size": 4}}),
        )
    ]
    found += [
        Cell(f"{model}/{algorithm}/fp16", model, algorithm, holders, export={"dtype": "fp16"})
        for model, algorithm in (("llama31", "fp8"), ("gemma", "int4_awq"), ("nemotron", "no_quant"))
        if (holders := tuple(name for name in formats_of(model, algorithm) if name != "nemo"))
    ]
    for model, algorithm in (
        ("llama31", "fp8"),
        ("gemma", "int8_sq"),
        ("llama32", "int4_awq"),
        ("nemotron", "w4a8_awq"),
        ("starcoder2", "nvfp4"),
        ("mixtral", "fp8"),
        ("gpt", "int4_awq"),
    ):
        start = f"{model}/{algorithm}/plain"
        formats = formats_of(model, algorithm)
        again = partial(Cell, model=model, algorithm=algorithm, source=start)
        found += [
            again(f"{model}/{algorithm}/again", formats=tuple(name for name in formats if name != "nemo")),
            again(f"{model}/{algorithm}/again-nemo", formats=("nemo",)),
            again(f"{model}/{algorithm}/again-tp2", formats=("trtllm",), export={"inference_tp": 2}),
            again(
                f"{model}/{algorithm}/resumed",
                formats=tuple(name for name in formats if name != "compressed_tensors"),
                resumes=True,
            ),
        ]
    found += [
        Cell(f"{model}/{algorithm}/{name}", model, algorithm, formats_of(model, algorithm), ranks=2, task=task)
        for model, algorithm, name, task in (
            ("llama31", "fp8", "calibration-tp2", {"calibration_tp": 2}),
            ("llama32", "int4_awq", "calibration-tp2", {"calibration_tp": 2}),
            ("gemma", "int8_sq", "calibration-pp2", {"calibration_pp": 2}),
            ("gpt", "w4a8_awq", "calibration-pp2", {"calibration_pp": 2}),
            ("mixtral", "fp8", "calibration-ep2", {"calibration_ep": 2}),
            ("mixtral", "fp8", "calibration-tp2", {"calibration_tp": 2}),
            ("llama31", "fp8", "data-parallel", {}),
            ("starcoder2", "int4_awq", "data-parallel", {}),
        )
    ]
    found += [Cell(f"{model}/{CUSTOM}/plain", model, CUSTOM, formats_of(model, "fp8")) for model in ("llama2", "gpt")]
    found += [Cell(f"{model}/{IMPORT}", model, IMPORT, ("nemo",), source="hf") for model in FAMILIES]
    return found


def export_cells(chosen: Sequence[Cell], directory: Path) -> dict[str, dict[str, Any]]:
    """Runs cells one after the other on this rank.

    Args:
        chosen: Cells of one model and of one number of ranks; each comes after the one that it starts from.
        directory: The working directory.

    Returns:
        By cell: "files", SHA-256 by file, and "texts", what stands in short ones, by SHA-256; or "error".
    """
    _draw_nothing()
    rank = int(os.environ["RANK"])
    log = directory / "logs" / f"{os.environ[RUN]}-{chosen[0].model}-{chosen[0].ranks}-{rank}.txt"
    results = {}
    sources = {cell.source for cell in chosen}
    with log.open("a") as stream, redirect_stdout(stream), redirect_stderr(stream):
        for cell in chosen:
            start = time.perf_counter()
            print(f"--- {cell.name}", flush=True)
            try:
                output = _export(cell, directory)
                results[cell.name] = _digests(output) if rank == 0 else {}
            except Exception as error:
                traceback.print_exc()
                results[cell.name] = {"error": f"{type(error).__name__}: {error}"}
                if cell.ranks > 1:  # the other ranks wait for this one
                    raise
            if rank == 0 and cell.name not in sources:
                shutil.rmtree(_output(cell.name, directory), ignore_errors=True)
            print(f"--- {cell.name}: {time.perf_counter() - start:.1f} s", flush=True)
        for source in sources - {"nemo", "hf"}:
            if rank == 0:
                shutil.rmtree(_output(source, directory), ignore_errors=True)
    return results


def _draw_nothing() -> None:
    """Leaves the report's drawings empty in this process: they are not compared, and take most of a tiny job's time."""
    from matplotlib.figure import Figure

    def save(figure: Any, file: Any, *, format: str, **_: Any) -> None:
        file.write("<svg></svg>" if format == "svg" else b"")

    Figure.savefig = save


def _output(name: str, directory: Path) -> Path:
    return _exports(directory) / name.replace("/", "-")


def _exports(directory: Path) -> Path:
    """Where this run's exports are; the ranks know their run by its variable."""
    return directory / f"exports-{os.environ[RUN]}"


def _export(cell: Cell, directory: Path) -> Path:
    from nemo_ptq import ExportConfig, QuantizationConfig, ptq

    output = _output(cell.name, directory)
    checkpoint = directory / "models" / cell.model
    hugging_face = checkpoint.with_name(f"{checkpoint.name}.hf")
    if cell.algorithm == IMPORT:
        output.mkdir()
        _run_command(IMPORT, str(hugging_face), str(output / "nemo"))
        return output
    task: dict[str, Any] = dict(cell.task)
    if cell.source in ("nemo", "hf"):
        task["nemo_checkpoint"] = str(hugging_face if cell.source == "hf" else checkpoint)
    elif cell.resumes:
        task["nemo_checkpoint"] = str(_output(cell.source, directory) / "nemo")
    else:
        task["calibration_state"] = str(_output(cell.source, directory) / "trtllm")
    if cell.source in ("nemo", "hf"):
        task["quantization_config"] = QuantizationConfig(
            algorithm=str(directory / "custom.json") if cell.algorithm == CUSTOM else cell.algorithm,
            quality="fast",
            enable_kv_cache=cell.kv_cache,
            calibration_dataset=str(directory / "texts.txt"),
            **{**CALIBRATION, **cell.quantization},
        )
    export = ExportConfig(path=str(output), export_format=list(cell.formats), **cell.export)
    ptq(export_config=export, **task)
    return output


def _run_command(*words: str) -> None:
    """Runs the `nemo-ptq` command in this process."""
    with patch.object(sys, "argv", ["nemo-ptq", *words]):
        try:
            runpy.run_module("nemo_ptq", run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"nemo-ptq {words[0]} ended with status {ended.code}") from ended


def _digests(output: Path) -> dict[str, Any]:
    files: dict[str, str] = {}
    texts: dict[str, str] = {}
    for file in sorted(path for path in output.rglob("*") if path.is_file()):
        name = file.relative_to(output).as_posix()
        directory, _, within = name.partition("/")
        if within in VARYING or (directory == "nemo" and within.startswith("weights/")):
            continue
        content = file.read_bytes()
        files[name] = _sha256(content)
        if file.suffix == ".safetensors":
            header, tensors = _parts_of_safetensors(content)
            files[f"{name} (tensors)"] = _sha256(tensors)
            texts[files[name]] = header
        elif len(content) <= LONGEST_TEXT:
            texts[files[name]] = content.decode("utf-8", errors="replace")
    for weights in sorted(output.glob("nemo/weights/**/.metadata")):
        for key, digest in _digests_of_torch_dist(weights.parent):
            files[f"{weights.parent.relative_to(output).as_posix()}: {key}"] = digest
    return {"files": files, "texts": texts}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _parts_of_safetensors(content: bytes) -> tuple[str, bytes]:
    """The header as text, with what is JSON in its metadata laid open; and all names, shapes, dtypes and values."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    shown = {key: json.loads(value) if value.startswith(("{", "[")) else value for key, value in metadata.items()}
    tensors = [json.dumps(entry).encode() for entry in sorted(header.items())]
    return json.dumps({"__metadata__": shown, **header}, indent=1), b"\n".join([*tensors, content[8 + length :]])


def _digests_of_torch_dist(directory: Path) -> Iterator[tuple[str, str]]:
    """Reads a distributed checkpoint with torch alone. Yields each entry's key and digest."""
    import torch
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    class _RawBytes(dcp.DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: Any) -> None:
            self.state_dict[read_item.dest_index.fqn] = value.getvalue()

    reader = dcp.FileSystemReader(directory)
    state: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else b""
        for key, entry in reader.read_metadata().state_dict_metadata.items()
    }
    dcp.load(state, storage_reader=reader, planner=_RawBytes(flatten_state_dict=False), no_dist=True)
    for key, value in sorted(state.items()):
        if isinstance(value, torch.Tensor):
            about = f"{value.dtype} {tuple(value.shape)} ".encode()
            yield key, _sha256(about + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            yield key, _sha256(value)


def run(chosen: Sequence[Cell], directory: Path, processes: int) -> dict[str, Any]:
    """Exports cells, `processes` models at a time.

    Returns:
        What FILE holds: "directory", "cells", and "texts" by SHA-256.
    """
    (directory / "logs").mkdir(parents=True, exist_ok=True)
    with _alone_in(directory):  # what is there is what another run reads
        _write_once(directory / "texts.txt", "".join(f"{text}\n" for text in _texts()))
        _write_once(directory / "custom.json", json.dumps(CUSTOM_CONFIG))
    _exports(directory).mkdir()
    groups: dict[tuple[str, ...], list[Cell]] = defaultdict(list)
    for cell in chosen:
        groups[(cell.model,) if cell.ranks == 1 else (cell.model, cell.name)].append(cell)

    def export(group: list[Cell]) -> dict[str, dict[str, Any]]:
        start = time.perf_counter()
        try:
            found = run_ranks(export_cells, group[0].ranks, group, directory, timeout=TIMEOUT)[0]
        except AssertionError as error:  # a rank failed or died
            found = {cell.name: {"error": str(error)} for cell in group}
        failed = [name for name, result in found.items() if "error" in result]
        where = group[0].name if group[0].ranks > 1 else group[0].model
        problem = f", {len(failed)} failed" if failed else ""
        print(f"{where}: {len(group)} cells{problem}, {time.perf_counter() - start:.0f} s", flush=True)
        return found

    results: dict[str, dict[str, Any]] = {}
    try:
        with ThreadPoolExecutor(processes) as pool:
            with _alone_in(directory):
                list(pool.map(partial(_make_model, directory / "models"), dict.fromkeys(cell.model for cell in chosen)))
            for found in pool.map(export, groups.values()):
                results |= found
    finally:
        shutil.rmtree(_exports(directory))
    texts: dict[str, str] = {}
    for result in results.values():
        texts |= result.pop("texts", {})
    return {"directory": str(directory), "cells": results, "texts": texts}


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Keeps other runs waiting."""
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _texts() -> Iterator[str]:
    line = "the quick brown fox jumps over a lazy dog while calibration finds the scales of every single layer"
    words = line.split(" ")
    for number in range(TEXTS):
        start, step = number % len(words), 1 + number % 5
        yield " ".join(words[(start + step * place) % len(words)] for place in range(12 + number % 4))


def _write_once(file: Path, text: str) -> None:
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


def _make_model(directory: Path, name: str) -> None:
    checkpoint = directory / name
    if not (checkpoint / "context" / "model.yaml").is_file():  # what is written last
        for path in (checkpoint, checkpoint.with_name(f"{name}.hf"), checkpoint.with_name(f"{name}.tokenizer")):
            shutil.rmtree(path, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
        run_ranks(make_nemo, 1, name, checkpoint, timeout=TIMEOUT)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[str]]:
    """What has changed, and where: those places together that have changed alike."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, new in after["cells"].items():
        old = before["cells"].get(name)
        if old is None:
            found["a cell that was not recorded"].append(name)
        elif "error" in old or "error" in new:
            if old.get("error") != new.get("error"):
                found[f"failed: {new.get('error', 'no longer')}"].append(name)
        else:
            for file in sorted(old["files"].keys() | new["files"].keys()):
                was, now = old["files"].get(file), new["files"].get(file)
                if was != now:
                    found[_change(before["texts"].get(was), after["texts"].get(now), was, now)].append(
                        f"{name}: {file}"
                    )
    return found


def _change(old: str | None, new: str | None, was: str | None, now: str | None) -> str:
    if was is None or now is None:
        return "a file or tensor that is new" if was is None else "a file or tensor that is missing"
    if old is None or new is None or old == new:
        return "other content"
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0)
    return "other text:\n" + "\n".join(f"    {line}" for line in list(lines)[2:] if not line.startswith("@@"))


def _record(arguments: argparse.Namespace, chosen: Sequence[Cell]) -> int:
    recorded = run(chosen, arguments.directory.absolute(), arguments.processes)
    arguments.file.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    failed = {name: result["error"] for name, result in recorded["cells"].items() if "error" in result}
    for name, error in failed.items():
        print(f"{name} failed: {error}")
    print(f"{len(recorded['cells']) - len(failed)} of {len(recorded['cells'])} cells are in {arguments.file}")
    return 1 if failed else 0


def _compare(arguments: argparse.Namespace, chosen: Sequence[Cell]) -> int:
    before = json.loads(arguments.file.read_text(encoding="utf-8"))
    after = run(chosen, Path(before["directory"]), arguments.processes)
    if arguments.keep:
        arguments.keep.write_text(json.dumps(after, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    found = differences(before, after)
    for change, places in found.items():
        shown = places if arguments.all else places[:5]
        print(
            f"\n{change}\n  in {len(places)}: " + "\n    ".join(shown) + ("" if len(shown) == len(places) else " ...")
        )
    same = sum(before["cells"].get(name) == result for name, result in after["cells"].items())
    print(f"\n{same} of {len(after['cells'])} cells are the same")
    return 1 if found else 0


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        "python -m tests.bits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="record|compare")
    actions: Mapping[str, Callable[[argparse.Namespace, Sequence[Cell]], int]] = {
        "record": _record,
        "compare": _compare,
    }
    for name, action in actions.items():
        command = commands.add_parser(name)
        command.set_defaults(action=action)
        command.add_argument("file", type=Path, metavar="FILE", help="the checksums, in JSON")
        command.add_argument("--only", default="*", metavar="PATTERN", help="cells whose name matches, e.g. 'llama2/*'")
        command.add_argument("--processes", type=int, default=1, help="models at a time (1)")
        if name == "record":
            command.add_argument("--directory", type=Path, default=DIRECTORY, help=f"where to work ({DIRECTORY})")
        else:
            command.add_argument("--all", action="store_true", help="name every place of a difference")
            command.add_argument("--keep", type=Path, metavar="FILE", help="write the new checksums as well")
    arguments = parser.parse_args(words)
    everything = cells()
    chosen = [cell for cell in everything if fnmatch(cell.name, arguments.only)]
    starts = {cell.source for cell in chosen}
    chosen = [cell for cell in everything if cell in chosen or cell.name in starts]
    # Before torch is imported, here or in the processes that export. Sums depend on the number of threads.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"NEMO_PTQ_RECORD": "0", "CUDA_VISIBLE_DEVICES": "", RUN: str(os.getpid())}
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # which ends the ranks as well
    print(f"{len(chosen)} cells, by {Path(nemo_ptq.__file__).parent}", flush=True)
    return arguments.action(arguments, chosen)


if __name__ == "__main__":
    from tests.bits import main as run_main  # the ranks find the functions by this name

    sys.exit(run_main())
