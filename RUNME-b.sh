#!/usr/bin/env bash
# Runs the experiments of figures 8-12 and table 3 on this machine or cluster, then draws them. Installs what it needs
# (tier baseline) on first use; an interpreter given by PUZZLE_PYTHON may do without the baseline.
#   ./RUNME-b.sh [--scale cpu|gpu|node|paper] [--launcher local|ray|slurm] [--only figure9 ...] [--dry-run]
#                [--iterations N] [--repeats N] [--minutes M] [--out DIR] [--cluster NAME]
# Started again it goes on: finished runs are kept. Default output: outputs_from_exec_<time>/ here.
set -euo pipefail
root=$(dirname "$(readlink -f "$0")")
began=$(date '+%Y-%m-%d %H:%M:%S')
export PUZZLE_ENV="${PUZZLE_ENV:-$([ -n "${PUZZLE_PYTHON:-}" ] && echo engine || echo baseline)}"
. "$root/env.sh"

echo "start: $began"
status=0
python -P -m puzzle.cli campaign "$@" || status=$?
echo "end: $(date '+%Y-%m-%d %H:%M:%S'), duration: $SECONDS s"
exit "$status"
