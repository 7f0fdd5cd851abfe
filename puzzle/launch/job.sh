#!/usr/bin/env bash
# The batch script of every job: on the job's first node the preamble of slurm.yaml, then its arguments.
if [ -n "${PUZZLE_PREAMBLE:-}" ]; then
  eval "$PUZZLE_PREAMBLE" || {
    echo "error: the preamble of slurm.yaml failed on $(hostname), see above" >&2
    exit 2
  }
fi
exec "$@"
