#!/usr/bin/env bash
# The whole check of the project: lint, then the tests. Installs what it needs (tier dev) on first use.
#   ./scripts/test.sh [--slurm] [--long] [pytest's arguments: files, -k, ...]
# --slurm (root; Debian) runs the tests under Slurm, too, in a private one of four nodes on this host.
set -euo pipefail
root=$(dirname "$(readlink -f "$0")")/..
export PUZZLE_ENV=dev
. "$root/env.sh"
cd "$root"

for word in "$@"; do
  if [ "$word" = --slurm ]; then
    private=$(mktemp -d -t slurm-XXXXXX)
    trap './scripts/slurm/cluster.sh stop "$private"; rm -rf "$private"' EXIT
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
