#!/bin/bash
# A 7B actor with a 7B critic in eight layouts of training and generation on four GPUs: predicted, run, compared.
#   bash scripts/layouts_visit.sh predict CALIBRATION FILE   one JSON line per layout, the fastest first; no GPU
#   bash scripts/layouts_visit.sh run OUTDIR                 at most SECONDS_LEFT (default 540) seconds
#   bash scripts/layouts_visit.sh compare CALIBRATION OUTDIR [FILE]   measured beside predicted, and what FILE said before
# 16 sequences per GPU, 256 + 256 tokens, random weights, 4 iterations. TINY=1 runs toy sizes on CPUs: it proves
# the script, nothing else.
set -u
what=${1:-} first=${2:-} second=${3:-} third=${4:-}
usage="usage: layouts_visit.sh predict CALIBRATION FILE | run OUTDIR | compare CALIBRATION OUTDIR [FILE]"
case "$what${first:+1}${second:+2}" in
predict12 | run1 | compare12) ;;
*) echo "$usage" >&2 && exit 2 ;;
esac
there() { # there PATH: absolute, also after the folder changes
    case "$1" in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac
}
[ "$what" = predict ] && file=$(there "$second")
[ "$what" = compare ] && out=$(there "$second") && { [ -z "$third" ] || third=$(there "$third"); }
[ "$what" = run ] && mkdir -p "$first" && out=$(cd "$first" && pwd)
[ -f "$first" ] && first=$(there "$first")
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export PYTORCH_ALLOC_CONF=expandable_segments:True
unset PYTHONDONTWRITEBYTECODE
python=${PYTHON:-python3}
left=${SECONDS_LEFT:-540}

# train -> generate, and whether both models train in one pipeline
pairs=(
    "1,4,1 2,2,1 fused" "1,4,1 4,1,1 fused" "1,4,1 1,4,1 apart" "2,1,2 4,1,1 apart"
    "2,2,1 4,1,1 apart" "1,2,2 2,2,1 apart" "2,2,1 2,2,1 apart" "4,1,1 4,1,1 apart"
)
device=cuda dtype=bf16 length=256 batch=64 microbatch=8 model="{init: {preset: 7b}}" name=4xGPU
if [ -n "${TINY:-}" ]; then
    pairs=("1,2,1 2,1,1 fused" "1,2,1 1,2,1 apart")
    device=cpu dtype=fp32 length=8 batch=8 microbatch=2 name=cpu
    model="{init: {vocab_size: 259, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 4, num_attention_heads: 8, num_key_value_heads: 2}}"
fi
work=$(mktemp --suffix .yaml)
trap 'rm -f "$work"' EXIT
cat >"$work" <<YAML
device: $device
dtype: $dtype
iterations: 4
batch: $batch
data: {random_tokens: $length}
generation: {min_new_tokens: $length, max_new_tokens: $length, greedy: true}
algorithm: {microbatch: $microbatch}
actor: $model
critic: $model
reward: $model
checkpoint: {save: false}
log: {samples: 4, tensorboard: false, plots: false, cluster: $name, actor: 7B, critic: 7B, provenance: measured}
YAML

options() { # options TP,PP,DP TP,PP,DP fused|apart: as on a command line
    local axes fuse=false
    IFS=, read -ra axes <<<"$1,$2"
    [ "$3" = fused ] && fuse=true
    echo --layout.tp "${axes[0]}" --layout.pp "${axes[1]}" --layout.dp "${axes[2]}" --generation.layout.tp "${axes[3]}" \
        --generation.layout.pp "${axes[4]}" --generation.layout.dp "${axes[5]}" --intra.fuse_training $fuse --intra.fuse_inference $fuse
}

folder() { # folder TP,PP,DP TP,PP,DP fused|apart
    echo "${1//,/-}_${2//,/-}_$3"
}

predict() {
    local pair row
    for pair in "${pairs[@]}"; do
        read -r train generate how <<<"$pair"
        # shellcheck disable=SC2046 # words are wanted
        row=$("$python" -m puzzle.cli plan predict --config "$work" --calibration "$first" $(options "$train" "$generate" "$how") --json) || exit 1
        "$python" -c '
import json, sys
row = json.loads(sys.argv[2])
keys = ("end_to_end", "stages", "memory", "notes", "engine")
print(json.dumps({"run": sys.argv[1], "calibration": sys.argv[3].rpartition("/")[2], **{k: row[k] for k in keys}}))
' "$(folder "$train" "$generate" "$how")" "$row" "$first"
    done | "$python" -c '
import json, sys
rows = sorted(map(json.loads, sys.stdin), key=lambda row: row["end_to_end"])
sys.stdout.writelines(json.dumps(row) + "\n" for row in rows)
' >"$file"
    cat "$file"
}

run() {
    local pair began room code
    for pair in "${pairs[@]}"; do
        read -r train generate how <<<"$pair"
        began=$SECONDS room=$((left - SECONDS))
        if [ "$room" -lt 30 ]; then
            echo "skipped  $pair: the time is used up" | tee -a "$out/summary.txt"
            continue
        fi
        # shellcheck disable=SC2046 # words are wanted
        timeout -k 5 "$((room < 120 ? room : 120))" "$python" -m puzzle.cli train --config "$work" \
            --out "$out/$(folder "$train" "$generate" "$how")" $(options "$train" "$generate" "$how")
        code=$?
        echo "code $code  $((SECONDS - began)) s  $pair" | tee -a "$out/summary.txt"
    done
}

compare() {
    "$python" -m puzzle.cli plan compare "$out" --calibration "$first" || exit
    "$python" -c '
import json, sys
from pathlib import Path
from statistics import fmean
measured = {}
for log in sorted(Path(sys.argv[1]).glob("*/run.jsonl")):
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    seconds = [row["e2e_seconds"] for row in rows if row["record"] == "iteration"]
    if seconds:
        measured[log.parent.name] = fmean(seconds[1:] or seconds)
order = sorted(measured, key=measured.get)
said = [json.loads(line) for line in open(sys.argv[2])] if sys.argv[2] else []
said = {row["run"]: row["end_to_end"] for row in said if row["run"] in measured}
print()
for run in order:
    before = f"{said[run]:8.3f} s predicted before  " if run in said else ""
    print(f"{measured[run]:8.3f} s measured  {before}{run}")
if said:
    chosen = min(said, key=said.get)
    print(f"regret of {chosen}, predicted to be the fastest: {measured[chosen] / measured[order[0]] - 1:.1%}")
' "$out" "$third"
}

"$what"
