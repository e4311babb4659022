# Sourced by the other scripts: makes the project's virtual environment once and puts it first on the PATH.
# VENV chooses its folder, PYTHON the interpreter it is made from. VENV=none: the Python at hand, with all it needs.
set -euo pipefail
trap 'exit 130' INT # a run that Ctrl-C ended in order is no reason to begin the next
trap 'exit 143' TERM
cd "$(dirname "${BASH_SOURCE[0]}")/.."

use_environment() { # use_environment EXTRAS, for example: use_environment mpi,test
  local venv=${VENV:-.venv} stamp
  if [ "$venv" = none ]; then
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    return
  fi
  stamp="$venv/.installed-$(printf '%s %s' "$1" "$PWD" | cat - setup.py | cksum | tr ' ' '-')"
  if [ ! -x "$venv/bin/python" ]; then
    echo "making the virtual environment $venv"
    "${PYTHON:-python3}" -m venv "$venv"
  fi
  if [ ! -e "$stamp" ]; then
    echo "installing into $venv (PyTorch is large: a few minutes the first time)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$1]"
    touch "$stamp"
  fi
  PATH="$(cd "$venv/bin" && pwd):$PATH"
  export PATH
}

choose_prediction() { # choose_prediction v|xstart|eps: the network's flags for it, in the array `prediction`
  case $1 in
    v | xstart) prediction=(--predict_"$1" True) ;;
    eps) prediction=(--predict_v False) ;;
    *) echo "error: PREDICT is $1; choose v, xstart or eps" >&2; exit 2 ;;
  esac
}
