#!/usr/bin/env bash
# Everything that reads the code without running it: ruff (rules and format), ty (types), shellcheck. Tier dev.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
export PUZZLE_ENV=dev
. ./env.sh

# Installs shellcheck where that takes no question: root on a Debian-like system.
find_shellcheck() {
  command -v shellcheck >/dev/null && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "lint: installing shellcheck (apt-get)" >&2
    export DEBIAN_FRONTEND=noninteractive
    { apt-get -qq update && apt-get -qq install -y shellcheck; } </dev/null >/dev/null && return
  fi
  echo "error: shellcheck is not installed; install it (Debian, Ubuntu: apt-get install shellcheck)" >&2
  return 2
}

# Shell files: named *.sh, or with a shell in their first line.
shell_files() {
  git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
    [ -f "$file" ] || continue
    if [[ $file == *.sh ]] || head -n 1 "$file" | LC_ALL=C grep -aqE '^#!.*\b(ba)?sh\b'; then
      printf '%s\0' "$file"
    fi
  done
}

failed=0
step() {
  echo "lint: $1"
  shift
  "$@" || failed=1
}

find_shellcheck
mapfile -d '' shells < <(shell_files)
step "ruff check" python -m ruff check --output-format concise .
step "ruff format" python -m ruff format --check .
step "ty" python -m ty check --python "$(python -c 'import sys; print(sys.prefix)')"
step "shellcheck (${#shells[@]} files)" shellcheck "${shells[@]}"
exit "$failed"
