# shellcheck shell=bash
# The environment of this checkout. Source it from bash or zsh, from any folder: `. ./env.sh`.
#
#   PUZZLE_ENV=plot|engine|baseline|dev  the tier, installed into .venv on first use; each holds the one before.
#                                        Without it: the richest tier already built, else plot.
#   PUZZLE_PYTHON=/path/to/python        use this interpreter as it is and install nothing.
#   PUZZLE_WHEELS=DIR                    install from this folder of wheels, without a network.
#
# Afterwards `python` and `puzzle` are this checkout's. Returns 2, having said why, if that cannot be had.

# Prints the first interpreter that can run the installer: the environment's own, else one of Python >= 3.11
# (3.11 and 3.12, which the locks are made for, before newer ones).
_puzzle_find_python() {
  local candidate limit
  if "$1/.venv/bin/python" -I -c '' 2>/dev/null; then
    printf '%s\n' "$1/.venv/bin/python"
    return 0
  fi
  for limit in 13 99; do
    for candidate in python3 python3.12 python3.11 python3.13 python3.14; do
      if "$candidate" -I -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, $limit))" 2>/dev/null; then
        printf '%s\n' "$candidate"
        return 0
      fi
    done
  done
  echo "error: PUZZLE needs Python 3.11 or newer, and none is on PATH; install it (Debian 12, Ubuntu 24.04:" \
    "apt-get install python3-venv) or set PUZZLE_PYTHON" >&2
  return 2
}

# Prints the colon-separated list $1 without the entries $2.. .
_puzzle_without() {
  local list=":$1:" entry
  shift
  for entry in "$@"; do
    while :; do
      case "$list" in
        *":$entry:"*) list="${list%%":$entry:"*}:${list#*":$entry:"}" ;;
        *) break ;;
      esac
    done
  done
  list="${list#:}"
  printf '%s\n' "${list%:}"
}

_puzzle_activate() {
  local root python front rest
  if [ -n "${ZSH_VERSION:-}" ]; then
    eval 'root="${(%):-%x}"'
  else
    root="${BASH_SOURCE[0]}"
  fi
  root="$(readlink -f "$root")" || return 2
  root="${root%/*}"

  if [ -n "${PUZZLE_PYTHON:-}" ]; then
    if ! python="$(command -v "$PUZZLE_PYTHON")" ||
      ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "error: PUZZLE_PYTHON=$PUZZLE_PYTHON is no Python >= 3.11 that runs; give the path of an interpreter" >&2
      return 2
    fi
    case "$python" in /*) ;; *) python="$PWD/$python" ;; esac
    "$python" "$root/scripts/setup_env.py" check ${PUZZLE_ENV:+"$PUZZLE_ENV"} || return 2
    export PUZZLE_PYTHON="$python"
    front="$root/scripts/shims:$root/scripts/bin"
    if [ "${VIRTUAL_ENV:-}" = "$root/.venv" ]; then unset VIRTUAL_ENV; fi
  else
    python="$(_puzzle_find_python "$root")" || return 2
    "$python" -E -s "$root/scripts/setup_env.py" ensure ${PUZZLE_ENV:+"$PUZZLE_ENV"} || return 2
    front="$root/.venv/bin:$root/scripts/bin"
    export VIRTUAL_ENV="$root/.venv"
  fi
  rest="$(_puzzle_without "$PATH" "$root/.venv/bin" "$root/scripts/bin" "$root/scripts/shims")"
  export PATH="$front:$rest"
  rest="$(_puzzle_without "${PYTHONPATH:-}" "$root")"
  export PYTHONPATH="$root${rest:+:$rest}"
  # Compiled modules are kept: without them every `import torch` costs seconds.
  unset PYTHONHOME PYTHONDONTWRITEBYTECODE
}

if [ -z "${BASH_VERSION:-}${ZSH_VERSION:-}" ]; then
  echo "error: env.sh is for bash and zsh; source it from one of them" >&2
  return 2
elif _puzzle_activate; then
  unset -f _puzzle_activate _puzzle_find_python _puzzle_without
else
  unset -f _puzzle_activate _puzzle_find_python _puzzle_without
  return 2
fi
