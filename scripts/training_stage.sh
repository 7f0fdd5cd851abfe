#!/usr/bin/env bash
# The training-stage family: figures 9 and 10. Options as of RUNME-b.sh.
exec "$(dirname "$(dirname "$(readlink -f "$0")")")/RUNME-b.sh" --only figure9 figure10 "$@"
