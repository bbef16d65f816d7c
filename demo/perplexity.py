# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Perplexity of the demo model on text it has not seen, as trained and after each quantization.

Computed from the calibrated Megatron model: `python -m demo.perplexity`.
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from nemo_ptq.console.quiet import quiet_imports, quiet_libraries

with quiet_imports():
    from nemo_ptq.calibration.batches import data_loop
    from nemo_ptq.calibration.datasets import read_samples
    from nemo_ptq.calibration.tokens import make_batches, tokenize
    from nemo_ptq.checkpoint.loading import load_model
    from nemo_ptq.config import NO_QUANT, QuantizationConfig
    from nemo_ptq.console.reporter import Reporter
    from nemo_ptq.engine.evaluation import perplexity
    from nemo_ptq.modelopt.quantizers import calibrate
    from nemo_ptq.parallel.environment import Launch
    from nemo_ptq.parallel.process_groups import pick_device, process_groups

DEMO = Path("build/demo")
ALGORITHMS = (NO_QUANT, "fp8", "int8_sq", "int4_awq")
# The most that a quantized model may lose, in percent of the unquantized model's perplexity.
LIMITS = {"fp8": 2.0, "int8_sq": 2.0, "int4_awq": 5.0}
SEQ_LEN = 256


def main() -> None:
    """Prints the table; exit status 1 if a quantized model loses more than it may."""
    quiet_libraries()
    launch, silent = Launch(0, 1, 0), Reporter(enabled=False)
    device = pick_device(launch)
    table = Table("algorithm", "perplexity", "change", "limit", title="Perplexity on held-out text")
    failed = False
    with process_groups(launch, device):
        baseline = 0.0
        for algorithm in ALGORITHMS:
            model = load_model(DEMO / "nemo", device)
            samples = read_samples(str(DEMO / "text" / "heldout.jsonl"), 1000)
            batches = make_batches((tokenize(model.tokenizer, sample, SEQ_LEN) for sample in samples), 16)
            quantization = QuantizationConfig(algorithm=algorithm)
            texts = read_samples(str(DEMO / "text" / "calibration.jsonl"), quantization.calibration_dataset_size)
            if algorithm != NO_QUANT:
                calibrate(model.module, quantization, "llama", data_loop(model, quantization, texts, silent))
            result = perplexity(model, batches)
            baseline = baseline or result
            change = 100 * (result / baseline - 1)
            limit = LIMITS.get(algorithm)
            failed |= limit is not None and change > limit
            table.add_row(
                algorithm,
                f"{result:.2f}",
                "" if limit is None else f"{change:+.2f} %",
                "" if limit is None else f"{limit:.0f} %",
            )
    Console().print(table)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
