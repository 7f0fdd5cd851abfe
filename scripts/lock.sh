#!/usr/bin/env bash
# Writes requirements/*.txt anew from pyproject.toml: today's versions, the same in every tier. Tier dev.
#   ./scripts/lock.sh [--upgrade-package NAME ...]   without arguments every version is renewed
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
export PUZZLE_ENV=dev
. ./env.sh
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# torch is left out because its build depends on the machine, setuptools and Triton because torch says which
# ones it takes.
compile() {
  uv pip compile --quiet --no-header --no-annotate --python-version 3.11 --no-emit-package torch \
    --no-emit-package setuptools --no-emit-package puzzle-rlhf "$@"
}

[ $# = 0 ] || cp requirements/dev.txt "$work/dev.txt"
compile "$@" --extra dev pyproject.toml -o "$work/dev.txt" >/dev/null
compile --extra baseline pyproject.toml --constraint "$work/dev.txt" -o "$work/baseline.txt" >/dev/null
compile --extra plot --extra options pyproject.toml --constraint "$work/dev.txt" -o "$work/engine.txt" >/dev/null
python -c 'import sys; sys.path.append("scripts"); import tiers; print(*tiers.extra("plot"), sep="\n")' >"$work/plot.in"
compile "$work/plot.in" --constraint "$work/dev.txt" -o "$work/plot.txt" >/dev/null
for tier in plot engine baseline dev; do
  # The CUDA libraries come with the torch that wants them.
  grep -vE '^(nvidia-|cuda-|triton==)' "$work/$tier.txt" >"requirements/$tier.txt"
done
wc -l requirements/*.txt
