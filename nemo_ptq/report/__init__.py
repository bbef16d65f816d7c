# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What a job has done and how well: measurements, and the page, the picture and the model card made of them."""
