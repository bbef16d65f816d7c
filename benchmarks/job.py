# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The whole job on a model of a real one's size, from command to finished directory: `python -m benchmarks.job`.

The model is a Hugging Face directory, of random weights where a shape is named. Each step's time and peak memory are
those of the job's own report. With --peer, ModelOpt's own path and the bare floor (reading the checkpoint, one forward
pass over the data, writing as many bytes as the export has) stand beside it, each a process of its own.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.floor import read_files, weight_files, write_files
from benchmarks.peer import FORWARD, PRESETS
from benchmarks.side_by_side import Timing, median, table
from nemo_ptq.export.safetensors_stream import SafetensorsStream, TensorSpec

DEMO = Path("build/demo")
_TEXTS = str(DEMO / "text" / "calibration.jsonl")
PEER = "ModelOpt"
MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama31-405b": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama32-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
}
"""By name: the sizes of a Llama."""

_WEIGHT_STD = 0.02
# Layers that are written at a time.
_WRITERS = 3
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def make_model(name: str, directory: Path, device: torch.device, num_layers: int | None = None) -> None:
    """Writes a Hugging Face directory with seeded random weights in bfloat16, one file for each layer.

    Args:
        name: One of :data:`MODELS`.
        directory: Where to.
        device: What draws the numbers.
        num_layers: Layers to make; None makes all.
    """
    sizes = {**MODELS[name], **({} if num_layers is None else {"num_hidden_layers": num_layers})}
    config = LlamaConfig(**sizes, rope_theta=500000.0, max_position_embeddings=8192, torch_dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    for file in _TOKENIZER_FILES:
        if (DEMO / "hf" / file).exists():
            shutil.copy(DEMO / "hf" / file, directory)
    generator = torch.Generator(device).manual_seed(1234)

    def normal(*size: int) -> torch.Tensor:
        weight = torch.empty(size, dtype=torch.bfloat16, device=device)
        return weight.normal_(0.0, _WEIGHT_STD, generator=generator).cpu()

    def gain() -> torch.Tensor:
        return torch.ones(config.hidden_size, dtype=torch.bfloat16)

    hidden, ffn = config.hidden_size, config.intermediate_size
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    outside = {"model.embed_tokens.weight": normal(config.vocab_size, hidden), "model.norm.weight": gain()}
    if not config.tie_word_embeddings:
        outside["lm_head.weight"] = normal(config.vocab_size, hidden)
    writers, writing = ThreadPoolExecutor(_WRITERS), deque[Future[dict[str, str]]]()
    weight_map = _save(directory, "outside", outside)
    for index in range(config.num_hidden_layers):
        layer = {
            "input_layernorm": gain(),
            "post_attention_layernorm": gain(),
            "self_attn.q_proj": normal(heads, hidden),
            "self_attn.k_proj": normal(kv, hidden),
            "self_attn.v_proj": normal(kv, hidden),
            "self_attn.o_proj": normal(hidden, heads),
            "mlp.gate_proj": normal(ffn, hidden),
            "mlp.up_proj": normal(ffn, hidden),
            "mlp.down_proj": normal(hidden, ffn),
        }
        named = {f"model.layers.{index}.{key}.weight": tensor for key, tensor in layer.items()}
        writing.append(writers.submit(_save, directory, f"layer-{index}", named))
        if len(writing) == _WRITERS:  # no more layers in memory than that
            weight_map |= writing.popleft().result()
    for written in writing:
        weight_map |= written.result()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _save(directory: Path, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    file = f"model-{name}.safetensors"
    specs = [TensorSpec(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()]
    with SafetensorsStream(directory / file, specs, {"format": "pt"}) as stream:
        for key, tensor in tensors.items():
            stream.write(key, tensor)
    return dict.fromkeys(tensors, file)


def command(checkpoint: Path, output: Path, algorithm: str, ranks: int, flags: list[str]) -> list[str]:
    """Returns the command of the job."""
    return [
        *([sys.executable] if ranks == 1 else ["torchrun", "--nproc_per_node", str(ranks)]),
        "-m",
        "nemo_ptq.script",
        f"--nemo_checkpoint={checkpoint}",
        f"--calibration_tp={ranks}",
        f"--algorithm={algorithm}",
        "--quality=fast",
        f"--calibration_dataset={_TEXTS}",
        f"--export_path={output}",
        *flags,
    ]


def run(checkpoint: Path, output: Path, algorithm: str, ranks: int, flags: list[str]) -> float:
    """Runs the job; returns the seconds from its command to its end."""
    start = time.perf_counter()
    subprocess.run(command(checkpoint, output, algorithm, ranks, flags), check=True)
    return time.perf_counter() - start


def show(output: Path, seconds: float) -> None:
    """Prints a table of the job's steps."""
    report = json.loads((output / "ptq" / "report.json").read_text(encoding="utf-8"))
    summary = report["summary"]
    print(f"\n{summary['model']}, {summary['parameters']:,} parameters, {summary['algorithm']}\n")
    print("| step | seconds | peak memory, GiB |\n|---|--:|--:|")
    for step in report["steps"]:
        print(f"| {step['name']} | {step['seconds']:.1f} | {step['peak_memory_bytes'] / 2**30:.1f} |")
    print(f"| the command, imports included | {seconds:.1f} | |")
    print(f"\n{summary['checkpoint_bytes'] / 1e9:.2f} GB became {summary['export_bytes'] / 1e9:.2f} GB", flush=True)


@dataclass(frozen=True)
class Data:
    """What is calibrated on, here and by ModelOpt: `samples` texts of a data set, cut at `seq_len` tokens.

    `block_size` is that of INT4's groups.
    """

    dataset: str
    samples: int
    seq_len: int
    batch_size: int
    block_size: int = 128

    @property
    def flags(self) -> list[str]:
        """It as flags of the job."""
        return [
            f"--calibration_dataset={self.dataset}",
            f"--calibration_dataset_size={self.samples}",
            f"--seq_len={self.seq_len}",
            f"--batch_size={self.batch_size}",
            f"--awq_block_size={self.block_size}",
        ]


def time_job(checkpoint: Path, output: Path, algorithm: str, ranks: int, flags: list[str]) -> Timing:
    """Times our job, whose export it leaves in `output`."""
    seconds = run(checkpoint, output, algorithm, ranks, flags)
    report = json.loads((output / "ptq" / "report.json").read_text(encoding="utf-8"))
    return Timing({step["name"]: step["seconds"] for step in report["steps"]}, seconds)


def time_peer(checkpoint: Path, output: Path, algorithm: str, data: Data) -> Timing:
    """Times ModelOpt's path, whose export it leaves in `output`, or the bare forward pass."""
    steps = output.with_suffix(".json")
    arguments = [str(checkpoint), str(output), f"--algorithm={algorithm}", f"--dataset={data.dataset}"]
    sizes = [f"--samples={data.samples}", f"--seq-len={data.seq_len}", f"--batch-size={data.batch_size}"]
    if algorithm == "int4_awq":
        sizes.append(f"--block-size={data.block_size}")
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "benchmarks.peer", *arguments, *sizes, f"--steps={steps}"], check=True)
    seconds = time.perf_counter() - start
    taken = json.loads(steps.read_text(encoding="utf-8"))
    return Timing({step["name"]: step["seconds"] for step in taken}, seconds)


def compare(
    checkpoint: Path, scratch: Path, algorithm: str, ranks: int, data: Data, flags: list[str], repeats: int
) -> dict[str, Timing]:
    """Times our job, ModelOpt's path and the floor in turn.

    Returns:
        The median of each, by its name in the table.
    """
    ours, theirs, floor = [], [], []
    flags = [*data.flags, "--export_format=hf", *flags]
    for _ in range(repeats):
        output, other = scratch / "ours", scratch / "modelopt"
        ours.append(time_job(checkpoint, output, algorithm, ranks, flags))
        theirs.append(time_peer(checkpoint, other, algorithm, data))
        forward = time_peer(checkpoint, other, FORWARD, data).steps["calibrate"]
        sizes = [file.stat().st_size for file in weight_files(output)]
        steps = {
            "load": read_files(weight_files(checkpoint)),
            "calibrate": forward,
            "export": write_files(sizes, scratch),
        }
        floor.append(Timing(steps, sum(steps.values())))
        shutil.rmtree(output)
        shutil.rmtree(other)
    return {"nemo_ptq": median(ours), PEER: median(theirs), "floor": median(floor)}


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="llama32-1b", help=f"a shape ({', '.join(MODELS)}) or a Hugging Face directory"
    )
    parser.add_argument("--algorithms", nargs="+", default=["fp8"])
    parser.add_argument("--ranks", type=int, default=1, help="calibration TP")
    parser.add_argument("--directory", help="where model and exports are written, and removed in the end")
    parser.add_argument("--peer", action="store_true", help="beside ModelOpt's own path and the floor")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each, with --peer")
    parser.add_argument("--dataset", default=_TEXTS)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=128, help="of INT4's groups")
    arguments, flags = parser.parse_known_args()
    if arguments.dataset == _TEXTS and not Path(_TEXTS).exists():
        parser.error(f"{_TEXTS} is not there: make checkpoint writes it, or give another --dataset")
    if arguments.model not in MODELS and not Path(arguments.model, "config.json").is_file():
        parser.error(f"--model {arguments.model} is neither a shape ({', '.join(MODELS)}) nor a Hugging Face directory")
    unknown = sorted(set(arguments.algorithms) - PRESETS.keys())
    if arguments.peer and unknown:
        parser.error(
            f"--algorithms {' '.join(unknown)} is nothing that both export to format hf: "
            f"with --peer take {', '.join(PRESETS)}"
        )
    return arguments, flags


def main() -> None:
    """Reads the command line and runs one job for each algorithm."""
    arguments, flags = _arguments()
    data = Data(arguments.dataset, arguments.samples, arguments.seq_len, arguments.batch_size, arguments.block_size)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        if arguments.model in MODELS:
            checkpoint = Path(directory, "model")
            checkpoint.mkdir()
            make_model(arguments.model, checkpoint, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        else:
            checkpoint = Path(arguments.model)
        for algorithm in arguments.algorithms:
            if arguments.peer:
                columns = compare(
                    checkpoint, Path(directory), algorithm, arguments.ranks, data, flags, arguments.repeats
                )
                print(f"\n{arguments.model}, {algorithm}, {data.samples} samples x {data.seq_len} tokens, ", end="")
                print(f"medians of {arguments.repeats}\n\n{table(columns, PEER)}\n", flush=True)
            else:
                output = Path(directory, algorithm)
                show(output, run(checkpoint, output, algorithm, arguments.ranks, [*data.flags, *flags]))
                shutil.rmtree(output)


if __name__ == "__main__":
    main()
