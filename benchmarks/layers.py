# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What a layer of a model larger than memory costs, layer-wise: `python -m benchmarks.layers`.

A few layers of the model's shape stand for all of them: jobs with two numbers of layers differ by nothing but layers,
so the difference gives each step's seconds for one, and the seconds for the whole model. Beside them stands the bare
time of reading the checkpoint's bytes and writing the export's.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.floor import read_files, weight_files, write_files
from benchmarks.job import MODELS, command, make_model


@dataclass(frozen=True)
class Run:
    """One job.

    Attributes:
        seconds: Of each step, and of the command.
        gpu_peak: The most bytes that torch had allocated on the GPU.
        host_peak: The most bytes of main memory that the job added, files in memory's file system left out.
        checkpoint_bytes: What the weights took.
        export_bytes: What they became.
        read: Seconds of reading the checkpoint's files, and nothing else.
        write: Seconds of writing the export's bytes, and nothing else.
    """

    seconds: dict[str, float]
    gpu_peak: int
    host_peak: int
    checkpoint_bytes: int
    export_bytes: int
    read: float
    write: float


def fewer_layers(whole: Path, directory: Path, num_layers: int) -> None:
    """Makes a model of the first layers of another one, whose files it shares."""
    directory.mkdir()
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    kept = {
        name: file
        for name, file in index["weight_map"].items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < num_layers
    }
    for file in whole.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, directory)
    for name in set(kept.values()):
        os.link(whole / name, directory / name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": kept}))
    config = json.loads((whole / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": num_layers}))


def _used_memory() -> int:
    """Bytes of main memory in use, but for files in memory's file system."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    kib = {name.rstrip(":"): int(value) for name, value, *_ in lines}
    return (kib["MemTotal"] - kib["MemAvailable"] - kib["Shmem"]) * 1024


def run(checkpoint: Path, output: Path, algorithm: str, flags: list[str]) -> Run:
    """Runs one job layer-wise, and removes what it has written.

    Raises:
        SystemExit: If the job fails.
    """
    before, peak = _used_memory(), 0
    start = time.perf_counter()
    arguments = ["--layerwise", "--export_format=hf", "--evaluation_dataset_size=8", *flags]
    with subprocess.Popen(command(checkpoint, output, algorithm, 1, arguments)) as job:
        while job.poll() is None:
            peak = max(peak, _used_memory() - before)
            time.sleep(0.1)
    if job.returncode:
        raise SystemExit(job.returncode)
    total = time.perf_counter() - start
    report = json.loads((output / "ptq" / "report.json").read_text(encoding="utf-8"))
    sizes = [file.stat().st_size for file in weight_files(output)]
    shutil.rmtree(output)
    return Run(
        {**{step["name"]: step["seconds"] for step in report["steps"]}, "the command": total},
        max(step["peak_memory_bytes"] for step in report["steps"]),
        peak,
        report["summary"]["checkpoint_bytes"],
        report["summary"]["export_bytes"],
        read_files(weight_files(checkpoint)),
        write_files(sizes, output.parent),
    )


def show(shape: str, algorithm: str, runs: dict[int, Run]) -> None:
    """Prints what was measured, what one layer costs, and what all of them would."""
    few, many = min(runs), max(runs)
    whole = MODELS[shape]["num_hidden_layers"]

    def row(name: str, values: dict[int, float]) -> str:
        layer = (values[many] - values[few]) / (many - few)
        cells = [*(f"{values[count]:.1f}" for count in runs), f"{layer:.2f}"]
        return f"| {name} | {' | '.join(cells)} | {values[many] + (whole - many) * layer:,.0f} |"

    print(f"\n{shape}, {algorithm}\n")
    print(f"| seconds | {' | '.join(f'{count} layers' for count in runs)} | a layer | {whole} layers, computed |")
    print("|---|" + "--:|" * (len(runs) + 2))
    for step in runs[few].seconds:
        print(row(step, {count: run.seconds[step] for count, run in runs.items()}))
    print(row("bare read", {count: run.read for count, run in runs.items()}))
    print(row("bare write", {count: run.write for count, run in runs.items()}))
    print(row("checkpoint, GB", {count: run.checkpoint_bytes / 1e9 for count, run in runs.items()}))
    print(row("export, GB", {count: run.export_bytes / 1e9 for count, run in runs.items()}))
    for name, peaks in (
        ("GPU", {count: run.gpu_peak for count, run in runs.items()}),
        ("main memory", {count: run.host_peak for count, run in runs.items()}),
    ):
        print(
            f"{name}, peak: " + ", ".join(f"{peak / 2**30:.2f} GiB at {count} layers" for count, peak in peaks.items())
        )
    print(flush=True)


def main() -> None:
    """Reads the command line, makes the models, and runs one job for each algorithm and number of layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=MODELS, default="llama31-405b")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 6], help="numbers of layers, two or more")
    parser.add_argument("--algorithms", nargs="+", default=["fp8", "int4_awq"])
    parser.add_argument("--directory", help="where models and exports are written, and removed in the end")
    arguments, flags = parser.parse_known_args()
    if len(set(arguments.layers)) < 2:
        parser.error("--layers needs two numbers or more: their difference tells what one layer costs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        models = {count: Path(scratch, f"layers-{count}") for count in sorted(set(arguments.layers))}
        largest = models[max(models)]
        largest.mkdir()
        make_model(arguments.shape, largest, device, max(models))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for count, model in models.items():
            if model != largest:
                fewer_layers(largest, model, count)
        for algorithm in arguments.algorithms:
            runs: dict[int, Run] = {}
            for count, model in models.items():
                runs[count] = run(model, Path(scratch, algorithm), algorithm, flags)
                print(f"{algorithm}, {count} layers: {runs[count]}", flush=True)
            show(arguments.shape, algorithm, runs)


if __name__ == "__main__":
    main()
