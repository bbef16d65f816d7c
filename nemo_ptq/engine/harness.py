# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness on a directory in any format, computed by :mod:`nemo_ptq.verify`.

Imports lm_eval, which is an optional package: import this module where it is used.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nemo_ptq.console.reporter import Reporter
from nemo_ptq.engine.documents import load_tokenizer
from nemo_ptq.errors import PtqError
from nemo_ptq.report.records import TaskFigure
from nemo_ptq.verify.evaluate import POSITIONS_AT_ONCE, continue_greedily, document_groups
from nemo_ptq.verify.forward_pass import CPU, FinalStates, open_model, run_layers
from nemo_ptq.verify.model_config import ModelConfig

# Tokens that are generated before the text is searched for the end.
_STRIDE = 16

_TASK_FILES = (".yaml", ".yml")
# For the standard errors of figures that are no means.
_RESAMPLES = 1000

# Context and continuation, as token ids.
Pair = tuple[list[int], list[int]]


class Reader(TemplateLM):
    """A directory as a model of the harness: weights, activations and KV cache rounded as a server rounds them.

    Args:
        directory: An exported directory in any format, or a checkpoint.
        tokenizer: From :func:`nemo_ptq.engine.documents.load_tokenizer`.
        device: Device to compute on.
        reporter: Shows progress.

    Raises:
        PtqError: If the directory cannot be run.
    """

    def __init__(self, directory: Path, tokenizer: Any, device: torch.device, reporter: Reporter) -> None:
        super().__init__()
        self._model = open_model(directory)
        self._texts = tokenizer
        self._inner = getattr(tokenizer, "tokenizer", None)
        self._place, self._reporter = device, reporter

    @property
    def _config(self) -> ModelConfig:
        return self._model.config

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, or the one that begins it if the tokenizer has no other."""
        end = None if self._inner is None else self._inner.eos_token_id
        return self.prefix_token_id if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: the one that begins a text, or else the one that ends it."""
        if self._inner is None:
            return self._texts.bos_id
        found = self._inner.bos_token_id
        found = self._inner.eos_token_id if found is None else found
        if found is None:
            raise PtqError("the tokenizer has no token that begins or ends a text, and tasks need one")
        return found

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenizes a text, with the special tokens that the tokenizer adds by itself, unless told otherwise."""
        if self._inner is None:
            return list(self._texts.text_to_ids(string))
        begins = self._inner.bos_token is not None and string.startswith(self._inner.bos_token)
        if add_special_tokens is None and begins:
            add_special_tokens = False
        settings = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self._inner.encode(string, **settings))

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        return list(self._scores([(context, continuation) for _, context, continuation in requests]))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of whole texts, of which long ones are cut into windows."""
        pairs: list[Pair] = []
        counts = []
        for request in requests:
            (text,) = request.args
            cuts = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._config.max_position_embeddings,
                context_len=1,
            )
            windows = [make_disjoint_window(cut) for cut in cuts]
            pairs += windows
            counts.append(len(windows))
        scores = self._scores(pairs)
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues texts greedily, up to one of their stop sequences."""
        return [self._continue(*request.args) for request in requests]

    def _continue(self, context: str, settings: dict[str, Any]) -> str:
        settings = normalize_gen_kwargs(settings)
        if settings.get("do_sample") or settings.get("temperature"):
            raise PtqError("the task samples its answers, which the reader does not: choose one that is greedy")
        most = settings["max_gen_toks"]
        prompt = torch.tensor(self.tok_encode(context)[most - self._config.max_position_embeddings :])
        end, found = self.eot_token_id, prompt[:0]
        while len(found) < most:
            draft = found.new_zeros(min(_STRIDE, most - len(found)))
            found = torch.cat((found, continue_greedily(self._model, torch.cat((prompt, found)), draft, self._place)))
            text = self._texts.decode(found.tolist())
            if end in found or any(stop and stop in text for stop in settings["until"]):
                break
        tokens = found.tolist()
        text = self._texts.decode(tokens[: tokens.index(end)] if end in tokens else tokens)
        return postprocess_generated_text(text, settings["until"], None)

    def _scores(self, pairs: Sequence[Pair]) -> Iterator[tuple[float, bool]]:
        """Yields for each pair the log-likelihood of the continuation, and whether it is what the model ranks first."""
        longest = self._config.max_position_embeddings + 1
        inputs = [torch.tensor([(context + continuation)[-longest:][:-1]]) for context, continuation in pairs]
        groups = document_groups(inputs, self._config.hidden_size)
        continuations = iter(continuation for _, continuation in pairs)
        with self._reporter.progress("tasks", len(groups) * self._config.num_hidden_layers, "layers") as progress:
            for group in groups:
                states = run_layers(self._model, group, self._place, lambda: progress.advance(1))
                for index, tokens in enumerate(group):
                    yield _score(states, index, tokens.shape[1], next(continuations))


def _score(states: FinalStates, index: int, length: int, continuation: Sequence[int]) -> tuple[float, bool]:
    """As :meth:`Reader._scores`, of one of the inputs that went through the layers, which has `length` tokens."""
    wanted = torch.tensor(continuation[-length:])
    start = length - len(wanted)
    total, is_first = 0.0, True
    for part, cut in zip(wanted.split(POSITIONS_AT_ONCE), range(start, length, POSITIONS_AT_ONCE), strict=True):
        found = states.logits(index, slice(cut, cut + len(part)))[0].log_softmax(-1).cpu()
        total += found.gather(-1, part[:, None]).double().sum().item()
        is_first = is_first and torch.equal(found.argmax(-1), part)
    return total, is_first


def run_tasks(
    directory: Path,
    baseline: Path | None,
    tasks: Sequence[str],
    limit: int | None,
    device: torch.device = CPU,
    reporter: Reporter | None = None,
) -> list[TaskFigure]:
    """Runs tasks on a directory, and on its baseline.

    Args:
        directory: An exported directory in any format.
        baseline: The unquantized model, which gets the directory's tokenizer; None for none.
        tasks: Names of the harness's tasks and groups, and paths of .yaml files with tasks of the user's own.
        limit: Number of documents of each task to run; None runs all.
        device: Device to compute on.
        reporter: Shows progress.

    Returns:
        The figures, those of one task after each other.

    Raises:
        PtqError: If a task is unknown, its data is not available, or it needs something that the reader does not do.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tokenizer = load_tokenizer(directory)
    reporter = reporter or Reporter(False)
    # To read what the harness has by name takes it long.
    manager = TaskManager(include_defaults=not all(task.endswith(_TASK_FILES) for task in tasks))
    found, *others = (
        _results(Reader(model, tokenizer, device, reporter), tasks, manager, limit)
        for model in (directory, baseline)
        if model is not None
    )
    truth = others[0]["results"] if others else {}
    figures = []
    for task, results in found["results"].items():
        counts = found.get("n-samples", {}).get(task, {})
        for key, value in results.items():
            metric, _, filter_ = key.partition(",")
            if not filter_ or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = results.get(f"{metric}_stderr,{filter_}")
            figures.append(
                TaskFigure(
                    task=task,
                    metric=metric if filter_ == "none" else key,
                    value=value,
                    standard_error=error if isinstance(error, (int, float)) else None,
                    baseline=truth.get(task, {}).get(key),
                    documents=counts.get("effective", 0),
                    shots=found.get("n-shot", {}).get(task, 0),
                    higher_is_better=found.get("higher_is_better", {}).get(task, {}).get(metric),
                )
            )
    return figures


def _results(model: Reader, tasks: Sequence[str], manager: TaskManager, limit: int | None) -> dict[str, Any]:
    try:
        found = simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=_RESAMPLES,
            log_samples=False,
        )
    except PtqError:
        raise
    except Exception as error:  # a task is code and data of anybody's, and raises what it likes
        reason = " ".join(str(error).split())[:300]
        raise PtqError(
            f"--tasks {','.join(tasks)} could not be run ({type(error).__name__}: {reason}): "
            "`lm-eval ls tasks` lists what there is; the path of a task of your own ends in .yaml"
        ) from error
    assert found is not None
    return found
