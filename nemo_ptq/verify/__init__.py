# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""An independent reader of exported directories, in every format: files -> checks -> tensors -> logits.

Nothing here is shared with the exporters: what this package knows about a format it has from the format's description
and from the behaviour of its readers, so that a mistake in one is noticed by the other.
"""
