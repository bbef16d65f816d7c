# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Asks the transformers of another environment; runs there, where this project is not installed.

python ask_transformers.py QUESTIONS ANSWERS

QUESTIONS is a JSON file: "tokens" (lists of token ids, of one length), "saved" ([directory, new directory] pairs: model
and tokenizer are loaded and saved again) and "logits" (directories). ANSWERS becomes a safetensors file with the
float32 logits (batch, sequence, vocabulary) of each directory, by its name.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file


def load(directory: str, dtype: torch.dtype | str) -> transformers.PreTrainedModel:
    # torch's fused attention has no cap for scores, and the one family with such a cap would go without.
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


def main() -> None:
    questions = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for directory, again in questions["saved"]:
        load(directory, "auto").save_pretrained(again)
        transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(again)
    tokens, answers = torch.tensor(questions["tokens"]), {}
    for directory in questions["logits"]:
        with torch.inference_mode():
            answers[directory] = load(directory, torch.float32)(tokens).logits.contiguous()
    save_file(answers, sys.argv[2], {"transformers": transformers.__version__})


if __name__ == "__main__":
    main()
