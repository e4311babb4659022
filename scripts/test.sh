#!/usr/bin/env bash
# The whole check: lint, formatting and every test. Arguments go to pytest: bash scripts/test.sh tests/test_unet.py -x
# Daily work, in under two minutes: bash scripts/test.sh -m "not slow"
source "$(dirname "$0")/common.sh"
use_environment mpi,test
ruff check .
ruff format --check .
python -m pytest -n 2 --dist loadfile "$@" # two processes: a file of tests shares what it prepares
