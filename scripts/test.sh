#!/usr/bin/env bash
# The whole check of the project: lint, then the tests. Installs what it needs (tier dev) on first use.
#   ./scripts/test.sh [--slurm] [--long] [pytest's arguments: files, -k, ...]
# --slurm (root; Debian) runs the tests under Slurm, too, in a private one of four nodes on this host.
set -euo pipefail
root=$(dirname "$(readlink -f "$0")")/..
export PUZZLE_ENV=dev
. "$root/env.sh"
cd "$root"

private=
clean() {
  [ -z "$private" ] || ./scripts/slurm/cluster.sh stop "$private"
  rm -rf "$private" "$PYTHONPYCACHEPREFIX"
}
# Hundreds of processes import the same modules: their byte code is kept as long as this runs, also where a host
# asks Python to write none, and not in the checkout, at which tests look.
PYTHONPYCACHEPREFIX=$(mktemp -d -t pycache-XXXXXX)
export PYTHONPYCACHEPREFIX
unset PYTHONDONTWRITEBYTECODE
trap clean EXIT

for word in "$@"; do
  if [ "$word" = --slurm ]; then
    private=$(mktemp -d -t slurm-XXXXXX)
    ./scripts/slurm/cluster.sh start "$private"
    export SLURM_CONF="$private/slurm.conf"
  fi
done
lint=0
./scripts/lint.sh || lint=$?
# Two workers: many tests start several processes themselves. A file stays on one worker, with its fixtures.
tests=0
python -m pytest -n 2 --dist loadfile -q "$@" </dev/null || tests=$?
[ "$lint" = 0 ] || echo "error: lint failed, see above" >&2
[ "$lint" = 0 ] && [ "$tests" = 0 ]
