#!/usr/bin/env bash
# Everything that needs a GPU, in the order of its worth: tests on CUDA, the benchmarks at the published size, and, where
# CAMVID names its folder, CamVid from scratch (scripts/camvid.sh).
# usage: bash benchmarks/gpu.sh [OUT]      figures and plots go to OUT (default benchmarks/results)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python -m pytest tests/test_cuda.py tests/test_label_layout.py tests/test_golden.py 2>&1 | tail -20
python benchmarks/sampling.py --device cuda --out "$out"
python benchmarks/sampling.py --device cuda --compile --out "$out/compiled"
python benchmarks/training.py --device cuda --out "$out/training_cuda.json"
if [ -n "${CAMVID:-}" ]; then VENV=none SIZE=gpu bash scripts/camvid.sh; fi
