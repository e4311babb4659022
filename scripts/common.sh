# Sourced by the other scripts: checks what they take from the environment, makes the project's virtual environment once
# and puts it first on the PATH.
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

refuse() { # refuse MESSAGE: ends the script before it has written anything
  echo "error: $1" >&2
  exit 2
}

# check_number NAME LEAST [MULTIPLE [WHY]]: the variable NAME, where the environment has it, is a whole number of LEAST or
# more, and a multiple of MULTIPLE. An empty one is refused too: it would silently stand for the default.
check_number() {
  local name=$1 least=$2 multiple=${3:-1} why=${4:+ ($4)} kind="a whole number" value
  [ -n "${!name+set}" ] || return 0
  value=${!name}
  [ "$multiple" = 1 ] || kind="a multiple of $multiple"
  # The pattern first: what is no number must not be computed with. 18 digits fit bash's 64 bits; 08 would be octal.
  if ! [[ $value =~ ^(0|[1-9][0-9]{0,17})$ ]] || ((value < least || value % multiple)); then
    refuse "$name is ${value:-empty}; give $kind, $least or more$why, or leave $name unset for the default"
  fi
}

choose_prediction() { # choose_prediction v|xstart|eps: the network's flags for it, in the array `prediction`
  case $1 in
    v | xstart) prediction=(--predict_"$1" True) ;;
    eps) prediction=(--predict_v False) ;;
    *) refuse "PREDICT is ${1:-empty}; choose v, xstart or eps" ;;
  esac
}
