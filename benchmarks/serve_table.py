# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What a server answered about exports, beside what our reader predicts, as Markdown.

    python benchmarks/serve_table.py EXPORTS ANSWERS [SPEED]

EXPORTS is what `make serve-exports` makes, ANSWERS what tests/serve/ask_vllm.py found of it, SPEED what
benchmarks/serve_speed.py measured. Needs Python alone.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

Numbers = list[list[float]]


def _flat(texts: Numbers) -> list[float]:
    return [value for text in texts for value in text]


def perplexity(log_probs: Numbers) -> float:
    """Of all tokens together."""
    flat = _flat(log_probs)
    return math.exp(-sum(flat) / len(flat))


def mean_difference(first: Numbers, second: Numbers) -> float:
    """The mean magnitude of the differences, infinite where something is no number."""
    pairs = [abs(a - b) for a, b in zip(_flat(first), _flat(second), strict=True)]
    mean = sum(pairs) / len(pairs)
    return mean if math.isfinite(mean) else math.inf


def _load(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(directory.glob("*.json"))]


def answers_table(requests: list[dict[str, Any]], answers: list[dict[str, Any]]) -> list[str]:
    """Returns a row for each export: whether it was loaded, and how far the answers are from the prediction."""
    found = {answer["directory"]: answer for answer in answers}
    lines = ["| export | perplexity, server | predicted | mean difference of log probabilities |", "|---|--:|--:|--:|"]
    for request in requests:
        path = request["directory"]
        answer = found.get(path)
        if answer is None:
            continue
        if "error" in answer:
            lines.append(f"| {path} | refused: {' '.join(answer['error'].split())[:160].replace('|', '/')} | | |")
            continue
        theirs, ours = answer["log_probs"], request["log_probs"]
        far = mean_difference(theirs, ours)
        lines.append(f"| {path} | {perplexity(theirs):.2f} | {perplexity(ours):.2f} | {far:.4f} |")
    return lines


def speed_table(results: list[dict[str, Any]]) -> list[str]:
    """Returns output tokens per second of each, the fastest at the largest batch first."""
    batches = list(results[0]["tokens_per_second"])
    lines = ["| quantized as | " + " | ".join(f"batch {batch}" for batch in batches) + " |"]
    lines += ["|---|" + "--:|" * len(batches)]
    for result in sorted(results, key=lambda result: -float(result["tokens_per_second"][batches[-1]])):
        speeds = " | ".join(f"{result['tokens_per_second'][batch]:,.0f}" for batch in batches)
        lines.append(f"| {result['path']} | {speeds} |")
    return lines


def main(exports: Path, answers: Path, speed: Path | None = None) -> None:
    """Prints the tables."""
    requests = json.loads((exports / "requests.json").read_text(encoding="utf-8"))
    found = _load(answers)
    measured = _load(speed) if speed is not None else []
    print("vLLM " + ", ".join(sorted({result["vllm"] for result in (*found, *measured)})))
    print("", *answers_table(requests, found), sep="\n")
    if measured:
        print("\nOutput tokens per second, Llama-3-8B's shape, prompts of 512 tokens, answers of 128:\n")
        print(*speed_table(measured), sep="\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
