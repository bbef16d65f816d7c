# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory as a NeMo model, without running code from the directory.

`description` describes the model, and says whether it can be imported, without torch; `importer` makes NeMo's
configuration and tensors.
"""
