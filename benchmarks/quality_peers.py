# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Other tools beside ours in benchmarks.quality: run, and read back from what they write.

Each runs in a process, with a Python of its own if it must (other_tools.py). What it writes is read by the reader that
verifies our own exports, which shares nothing with them, and computed in float32 like ours.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.other_tools import TOOLS
from nemo_ptq.verify.forward_pass import open_model, run_layers

# Gives the logits (length, vocabulary) of a window, by its number.
Logits = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Peers:
    """The tools that are asked for.

    Attributes:
        tools: Their names.
        python: Of an environment that has them.
        model: Directory of the model.
        device: Of torch.
    """

    tools: Sequence[str]
    python: str
    model: str
    device: str

    @classmethod
    def of(
        cls, tools: Sequence[str] | None, python: str, model: str, device: str, installed: Sequence[str] | None = None
    ) -> "Peers":
        """Looks which tools there are.

        Args:
            tools: Those to run; none of them asks for all that are installed, None for no tool.
            python: As above.
            model: As above.
            device: As above.
            installed: Those that the environment has; None asks it.

        Exits with a message where one is not installed.
        """
        if tools is None:
            return cls((), python, model, device)
        if installed is None:
            command = [python, "-m", "benchmarks.other_tools"]
            answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            installed = json.loads(answer.stdout.splitlines()[-1])
        for name in tools:
            if name not in installed:
                has, known = (", ".join(names) or "none" for names in (installed, TOOLS))
                sys.exit(f"{name}: not installed in {python}, which has {has}; known: {known}")
        return cls(tools or installed, python, model, device)

    def having(self, algorithm: str) -> list[str]:
        """Returns those that have an algorithm."""
        return [name for name in self.tools if algorithm in TOOLS[name].algorithms]

    def quantize(
        self, tool: str, algorithm: str, samples: Sequence[Sequence[int]], windows: Sequence[torch.Tensor]
    ) -> tuple[Logits, float]:
        """Has a tool quantize the model, and reads the windows as servers will.

        Args:
            tool: Its name.
            algorithm: Ours that has the same format.
            samples: Tokens to calibrate on, of one length.
            windows: int64 (length) each.

        Returns:
            The logits of the windows, and the time of loading and quantizing, in seconds.
        """
        with tempfile.TemporaryDirectory() as work:
            tokens, output = Path(work, "tokens.json"), Path(work, "output")
            tokens.write_text(json.dumps(samples), encoding="utf-8")
            command = [self.python, "-m", "benchmarks.other_tools", tool, self.model, str(tokens), str(output)]
            subprocess.run([*command, "--algorithm", algorithm, "--device", self.device], stdout=sys.stderr, check=True)
            return self._logits(output, windows), float(Path(f"{output}.seconds").read_text(encoding="utf-8"))

    def _logits(self, directory: Path, windows: Sequence[torch.Tensor]) -> Logits:
        if is_gptq(directory):
            unpack_gptq(directory)
        states = run_layers(open_model(directory), [window[None] for window in windows], torch.device(self.device))
        return lambda number: states.logits(number, slice(0, len(windows[number])))[0]


# ---- GPTQ's own format ----------------------------------------------------------------------------------------------


def is_gptq(directory: Path) -> bool:
    """Whether a directory is in the format of AutoGPTQ and GPTQModel."""
    return _config(directory).get("quantization_config", {}).get("quant_method") == "gptq"


def unpack_gptq(directory: Path) -> None:
    """Dequantizes a directory in GPTQ's format: it becomes an unquantized one, in float32."""
    config = _config(directory)
    quantization = config.pop("quantization_config")
    bits = quantization["bits"]
    # The first version of the format stores zero points less one.
    less = 0 if quantization.get("checkpoint_format") == "gptq_v2" else 1
    files = sorted(directory.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for module in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        codes, zeros, scales, groups = (tensors.pop(f"{module}.{k}") for k in ("qweight", "qzeros", "scales", "g_idx"))
        steps, groups = scales.float(), groups.long()
        codes, zeros = _unpacked(codes, bits), _unpacked(zeros.T, bits).T + less
        tensors[f"{module}.weight"] = ((codes - zeros[groups]) * steps[groups]).T.contiguous()
    for file in [*files, *directory.glob("*.index.json")]:
        file.unlink()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """From int32 (n, m) words, whose lowest bits are the first of 32 / bits codes, to codes (n x 32 / bits, m)."""
    shifts = torch.arange(0, 32, bits)[None, :, None]
    return (words[:, None].long() >> shifts & (1 << bits) - 1).flatten(0, 1)


def _config(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return found
