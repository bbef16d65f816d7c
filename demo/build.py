# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Makes the demo's checkpoint and its data in build/demo, or finds them there: `python -m demo.build`."""

import hashlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
DIRECTORY = _ROOT / "build" / "demo"
HF = DIRECTORY / "hf"
CHECKPOINT = DIRECTORY / "nemo"
CALIBRATION = DIRECTORY / "text" / "calibration.jsonl"
HELDOUT = DIRECTORY / "text" / "heldout.jsonl"


def build() -> None:
    """Trains the model and converts it, each only if its result is missing or its sources have changed."""
    training_sources = [_ROOT / "demo" / name for name in ("text.py", "tokenizer.py", "muon.py", "train.py")]
    checkpoint_package = _ROOT / "nemo_ptq" / "checkpoint"
    importer_sources = [*sorted(checkpoint_package.glob("huggingface/*.py")), checkpoint_package / "writer.py"]
    _build_once(HF, _digest(training_sources), _train)
    _build_once(CHECKPOINT, _digest([*training_sources, *importer_sources]), _convert)
    print(f"Demo checkpoint: {CHECKPOINT.relative_to(_ROOT)}")


def _build_once(target: Path, key: str, make: Callable[[], None]) -> None:
    """Calls `make` unless it has already made `target` from what `key` stands for."""
    stamp = DIRECTORY / f"{target.name}.stamp"
    if target.exists() and stamp.exists() and stamp.read_text() == key:
        return
    stamp.unlink(missing_ok=True)
    make()
    stamp.write_text(key)


def _digest(files: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _train() -> None:
    from demo.text import load_corpus, write_jsonl
    from demo.tokenizer import train_tokenizer
    from demo.train import perplexity, train_model

    start = time.monotonic()
    corpus = load_corpus()
    write_jsonl(CALIBRATION, corpus.calibration)
    write_jsonl(HELDOUT, corpus.heldout)
    print(f"Training a small Llama on the sources of Python's standard library ({len(corpus.training):,} passages)")
    tokenizer = train_tokenizer(corpus.training)
    model = train_model(tokenizer, corpus.training)
    model.bfloat16()
    print(f"  held-out perplexity {perplexity(model, tokenizer, corpus.heldout):.1f}")
    model.save_pretrained(HF)
    tokenizer.save_pretrained(HF)
    print(f"  {time.monotonic() - start:.0f} s in all")


def _convert() -> None:
    from nemo_ptq.console.quiet import quiet_imports

    print("Converting it to a NeMo 2.0 checkpoint", flush=True)
    with quiet_imports():
        from nemo_ptq.checkpoint.huggingface.importer import import_hf

        import_hf(str(HF), str(CHECKPOINT), overwrite=True)


if __name__ == "__main__":
    build()
