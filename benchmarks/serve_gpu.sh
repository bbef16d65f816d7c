#!/usr/bin/env bash
# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
#
# What vLLM on a GPU makes of exports: whether it loads them, how far its answers are from our reader's, and how fast it
# serves. Needs vLLM and nothing of nemo_ptq; the exports are made beforehand, on any machine: make serve-exports.
#
#   bash benchmarks/serve_gpu.sh [load] [parallel] [speed] [table]      # all, unless some are named
#
# It goes on where it was stopped: what has an answer in build/serve-results is not asked again. PYTHON names the Python
# that has vLLM, JOBS how many exports are loaded at once, EXPORTS and RESULTS other folders.

set -euo pipefail
cd "$(dirname "$0")/.."
steps="${*:-load parallel speed table}"
python=${PYTHON:-python3} jobs=${JOBS:-6} exports=${EXPORTS:-build/serve} results=${RESULTS:-build/serve-results}
quantized_as=(no_quant/hf fp8-kv/hf int8_sq/compressed_tensors int4_awq/compressed_tensors w4a8_awq/compressed_tensors nvfp4/hf)
mkdir -p "$results/logs"

wants() { [[ " $steps " == *" $1 "* ]]; }

if wants load; then
    for ((job = 0; job < jobs; job++)); do
        "$python" tests/serve/ask_vllm.py "$exports" "$results/answers" --share "$job/$jobs" >"$results/logs/load-$job" 2>&1 &
    done
    wait
    cat "$results"/logs/load-* | grep "^RESULT" || echo "nothing was loaded: see $results/logs"
fi

if wants parallel && [[ $(nvidia-smi --list-gpus | wc -l) -ge 2 ]]; then
    "$python" tests/serve/ask_vllm.py "$exports" "$results/answers-tp2" --tensor-parallel 2 \
        "${quantized_as[@]/#/demo/}" >"$results/logs/parallel" 2>&1 || true
    grep "^RESULT" "$results/logs/parallel" || echo "nothing was loaded: see $results/logs"
fi

if wants speed; then
    # One that vLLM refuses does not end the others.
    printf '%s\n' "${quantized_as[@]/#/demo/}" | xargs -P "$jobs" -I EXPORT bash -c \
        '"$0" benchmarks/serve_speed.py "$1" "$2/speed" EXPORT >"$2/logs/speed-$(tr / . <<<EXPORT)" 2>&1 || echo "EXPORT was not measured: see $2/logs"' \
        "$python" "$exports" "$results"
fi

if wants table; then
    "$python" benchmarks/serve_table.py "$exports" "$results/answers" "$results/speed"
    if [[ -d $results/answers-tp2 ]]; then
        "$python" benchmarks/serve_table.py "$exports" "$results/answers-tp2"
    fi
fi
