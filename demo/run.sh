#!/usr/bin/env bash
# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
#
# Quantizes the demo's checkpoint with the nemo command, on two processes, checks and evaluates what came out, exports it
# in other formats from the same calibration, and shows it. `make demo` runs it.
set -euo pipefail
cd "$(dirname "$0")/.."

export NEMORUN_HOME="$PWD/build/nemo_run" # where NeMo-Run keeps its logs; the default is ~/.nemo_run
export OMP_NUM_THREADS=1

set -x
nemo-ptq plan build/demo/nemo --device CPU \
    calibration_tp=2 \
    quantization_config.algorithm=fp8 \
    quantization_config.calibration_dataset=build/demo/text/calibration.jsonl \
    quantization_config.calibration_dataset_size=480 \
    export_config.path=build/demo/qnemo-fp8 \
    export_config.overwrite=true
nemo llm ptq \
    nemo_checkpoint=build/demo/nemo \
    calibration_tp=2 \
    quantization_config.algorithm=fp8 \
    quantization_config.calibration_dataset=build/demo/text/calibration.jsonl \
    quantization_config.calibration_dataset_size=480 \
    export_config.inference_tp=1 \
    export_config.path=build/demo/qnemo-fp8 \
    export_config.overwrite=true \
    run.executor=torchrun \
    run.executor.ntasks_per_node=2 \
    --yes
nemo-ptq verify build/demo/qnemo-fp8
nemo-ptq evaluate build/demo/qnemo-fp8 --baseline build/demo/nemo --text build/demo/text/heldout.jsonl \
    --documents 32 --seq-len 256 --min-recovery 0.98
nemo-ptq export build/demo/qnemo-fp8 build/demo/fp8 --format hf,compressed_tensors --overwrite
{ set +x; } 2>/dev/null

python -m demo.contents build/demo/qnemo-fp8
python -W ignore -m demo.perplexity
echo "The report of the export, for a browser: $PWD/build/demo/qnemo-fp8/ptq/report.html"
