# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""An independent reader of qnemo directories: files -> checks -> tensors -> logits.

Nothing here is shared with the exporter: what this package knows about the format it has from the format's description
and from the behaviour of TensorRT-LLM's checkpoint reader, so that a mistake in one is noticed by the other.
"""
