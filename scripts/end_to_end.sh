#!/usr/bin/env bash
# The end-to-end family: figures 8, 11, 12 and table 3. Options as of RUNME-b.sh.
exec "$(dirname "$(dirname "$(readlink -f "$0")")")/RUNME-b.sh" --only figure8 figure11 figure12 table3 "$@"
