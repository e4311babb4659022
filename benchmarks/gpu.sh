#!/usr/bin/env bash
# Everything that needs a GPU, in the order of its worth: tests on CUDA, the benchmarks at the published size, and, where
# CAMVID names its folder, CamVid from scratch (scripts/camvid.sh).
# usage: [PARTS="tests sampling training"] bash benchmarks/gpu.sh [OUT]
#   OUT     folder of figures and plots (default benchmarks/results)
#   PARTS   what to run, where time is limited: tests sampling training variants camvid (default: all)
camvid=${CAMVID:+$(realpath "$CAMVID" 2> /dev/null)}
source "$(dirname "$0")/../scripts/common.sh"
out=${1:-benchmarks/results}
parts=${PARTS:-tests sampling training variants camvid}
for part in $parts; do # all that can be wrong is found before the first of them runs
  case $part in
    tests | sampling | training | variants) ;;
    camvid)
      [ -z "${CAMVID+set}" ] || [ -d "$camvid" ] || refuse "CAMVID is ${CAMVID:-empty}, no folder; name that of CamVid, or leave CAMVID unset"
      check_number RANKS 1
      check_number STEPS 24 24
      check_number SEED 0 ;;
    *) refuse "PARTS has $part; choose from tests sampling training variants camvid" ;;
  esac
done
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=()
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || exit
for part in $parts; do
  echo "== $part"
  case $part in
    tests) python -m pytest tests/test_cuda.py tests/test_label_layout.py tests/test_golden.py ;;
    # a batch, since of a single image it would measure how fast kernels are launched
    sampling) python benchmarks/sampling.py --device cuda --batch 8 --out "$out" ;;
    training) python benchmarks/training.py --device cuda --out "$out/training_cuda.json" ;;
    # decides what is to be the default: compiled or not, as a CUDA graph or not, our group norm or PyTorch's
    variants) python benchmarks/sampling.py --device cuda --variants 1,2,8 --out "$out" ;;
    camvid) [ -z "${CAMVID:-}" ] || VENV=none SIZE=gpu CAMVID=$camvid bash scripts/camvid.sh ;;
  esac || failed+=("$part") # what comes after is worth having all the same
done
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
