# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What quantization costs a real model: `python -m benchmarks.quality MODEL --text FILE...` prints one table.

MODEL is the directory of a Hugging Face model of the Llama kind; FILE a .jsonl, .json or .txt file. The linear layers
of the blocks are quantized, weights and, in fp8 and int8, activations, in float32 arithmetic. The first documents
calibrate; windows of the others are read by both models, and their losses are paired.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_ptq.calibration import gptq, search
from nemo_ptq.calibration.text_files import read_text_file
from nemo_ptq.quantization.grids import FP8, INT4, INT8
from nemo_ptq.quantization.rounding import block_scales, scale_of
from nemo_ptq.verify.dequantize import fake_quantize_fp8, fake_quantize_int8

_GROUP_SIZE = 64
_NVFP4_LARGEST = 6.0 * 448.0
_SAMPLED_TOKENS = 1024


# ---- what a layer becomes -------------------------------------------------------------------------------------------


@dataclass
class Inputs:
    """What enters the linear layers that share their inputs, of all calibration tokens.

    Attributes:
        exact: (tokens, in) for each batch: in the unquantized model.
        given: (tokens, in) for each batch: in the quantized model, before its own quantization.
    """

    exact: list[torch.Tensor]
    given: list[torch.Tensor]

    def amax(self) -> torch.Tensor:
        """Largest magnitude of each channel of each batch, float32 (batches, in)."""
        return torch.stack([batch.abs().amax(0) for batch in self.given])

    def gram(self, quantize: "Quantize") -> torch.Tensor:
        """X_q^T X_q, X_q as the layer multiplies it."""
        return sum((q.T @ q for q in map(quantize, self.given)), start=torch.zeros(()))

    def cross(self, quantize: "Quantize", scale: torch.Tensor | None = None) -> torch.Tensor:
        """(X - X_q)^T X_q, X multiplied with the pre-quantization scale as X_q is."""
        total = torch.zeros(())
        for exact, given in zip(self.exact, self.given, strict=True):
            q = quantize(given)
            total = total + ((exact if scale is None else exact * scale) - q).T @ q
        return total


Quantize = Callable[[torch.Tensor], torch.Tensor]
# Weight (out, in) of the layers together, their inputs -> what it becomes, and what is done to the inputs.
Method = Callable[[torch.Tensor, Inputs], tuple[torch.Tensor, Quantize]]


def _as_is(values: torch.Tensor) -> torch.Tensor:
    return values


def _rounding(
    weight: torch.Tensor,
    inputs: Inputs,
    quantize: Quantize,
    how: str,
    sort: bool = True,
    scale: torch.Tensor | None = None,
) -> tuple[gptq.InverseFactor, torch.Tensor]:
    """The factor of the inputs, and the weight to round."""
    factor = gptq.inverse_factor(inputs.gram(quantize), sort)
    if how == "target":
        weight = gptq.full_precision_target(weight, inputs.cross(quantize, scale), factor)
    return factor, weight


def fp8(how: str) -> Method:
    """Weights and activations in FP8, a scale each."""

    def method(weight: torch.Tensor, inputs: Inputs) -> tuple[torch.Tensor, Quantize]:
        input_scale = scale_of(inputs.amax().amax(), FP8.largest)

        def quantize(values: torch.Tensor) -> torch.Tensor:
            return fake_quantize_fp8(values, input_scale)

        if how == "max":
            return fake_quantize_fp8(weight, scale_of(weight.abs().amax(), FP8.largest)), quantize
        factor, moved = _rounding(weight, inputs, quantize, how)
        return gptq.round_fp8(moved, factor, scale_of(moved.abs().amax(), FP8.largest)).weight, quantize

    return method


def int8(how: str, alpha: float | None) -> Method:
    """SmoothQuant: INT8 with a scale for each row, activations with one. Alpha None is chosen for each layer."""

    def method(weight: torch.Tensor, inputs: Inputs) -> tuple[torch.Tensor, Quantize]:
        amax = inputs.amax()
        if alpha is None:
            held_out = torch.cat(inputs.given[::4])
            sample = held_out[:: max(1, len(held_out) // _SAMPLED_TOKENS)]
            rest = [number for number in range(len(amax)) if number % 4]
            chosen = search.choose_smoothing(weight, sample, amax[rest].amax(0), amax[::4].amax(0))
            scale, limit = chosen.pre_quant_scale, chosen.input_amax
        else:
            scale = search.smoothing_scale(amax.amax(0), weight.abs().amax(0), alpha)
            limit = (amax.amax(0) * scale).amax()
        smooth, step = weight / scale, scale_of(limit, INT8.largest)

        def quantize(values: torch.Tensor) -> torch.Tensor:
            return fake_quantize_int8(values * scale, step)

        moved = smooth
        if how != "max":
            factor, moved = _rounding(smooth, inputs, quantize, how, scale=scale)
        rows = scale_of(moved.abs().amax(1), INT8.largest)
        if how == "max":
            return fake_quantize_int8(smooth, rows[:, None]), quantize
        return gptq.round_int8(moved, factor, rows).weight, quantize

    return method


def int4(how: str) -> Method:
    """Weights in INT4, a scale for each group."""

    def method(weight: torch.Tensor, inputs: Inputs) -> tuple[torch.Tensor, Quantize]:
        if how == "max":
            scale = scale_of(weight.unflatten(1, (-1, _GROUP_SIZE)).abs().amax(-1), INT4.largest)
        else:
            factor, weight = _rounding(weight, inputs, _as_is, how)
            scale = search.group_scales(weight, factor.importance, _GROUP_SIZE)
        if how in ("max", "search"):
            factor = gptq.inverse_factor(torch.zeros(weight.shape[1], weight.shape[1]))
        return gptq.round_int4(weight, factor, scale).weight, _as_is

    return method


def nvfp4(how: str) -> Method:
    """Weights in NVFP4."""

    def method(weight: torch.Tensor, inputs: Inputs) -> tuple[torch.Tensor, Quantize]:
        if how in ("gptq", "target"):
            factor, moved = _rounding(weight, inputs, _as_is, how, sort=False)
            scale_2 = scale_of(moved.abs().amax(), _NVFP4_LARGEST)
            return gptq.round_nvfp4(moved, factor, scale_2).weight, _as_is
        scale_2 = scale_of(weight.abs().amax(), _NVFP4_LARGEST)
        if how == "max":
            scale = block_scales(weight, scale_2, 16)
        else:
            factor = gptq.inverse_factor(inputs.gram(_as_is), sort=False)
            scale = search.nvfp4_block_scales(weight, factor.importance, scale_2)
        step = (scale.float() * scale_2).repeat_interleave(16, 1)
        return gptq.FP4.nearest(weight / step) * step, _as_is

    return method


METHODS: dict[str, Method] = {
    **{f"fp8 {how}": fp8(how) for how in ("max", "gptq", "target")},
    **{f"int8 alpha {alpha} {how}": int8(how, alpha) for alpha in (0.5, 0.8, 1.0) for how in ("max", "gptq", "target")},
    **{f"int8 chosen {how}": int8(how, None) for how in ("max", "gptq", "target")},
    **{f"int4 {how}": int4(how) for how in ("max", "search", "gptq", "target")},
    **{f"nvfp4 {how}": nvfp4(how) for how in ("max", "search", "gptq", "target")},
}


# ---- the walk -------------------------------------------------------------------------------------------------------


class _Reached(Exception):
    """The model has come to where its inputs are wanted."""


class _Capture:
    """Records the inputs of a module while it is entered, and stops the forward pass there."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> "_Capture":
        def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.args, self.kwargs = args, kwargs
            raise _Reached

        handle = self.module.register_forward_pre_hook(record, with_kwargs=True, prepend=True)
        with suppress(_Reached):
            function(*args, **kwargs)
        handle.remove()
        return self


# Names of linear layers that share their inputs, and these inputs, (samples, length, in) for each batch.
_Stage = tuple[tuple[str, ...], list[torch.Tensor]]


def _stages(block: Any, states: list[torch.Tensor], rope: dict[str, Any]) -> Generator[_Stage, None, None]:
    """Runs a block of the Llama kind on all batches, stopping before each of its linear layers; changes ``states``.

    Each layer runs once, as it is when the generator is continued.
    """
    attention, mlp = block.self_attn, block.mlp
    inner = [block.input_layernorm(state) for state in states]
    yield ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), inner
    inner = [_Capture(attention.o_proj)(attention, hidden, **rope).args[0] for hidden in inner]
    yield ("self_attn.o_proj",), inner
    for index, hidden in enumerate(inner):
        states[index] = states[index] + attention.o_proj(hidden)
    inner = [block.post_attention_layernorm(state) for state in states]
    yield ("mlp.gate_proj", "mlp.up_proj"), inner
    inner = [mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden) for hidden in inner]
    yield ("mlp.down_proj",), inner
    for index, hidden in enumerate(inner):
        states[index] = states[index] + mlp.down_proj(hidden)


def quantize_models(
    model: Any, batches: Sequence[torch.Tensor], methods: Mapping[str, Method], log: Callable[[str], None]
) -> dict[str, Any]:
    """Returns quantized copies: each layer from the inputs that it has in the copy, toward those that it had.

    Args:
        model: A Hugging Face model of the Llama kind, float32.
        batches: int64 (samples, length) each, all of one length.
        methods: By the name of the copy.
        log: Takes a line after each block.
    """
    copies = {name: copy.deepcopy(model) for name in methods}
    first = [_Capture(model.model.layers[0])(model, batch) for batch in batches]
    exact = [capture.args[0] for capture in first]
    # All batches have the same positions, and no padding.
    rope = {name: first[0].kwargs[name] for name in ("position_embeddings", "attention_mask")}
    given = {name: list(exact) for name in methods}
    for number, block in enumerate(model.model.layers):
        begun = time.time()
        blocks = {name: quantized.model.layers[number] for name, quantized in copies.items()}
        walks = {name: _stages(blocks[name], given[name], rope) for name in methods}
        for linears, wanted in _stages(block, exact, rope):
            for name, method in methods.items():
                _, found = next(walks[name])
                inputs = Inputs([batch.flatten(0, 1) for batch in wanted], [batch.flatten(0, 1) for batch in found])
                _quantize([blocks[name].get_submodule(linear) for linear in linears], inputs, method)
        for name, walk in walks.items():
            next(walk, None)
            error = sum(float((g - e).square().sum()) for g, e in zip(given[name], exact, strict=True))
            size = sum(float(e.square().sum()) for e in exact)
            log(f"block {number}: {name}: relative error {error / size:.2e}, {time.time() - begun:.1f} s")
    return copies


def _quantize(linears: Sequence[torch.nn.Linear], inputs: Inputs, method: Method) -> None:
    """Quantizes linear layers that share their inputs as one, as Megatron has them."""
    weight, quantize = method(torch.cat([linear.weight for linear in linears]), inputs)
    for linear, rows in zip(linears, weight.split([len(linear.weight) for linear in linears]), strict=True):
        linear.weight.copy_(rows)
        linear.register_forward_pre_hook(lambda _, args: (quantize(args[0]),))


# ---- what it costs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """What was lost on the windows.

    Attributes:
        increase: Mean increase of the negative log-likelihood of a token.
        error: Its standard error over the windows.
        median: The median of the windows.
        worst: The largest increase of a window.
        top_1: How often both models think the same token most likely.
        divergence: Mean KL divergence, in nats.
    """

    increase: float
    error: float
    median: float
    worst: float
    top_1: float
    divergence: float


def reference_states(model: Any, windows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What the last norm gives in the unquantized model, of each window."""
    return [model.model(window[None]).last_hidden_state[0, :-1] for window in windows]


def loss_of(model: Any, states: Sequence[torch.Tensor], windows: Sequence[torch.Tensor]) -> tuple[Loss, float]:
    """Compares a quantized model with the unquantized one, whose loss is returned too."""
    increases, agreement, divergence, reference = [], [], [], []
    for state, window in zip(states, windows, strict=True):
        exact = model.lm_head(state).log_softmax(-1)
        found = model(window[None]).logits[0, :-1].log_softmax(-1)
        likely = [-logits.gather(1, window[1:, None]).mean() for logits in (exact, found)]
        reference.append(float(likely[0]))
        increases.append(float(likely[1] - likely[0]))
        agreement.append(float((exact.argmax(-1) == found.argmax(-1)).float().mean()))
        divergence.append(float((exact.exp() * (exact - found)).sum(-1).mean()))
    values = torch.tensor(increases, dtype=torch.float64)
    return Loss(
        float(values.mean()),
        float(values.std()) / math.sqrt(len(values)),
        float(values.median()),
        float(values.max()),
        sum(agreement) / len(agreement),
        sum(divergence) / len(divergence),
    ), sum(reference) / len(reference)


def read_tokens(
    tokenizer: Any, texts: Sequence[str], documents: int, length: int, windows: int, window: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns calibration batches, (4, length) each, and windows of tokens from the texts that follow."""
    tokens = (tokenizer(text)["input_ids"] for text in texts)
    enough = list(islice((ids[:length] for ids in tokens if len(ids) >= length), documents))
    rest = [token for ids in tokens for token in ids[1:]]
    first = [tokenizer.bos_token_id]
    cut = [torch.tensor(first + rest[at : at + window - 1]) for at in range(0, len(rest) - window, window - 1)]
    if len(enough) < documents or len(cut) < windows:
        sys.exit(
            f"{len(enough)} documents of {length} tokens and {len(cut)} windows of {window}: give more text, or "
            f"ask for less than {documents} and {windows}"
        )
    return list(torch.tensor(enough).split(4)), cut[:windows]


def main() -> int:
    """Reads the command line and prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", default=sorted(METHODS), metavar="NAME", choices=sorted(METHODS))
    parser.add_argument("--documents", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--window", type=int, default=512)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    texts = [str(sample) for file in arguments.text for sample in read_text_file(file)]
    batches, windows = read_tokens(
        tokenizer, texts, arguments.documents, arguments.length, arguments.windows, arguments.window
    )
    with torch.inference_mode():
        states = reference_states(model, windows)
        print("| method | increase in ln ppl | s.e. | median | worst | top-1 | KL |\n|---|---|---|---|---|---|---|")
        begun = time.time()
        methods = {name: METHODS[name] for name in arguments.methods}
        quantized = quantize_models(model, batches, methods, lambda line: print(line, file=sys.stderr))
        seconds = time.time() - begun
        for name, quantized_model in quantized.items():
            loss, reference = loss_of(quantized_model, states, windows)
            print(
                f"| {name} | {loss.increase:.4f} | {loss.error:.4f} | {loss.median:.4f} | {loss.worst:.3f} | "
                f"{loss.top_1:.3f} | {loss.divergence:.4f} |",
                flush=True,
            )
        print(
            f"\nUnquantized: {reference:.4f} nats a token, {len(windows)} windows of {arguments.window}; "
            f"{seconds:.0f} s."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
