#!/usr/bin/env bash
# Draws figures 8-12 and table 3 from logs. Installs what it needs (tier plot) on first use.
#   ./RUNME-a.sh [--logs DIR] [--out DIR] [--only figure8 ...] [--reading published|corrected]
# Without --logs: the published measurements, logs/published, and our own, logs/baseline/{2,4}xh200 and what lies in
# logs/campaign. Without --out: outputs_from_logs_<time>/ here.
set -euo pipefail
root=$(dirname "$(readlink -f "$0")")
echo "start: $(date '+%Y-%m-%d %H:%M:%S')"
export PUZZLE_ENV="${PUZZLE_ENV:-plot}"
. "$root/env.sh"

status=0
python -P -m puzzle.plotting "$@" || status=$?
echo "end: $(date '+%Y-%m-%d %H:%M:%S'), duration: $SECONDS s"
exit "$status"
