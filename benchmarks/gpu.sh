#!/usr/bin/env bash
# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
#
# What a machine with a GPU can show: the tests marked gpu, the speed table, and where there are two GPUs the demo at
# tensor parallelism 2 over NCCL, compared with one GPU. Needs the demo's checkpoint (make checkpoint).
#
#   bash benchmarks/gpu.sh [tests] [speed] [parallel]     # all three, unless some are named

set -euo pipefail
cd "$(dirname "$0")/.."
steps="${*:-tests speed parallel}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

wants() { [[ " $steps " == *" $1 "* ]]; }

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv

if wants tests; then
    python -m pytest -m gpu tests/gpu
fi

if wants speed; then
    # Memory, where there is enough: a disk's speed is not what is measured.
    python -m benchmarks.speed --directory "$([[ -w /dev/shm ]] && echo /dev/shm || echo "$work")"
fi

if wants parallel && [[ $(nvidia-smi --list-gpus | wc -l) -ge 2 ]]; then
    for algorithm in fp8 int8_sq int4_awq; do
        for ranks in 1 2; do
            torchrun --nproc_per_node $ranks -m nemo_ptq.script --nemo_checkpoint=build/demo/nemo \
                --calibration_tp=$ranks --algorithm=$algorithm --quality=fast --calibration_dataset=build/demo/text/calibration.jsonl \
                --export_path="$work/$algorithm-tp$ranks"
        done
        echo "$algorithm, calibrated at TP 2 and at TP 1:"
        python -m benchmarks.compare "$work/$algorithm-tp2" "$work/$algorithm-tp1"
    done
fi
