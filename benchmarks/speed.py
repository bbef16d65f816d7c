# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How long calibration and export take, and how much memory: `python -m benchmarks.speed` prints one table.

Each calibration is measured against the bare forward pass over the same data, which none can beat, and against
ModelOpt's own calibration with the same configuration.
"""

import argparse
import gc
import math
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from megatron.core.models.gpt import GPTModel

from benchmarks.models import MODELS, build, random_tokens
from nemo_ptq.calibration.forward import forward_batches
from nemo_ptq.calibration.methods import method_for
from nemo_ptq.calibration.pipeline import Learner, State
from nemo_ptq.calibration.streams import BlockRunner, Stream
from nemo_ptq.checkpoint.blocks import parameters_of, split_into_blocks
from nemo_ptq.checkpoint.parts import is_linear
from nemo_ptq.config import QuantizationConfig
from nemo_ptq.console.quiet import quiet_libraries, quiet_prints
from nemo_ptq.export.calibrated import CalibratedLayers, algorithm_scheme
from nemo_ptq.export.manifest_writer import checksum_of
from nemo_ptq.export.shard_map import on_one_rank
from nemo_ptq.export.stream import LayoutWriter
from nemo_ptq.export.trtllm.trtllm_layout import QnemoLayout
from nemo_ptq.export.trtllm.trtllm_writer import pack_module
from nemo_ptq.modelopt.quantizers import modelopt_config
from nemo_ptq.models.spec import spec_of
from nemo_ptq.parallel.environment import Launch
from nemo_ptq.parallel.process_groups import pick_device, process_groups
from nemo_ptq.parallel.ranks import this_rank
from nemo_ptq.quantization.algorithms import kv_cache_is_quantized

ALGORITHMS = ("fp8", "int8_sq", "int4_awq")
_DECODER = "llama"
_PACKAGES = ("torch", "nvidia-modelopt", "megatron-core", "nemo_toolkit")
_WARM_UP_LAYERS = 1

Step = Callable[[GPTModel], None]


@dataclass(frozen=True)
class Cost:
    """What one step took.

    Attributes:
        seconds: Wall-clock time, with the device at rest before and after.
        peak_bytes: The most device memory in use during the step, the model's included; None on a CPU.
    """

    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Row:
    """One line of the table; every time is in seconds, the median of the runs."""

    step: str
    costs: tuple[Cost, ...]

    @property
    def seconds(self) -> float:
        """Median time."""
        return statistics.median(cost.seconds for cost in self.costs)

    def line(self, forward_seconds: float) -> str:
        """The row in Markdown, with its time as a multiple of the forward pass."""
        times = [cost.seconds for cost in self.costs]
        peak = self.costs[0].peak_bytes
        memory = "" if peak is None else f"{max(cost.peak_bytes or 0 for cost in self.costs) / 2**30:.1f}"
        return (
            f"| {self.step} | {self.seconds:.2f} | {min(times):.2f} to {max(times):.2f} "
            f"| {self.seconds / forward_seconds:.2f} | {memory} |"
        )


def measure(step: Callable[[], None], device: torch.device) -> Cost:
    """Runs a step once, and measures it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return Cost(seconds, torch.cuda.max_memory_allocated() if device.type == "cuda" else None)


def logits_step(batches: Sequence[torch.Tensor]) -> Step:
    """The bare forward pass, to the logits."""

    def run(module: GPTModel) -> None:
        for _ in forward_batches(module, batches):
            pass

    return run


def modelopt_step(algorithm: str, forward: Step) -> Step:
    """ModelOpt's own calibration, with the configuration that ours uses."""
    config = modelopt_config(QuantizationConfig(algorithm=algorithm), _DECODER)

    def run(module: GPTModel) -> None:
        with quiet_prints():
            mtq.quantize(module, config, forward)

    return run


def our_step(algorithm: str, batches: Sequence[torch.Tensor], found: dict[str, State]) -> Step:
    """Our calibration; its state is put into ``found``, by the algorithm's name."""
    quantization = QuantizationConfig(algorithm=algorithm)

    def run(module: GPTModel) -> None:
        device, parallelism = next(module.parameters()).device, this_rank()
        runner, method = BlockRunner(module, device, parallelism, device), method_for(quantization, _DECODER)
        quantizes_kv_cache = kv_cache_is_quantized(quantization, _DECODER)
        learner = Learner(runner, parallelism, Stream(batches), method, quantizes_kv_cache)
        state: dict[str, torch.Tensor] = {}
        *blocks, _ = split_into_blocks(module, module.config.num_layers)
        for block in blocks:
            state |= learner.learn(block, is_head=False)
        found[algorithm] = state

    return run


class ExportTimer:
    """Exports a calibrated model, and times packing and writing apart from the checksum.

    Args:
        config: The NeMo config of the model.
        vocab_size: Rows of its embedding.
        directory: Where the files go.
    """

    def __init__(self, config: object, vocab_size: int, directory: Path) -> None:
        self._config, self._vocab_size, self._directory = config, vocab_size, directory

    def line(self, algorithm: str, state: State, module: GPTModel, device: torch.device) -> str:
        """Exports a calibrated model once, and returns its row in Markdown."""
        blocks = split_into_blocks(module, module.config.num_layers)
        names = [name for block in blocks for name in block.modules]
        scheme = algorithm_scheme(QuantizationConfig(algorithm=algorithm))
        layers = CalibratedLayers(
            parameters_of(blocks), dict(state), {name: scheme for name in names if is_linear(name)}, False
        )
        caches = frozenset(name.partition(".k_bmm_quantizer")[0] for name in state if ".k_bmm_quantizer" in name)
        shard_map = on_one_rank(names, layers.schemes, caches)
        shape = spec_of(self._config, self._vocab_size)
        layout = QnemoLayout(shape, layers.schemes, caches, torch.bfloat16, 1, 1)
        target = Path(tempfile.mkdtemp(dir=self._directory))
        files: list[Path] = []

        def write() -> None:
            pack = partial(pack_module, layers, shape=shape, dtype=torch.bfloat16)
            with LayoutWriter(target, layout, pack, shard_map, 0) as writer:
                for block in range(writer.num_blocks):
                    writer.write(block)
            files.extend(writer.files)

        try:
            writing = measure(write, device)
            hashing = measure(lambda: files.sort(key=checksum_of), device)
            gigabytes = sum(file.stat().st_size for file in files) / 1e9
        finally:
            shutil.rmtree(target)
        return (
            f"| {algorithm} | {gigabytes:.2f} | {writing.seconds:.2f} | {hashing.seconds:.2f} "
            f"| {(writing.seconds + hashing.seconds) / gigabytes:.2f} |"
        )


def _steps(batches: Sequence[torch.Tensor], found: dict[str, State]) -> Iterator[tuple[str, str | None, Step]]:
    """Name, algorithm whose export is timed afterwards, and step."""
    logits = logits_step(batches)
    yield "forward pass", None, logits
    for algorithm in ALGORITHMS:
        yield f"{algorithm}, ModelOpt", None, modelopt_step(algorithm, logits)
        yield f"{algorithm}, nemo_ptq", algorithm, our_step(algorithm, batches, found)


@contextmanager
def _one_process() -> Iterator[torch.device]:
    launch = Launch(0, 1, 0)
    device = pick_device(launch)
    with process_groups(launch, device):
        yield device


def run(arguments: argparse.Namespace) -> None:
    """Measures everything and prints the tables."""
    quiet_libraries()
    with _one_process() as device:
        vocab_size = MODELS[arguments.model]["vocab_size"]
        batches = random_tokens(vocab_size, arguments.samples, arguments.seq_len, arguments.batch_size)
        # One layer and one batch of everything: what is compiled or set up once is not counted.
        for _, _, step in _steps(batches[:1], {}):
            step(build(arguments.model, device, _WARM_UP_LAYERS)[0])

        rows, exports = [], []
        found: dict[str, State] = {}
        for name, exported, step in _steps(batches, found):
            costs = []
            for repetition in range(arguments.repeats):
                module, config = build(arguments.model, device)
                costs.append(measure(lambda step=step, module=module: step(module), device))  # type: ignore[misc]
                if exported and repetition == arguments.repeats - 1:
                    timer = ExportTimer(config, vocab_size, arguments.directory)
                    exports.append(timer.line(exported, found[exported], module, device))
                parameters = sum(parameter.numel() for parameter in module.parameters())
                del module
            rows.append(Row(name, tuple(costs)))
            print(f"{name}: {', '.join(f'{cost.seconds:.2f} s' for cost in costs)}", flush=True)
        _print_tables(arguments, device, parameters, rows, exports)


def _print_tables(
    arguments: argparse.Namespace, device: torch.device, parameters: int, rows: Sequence[Row], exports: Sequence[str]
) -> None:
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    versions = ", ".join(f"{package} {version(package)}" for package in _PACKAGES)
    print(
        f"\n{arguments.model}: {parameters / 1e6:,.0f} million parameters, bfloat16, random weights; "
        f"{arguments.samples} samples x {arguments.seq_len} tokens in "
        f"{math.ceil(arguments.samples / arguments.batch_size)} batches; {arguments.repeats} runs each"
    )
    print(f"{machine}; Python {platform.python_version()}, {versions}\n")
    print("| calibration | seconds, median | range | forward passes | peak memory, GiB |\n|---|--:|--:|--:|--:|")
    print("\n".join(row.line(rows[0].seconds) for row in rows))
    print("\n| export | GB | pack and write, s | BLAKE3, s | s/GB |\n|---|--:|--:|--:|--:|")
    print("\n".join(exports), flush=True)


def main() -> None:
    """Reads the command line and runs."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama3-8b" if on_gpu else "llama-77m")
    parser.add_argument("--samples", type=int, default=512 if on_gpu else 16)
    parser.add_argument("--seq-len", type=int, default=128 if on_gpu else 64)
    parser.add_argument("--batch-size", type=int, default=64 if on_gpu else 4)
    parser.add_argument("--repeats", type=int, default=2 if on_gpu else 3, help="runs of each step")
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()), help="where exports go and are removed"
    )
    run(parser.parse_args())


if __name__ == "__main__":
    main()
