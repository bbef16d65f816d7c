# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory as a NeMo model, without running code from the directory.

`description` says what the model is, and whether it can be imported, without torch; `importer` makes NeMo's
configuration and tensors.
"""
