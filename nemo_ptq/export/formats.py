# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The export formats, by their names in :data:`nemo_ptq.formats.FORMATS`: what writes each of them.

A format is a record there, which says what it can carry, and a writer here. A writer of Hugging Face's or
TensorRT-LLM's files is a layout table (:class:`~nemo_ptq.export.layout.Layout`) that
:func:`~nemo_ptq.export.stream.write_files` streams, and the documents beside the tensors.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from nemo_ptq.export.qnemo import write_qnemo
from nemo_ptq.export.qnemo_config import check_exportable
from nemo_ptq.export.shape import ModelShape
from nemo_ptq.export.source import Source
from nemo_ptq.families import Family

# Called on every rank with the model and an existing empty directory; writes all but ptq/, and returns the files that
# this rank has written itself, so that it can compute their checksums.
Writer = Callable[[Source, Path], list[Path]]

# Raises PtqError for a model that the format's readers would load and compute something else from.
ModelCheck = Callable[[ModelShape, Family], None]

WRITERS: Mapping[str, Writer] = {"trtllm": write_qnemo}
CHECKS: Mapping[str, ModelCheck] = {"trtllm": check_exportable}
