# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What quantization costs a real model, and what it would cost otherwise: prints one table.

    python -m benchmarks.quality MODEL --calibration FILE --evaluation FILE

MODEL is the directory of a Hugging Face model of the Llama kind; FILE a .jsonl, .json or .txt file. Each algorithm
calibrates with the classes that a job calibrates with, in the model's own data type, and is evaluated in float32 on
what a server computes from the codes and scales that they give. The linear layers of the blocks are quantized, and no
KV cache. Every row reads the same windows, so that the difference to the unquantized model is known better than either.
--peers adds other tools, which calibrate on the same samples and may live in an environment of their own.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.llama import Llama, float32_stream
from benchmarks.other_tools import GROUP_SIZE
from benchmarks.quality_peers import Peers
from nemo_ptq.calibration.methods import method_for
from nemo_ptq.calibration.observing import State
from nemo_ptq.calibration.pipeline import Learner, ScaleLearner
from nemo_ptq.calibration.rounders import rounder_for
from nemo_ptq.calibration.rounding_learner import RoundingLearner
from nemo_ptq.calibration.streams import Stream
from nemo_ptq.calibration.text_files import read_text_file
from nemo_ptq.checkpoint.blocks import Block, parameters_of
from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.checkpoint.parts import is_linear
from nemo_ptq.config import QuantizationConfig
from nemo_ptq.export.calibrated import CalibratedLayers, algorithm_scheme
from nemo_ptq.export.folding import foldable_scale
from nemo_ptq.export.simulation import rounded_input, rounded_weight, scaled_input
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.parallel.ranks import Parallelism
from nemo_ptq.quantization.algorithms import moves_weights

ALGORITHMS = ("fp8", "int8_sq", "int4_awq", "nvfp4")
QUALITIES = ("fast", "balanced", "max")
_DECODER = "llama"

Batches = Sequence[torch.Tensor]


# ---- what it costs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """What was lost on the windows.

    Attributes:
        increase: Mean increase of the negative log-likelihood of a token, in nats: of ln perplexity.
        error: Its standard error over the windows, which are paired.
        worst: The largest increase of a window.
        top_1: How often both models think the same token most likely.
        divergence: Mean KL divergence, in nats a token.
    """

    increase: float
    error: float
    worst: float
    top_1: float
    divergence: float

    def __str__(self) -> str:
        return f"{self.increase:.4f} | {self.error:.4f} | {self.top_1:.3f} | {self.divergence:.4f} | {self.worst:.3f}"


def loss_of(exact: Callable[[int], torch.Tensor], found: Callable[[int], torch.Tensor], windows: Batches) -> Loss:
    """Compares a quantized model with the unquantized one.

    Args:
        exact: Gives the unquantized model's logits (length, vocabulary) of a window, by its number.
        found: The quantized model's.
        windows: int64 (length) each.
    """
    increases, agreement, divergence = [], [], []
    for number, window in enumerate(windows):
        before, after = (logits(number)[:-1].float().log_softmax(-1) for logits in (exact, found))
        following = window[1:, None].to(before.device)
        increases.append(float((before - after).gather(1, following).mean(dtype=torch.float64)))
        agreement.append(float((before.argmax(-1) == after.argmax(-1)).float().mean()))
        divergence.append(float((before.exp() * (before - after)).sum(-1).mean()))
    return Loss(
        statistics.fmean(increases),
        statistics.stdev(increases) / math.sqrt(len(increases)),
        max(increases),
        statistics.fmean(agreement),
        statistics.fmean(divergence),
    )


# ---- our own --------------------------------------------------------------------------------------------------------


@contextmanager
def as_served(block: Block, layers: CalibratedLayers, rounds_inputs: bool) -> Iterator[None]:
    """Has a block compute what a server does, in float32, within a ``with`` block.

    Args:
        block: The block.
        layers: What its layers were calibrated to; those without a scheme compute with their own weights.
        rounds_inputs: Whether activations are quantized, where the scheme does so.
    """

    def serve(name: str, module: torch.nn.Module) -> Callable[[], None]:
        original, linear = module.get_parameter("weight"), layers.linear(name)
        weight = rounded_weight(linear) if linear.is_quantized else original.float()
        module.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))

        def enter(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            scaled = scaled_input(args[0], linear)
            return (rounded_input(scaled, linear) if rounds_inputs else scaled,)

        hook = module.register_forward_pre_hook(enter)

        def restore() -> None:
            hook.remove()
            module.register_parameter("weight", original)

        return restore

    with ExitStack() as stack:
        for name, module in block.modules.items():
            if is_linear(name):
                stack.callback(serve(name, module))
        yield


@dataclass
class Benchmark:
    """A model and the text that it is measured on.

    Attributes:
        llama: The model.
        shape: Its sizes.
        batches: int64 (samples, length) each: what calibrates.
        windows: int64 (length) each: what is read to evaluate.
        exact: The windows behind the unquantized model's last layer.
    """

    llama: Llama
    shape: ModelSpec
    batches: Batches
    windows: Batches
    exact: Stream

    @classmethod
    def of(cls, model: Any, shape: ModelSpec, batches: Batches, windows: Batches) -> "Benchmark":
        """Runs the unquantized model over the windows."""
        llama = Llama(model)
        exact = float32_stream(llama, [window[None] for window in windows])
        for block in llama.blocks[1:]:
            with as_served(block, CalibratedLayers(parameters_of([block]), {}, {}, False), False):
                llama.advance(block, exact)
        return cls(llama, shape, batches, windows, exact)

    def loss(self, found: Callable[[int], torch.Tensor]) -> Loss:
        """What a model has lost that gives logits (length, vocabulary) of a window, by its number."""
        return loss_of(self._logits(self.exact), found, self.windows)

    def _logits(self, stream: Stream) -> Callable[[int], torch.Tensor]:
        return lambda number: self.llama.logits(stream.hidden[number])[0]

    @property
    def linears(self) -> list[str]:
        """Names of the linear layers."""
        return [name for block in self.llama.blocks for name in block.modules if is_linear(name)]

    def learner(self, quantization: QuantizationConfig) -> Learner:
        """What calibrates, as in a job."""
        parallelism = Parallelism()
        if not quantization.is_balanced:
            method = method_for(quantization, _DECODER)
            return ScaleLearner(self.llama, parallelism, Stream(self.batches), method, False)
        return RoundingLearner(
            self.llama,
            parallelism,
            Stream(self.batches),
            Stream(self.batches) if moves_weights(quantization) else None,
            dict.fromkeys(self.linears, rounder_for(quantization, _DECODER)),
            self.linears if moves_weights(quantization) else (),
            dict.fromkeys(self.linears, algorithm_scheme(quantization)),
            lambda name, scale: foldable_scale(name, scale, self.shape, False),
            False,
            is_max=quantization.is_max,
        )

    def quantize(
        self, quantization: QuantizationConfig, log: Callable[[str], None] = lambda line: None
    ) -> tuple[dict[str, Loss], float]:
        """Calibrates, and reads the windows as servers will.

        Args:
            quantization: How.
            log: Takes a line after each block.

        Returns:
            What was lost, by what is rounded: "" for all that the format rounds, and ", weights alone" where it rounds
            activations to four bits too; and the time of the calibration, in seconds.
        """
        learner, scheme, seconds = self.learner(quantization), algorithm_scheme(quantization), 0.0
        kinds = {"": True, ", weights alone": False} if quantization.algorithm == "nvfp4" else {"": True}
        tokens = [window[None] for window in self.windows]
        streams = {kind: float32_stream(self.llama, tokens) for kind in kinds}
        for block in self.llama.blocks:
            begun = time.monotonic()
            state: State = learner.learn(block, False)
            seconds += time.monotonic() - begun
            if not block.index:
                continue
            rounded = learner.rounded.get if isinstance(learner, RoundingLearner) else lambda name: None
            schemes = {name: scheme for name in block.modules if is_linear(name)}
            layers = CalibratedLayers(parameters_of([block]), dict(state), schemes, False, rounded=rounded)
            for kind, stream in streams.items():
                with as_served(block, layers, kinds[kind]):
                    self.llama.advance(block, stream)
            log(f"{quantization.algorithm} {quantization.quality}: block {block.index}, {seconds:.1f} s")
        return {kind: self.loss(self._logits(stream)) for kind, stream in streams.items()}, seconds

    def pass_seconds(self) -> float:
        """How long the calibration batches take through the unquantized layers, in seconds."""
        stream = Stream(self.batches)
        self.llama.advance(self.llama.blocks[0], stream)
        begun = time.monotonic()
        for block in self.llama.blocks[1:]:
            self.llama.advance(block, stream)
        stream.hidden[-1].cpu()  # a GPU has then come to the end
        return time.monotonic() - begun


def read_tokens(tokenizer: Any, texts: Sequence[str], count: int, length: int) -> list[list[int]]:
    """Returns the tokens of the first texts that are long enough, cut to a length.

    Exits with a message where there are too few.
    """
    tokens = (tokenizer(text)["input_ids"] for text in texts)
    found = list(islice((ids[:length] for ids in tokens if len(ids) >= length), count))
    if len(found) < count:
        sys.exit(f"{len(found)} texts of {length} tokens: give more text, or ask for less than {count}")
    return found


def read_windows(tokenizer: Any, texts: Sequence[str], count: int, length: int) -> list[torch.Tensor]:
    """Returns windows of tokens from texts put together, each with the first token of a text before it.

    Exits with a message where there are too few.
    """
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rest = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    size = length - len(first)
    found = [torch.tensor(first + rest[at : at + size]) for at in range(0, len(rest) - size + 1, size)]
    if len(found) < count:
        sys.exit(f"{len(found)} windows of {length} tokens: give more text, or ask for less than {count}")
    return found[:count]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the model, the texts, and how much of them is read."""
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, metavar="FILE")
    parser.add_argument("--evaluation", required=True, metavar="FILE")
    parser.add_argument("--samples", type=int, default=128, help="of the calibration")
    parser.add_argument("--length", type=int, default=256, help="of a sample, in tokens")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--window", type=int, default=512, help="tokens of a window")
    parser.add_argument("--device", default="cpu", help='of torch, e.g. "cuda"')


def main() -> int:
    """Reads the command line and prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS, choices=ALGORITHMS)
    parser.add_argument("--qualities", nargs="*", default=QUALITIES, choices=QUALITIES)
    parser.add_argument("--peers", nargs="*", help="other tools to run as well; without names, all that are installed")
    parser.add_argument("--peer-python", default=sys.executable, help="of the environment that has them")
    arguments = parser.parse_args()
    peers = Peers.of(arguments.peers, arguments.peer_python, arguments.model, arguments.device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def load() -> Any:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
        return model.to(arguments.device).eval()

    def texts(file: str) -> list[str]:
        return [str(sample) for sample in read_text_file(file)]

    samples = read_tokens(tokenizer, texts(arguments.calibration), arguments.samples, arguments.length)
    windows = read_windows(tokenizer, texts(arguments.evaluation), arguments.windows, arguments.window)
    batches = torch.tensor(samples).split(8)
    with torch.inference_mode():
        benchmark = Benchmark.of(load(), read_metadata(Path(arguments.model)), batches, windows)
        one_pass = benchmark.pass_seconds()
        print("| algorithm | by | increase in ln ppl | s.e. | top-1 | KL | worst window | passes |")
        print("|---|---|--:|--:|--:|--:|--:|--:|", flush=True)
        for algorithm in arguments.algorithms:
            for quality in arguments.qualities:
                quantization = QuantizationConfig(algorithm, quality=quality, awq_block_size=GROUP_SIZE)
                losses, seconds = benchmark.quantize(quantization, lambda line: print(line, file=sys.stderr))
                for kind, loss in losses.items():
                    print(f"| {algorithm}{kind} | {quality} | {loss} | {seconds / one_pass:.1f} |", flush=True)
            for tool in peers.having(algorithm):
                logits, seconds = peers.quantize(tool, algorithm, samples, windows)
                print(f"| {algorithm} | {tool} | {benchmark.loss(logits)} | {seconds / one_pass:.1f} |", flush=True)
    print(f"\nOne forward pass over {arguments.samples} x {arguments.length} tokens: {one_pass:.1f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
