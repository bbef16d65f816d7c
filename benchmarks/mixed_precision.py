# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What algorithm "auto" loses for a number of bits, and what choices at random lose for as many: prints one table.

    python -m benchmarks.mixed_precision MODEL --calibration FILE --evaluation FILE --formats hf --bits 5 6 8

Model, text and evaluation are those of benchmarks.quality. The errors are measured once, and chosen from for each
number of bits; what is chosen is calibrated as in a job. Choices at random have a random error for each option.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.llama import float32_stream
from benchmarks.quality import Benchmark, Loss, add_options, as_served, read_tokens, read_windows
from nemo_ptq.calibration.error_learner import ErrorLearner
from nemo_ptq.calibration.rounders import rounder_for
from nemo_ptq.calibration.rounding_learner import RoundingLearner
from nemo_ptq.calibration.streams import Stream
from nemo_ptq.calibration.text_files import read_text_file
from nemo_ptq.checkpoint.blocks import parameters_of
from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.config import AUTO, NO_QUANT, QuantizationConfig
from nemo_ptq.engine.choosing import choice_of, ways_to_quantize
from nemo_ptq.export.calibrated import CalibratedLayers, layer_schemes
from nemo_ptq.export.folding import foldable_scale
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.export.mixing import layer_groups
from nemo_ptq.parallel.ranks import Parallelism
from nemo_ptq.quantization.algorithms import moves_weights, quantization_of_layer

_DECODER = "llama"

# Of each group of layers, by its name and the option.
Errors = Mapping[str, Mapping[str, float]]


def loss_of_choice(benchmark: Benchmark, quantization: QuantizationConfig, algorithms: Mapping[str, str]) -> Loss:
    """Calibrates each layer with its algorithm, and reads the windows as servers will."""
    schemes = layer_schemes(quantization, algorithms, benchmark.linears)
    own = {name: quantization_of_layer(quantization, algorithms[name]) for name in schemes}
    learner = RoundingLearner(
        benchmark.llama,
        Parallelism(),
        Stream(benchmark.batches),
        Stream(benchmark.batches) if moves_weights(quantization) else None,
        {name: rounder_for(its, _DECODER) for name, its in own.items()},
        {name for name, its in own.items() if moves_weights(its)},
        schemes,
        lambda name, scale: foldable_scale(name, scale, benchmark.shape, False),
        False,
    )
    stream = float32_stream(benchmark.llama, [window[None] for window in benchmark.windows])
    for block in benchmark.llama.blocks:
        state = learner.learn(block, False)
        if not block.index:
            continue
        own = {name: scheme for name, scheme in schemes.items() if name in block.modules}
        layers = CalibratedLayers(parameters_of([block]), dict(state), own, False, rounded=learner.rounded.get)
        with as_served(block, layers, True):
            benchmark.llama.advance(block, stream)
    return benchmark.loss(lambda number: benchmark.llama.logits(stream.hidden[number])[0])


def at_random(errors: Errors, seed: int) -> Errors:
    """Errors that say nothing."""
    numbers = random.Random(seed)
    return {name: {option: numbers.random() for option in options} for name, options in errors.items()}


def main() -> int:
    """Reads the command line and prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--formats", nargs="+", default=["hf"], choices=FORMATS)
    parser.add_argument("--bits", nargs="+", type=float, default=[5.0, 6.0, 8.0])
    parser.add_argument("--candidates", nargs="+", help="algorithms to choose from; if not set, those of a job")
    parser.add_argument("--random", type=int, default=3, help="choices at random for each number of bits")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).to(arguments.device).eval()
    texts = [[str(sample) for sample in read_text_file(file)] for file in (arguments.calibration, arguments.evaluation)]
    samples = read_tokens(tokenizer, texts[0], arguments.samples, arguments.length)
    windows = read_windows(tokenizer, texts[1], arguments.windows, arguments.window)
    batches = torch.tensor(samples).split(8)
    quantization = QuantizationConfig(AUTO, quality="balanced", awq_block_size=64, candidates=arguments.candidates)
    with torch.inference_mode():
        benchmark = Benchmark.of(model, read_metadata(Path(arguments.model)), batches, windows)
        groups = layer_groups(quantization, benchmark.shape, arguments.formats)
        ways = ways_to_quantize(groups, quantization, _DECODER)
        learner = ErrorLearner(benchmark.llama, Parallelism(), Stream(batches), ways)
        for block in benchmark.llama.blocks:
            learner.learn(block, False)
        print("| bits asked | by | bits | layers | increase in ln ppl | s.e. | top-1 | KL | worst window |")
        print("|--:|---|--:|---|--:|--:|--:|--:|--:|", flush=True)
        for bits in arguments.bits:
            rows: list[tuple[str, Errors]] = [("measured errors", learner.errors)]
            rows += [(f"chance, {seed}", at_random(learner.errors, seed)) for seed in range(arguments.random)]
            for by, errors in rows:
                asked = replace(quantization, effective_bits=bits)
                algorithms, record = choice_of(groups, errors, asked)
                counts = Counter(algorithms.values())
                layers = ", ".join(f"{counts[name]} {name}" for name in sorted(counts, key=(NO_QUANT,).__contains__))
                loss = loss_of_choice(benchmark, asked, algorithms)
                print(f"| {bits:g} | {by} | {record.effective_bits:.2f} | {layers} | {loss} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
