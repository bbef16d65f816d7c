# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory as a NeMo model, without running code from the directory.

`files` and `description` need no torch; `importer` makes NeMo's configuration and tensors.
"""
