# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What a job's exports are to servers, for the report and for warnings."""

import shlex

from nemo_ptq.export.formats import FORMATS
from nemo_ptq.export.servers import Export, answers, commands, refusals
from nemo_ptq.home import without_home
from nemo_ptq.job import Job
from nemo_ptq.models.registry import family_of
from nemo_ptq.report.records import Serving


def export_of(job: Job, format: str) -> Export:
    """Returns one of a job's exports, as far as a server cares."""
    family = family_of(job.metadata.config_class.rpartition(".")[2], job.export.decoder_type)
    tied = job.metadata.tied_embeddings
    quantization = job.quantization
    return Export(
        format,
        quantization.algorithm_name,
        family.name,
        job.quantizes_kv_cache,
        tied,
        quantization.kv_cache_qformat,
        job.metadata.short_context,
    )


def serving_of(job: Job, format: str) -> tuple[Serving, ...]:
    """Returns what servers do with one of a job's exports."""
    export = export_of(job, format)
    run = commands(export, in_shell(str(job.directories(job.output)[format])))
    return tuple(
        Serving(
            found.label,
            found.outcome,
            found.known_by,
            found.note,
            run.get(found.label, ()),
            found.server.request if found.label in run else "",
        )
        for found in answers(export)
    )


def server_warnings(job: Job) -> list[str]:
    """Says in a line each which servers do not load what a job makes.

    Asked are those that a format is made for. Where the job names a server, the rules have asked that one.
    """
    if job.export.server is not None:
        return []
    return [line for name in job.export.formats for line in refusals(export_of(job, name), FORMATS[name].servers)]


def in_shell(path: str) -> str:
    """Writes a path as a word of a shell command, "~" for the home directory.

    Example:
        >>> in_shell("/models/a b")
        "'/models/a b'"
    """
    text = without_home(path)
    return f"~/{shlex.quote(text[2:])}" if text.startswith("~/") else shlex.quote(text)
