#!/usr/bin/env bash
# The batch script of every job: runs its arguments on the job's first node.
exec "$@"
