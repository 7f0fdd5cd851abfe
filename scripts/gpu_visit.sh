#!/bin/bash
# What needs GPUs, in one visit: bash scripts/gpu_visit.sh OUTDIR [PART...]
# Parts: check switch fuse memory save layouts single (docs/performance.md); all that the host's GPUs allow by default.
# Steps have time limits of their own and go on after failures; logs lie in OUTDIR, a table of results comes last.
# SECONDS_LEFT (default 590) bounds the visit; steps that no longer fit are skipped and say so.
set -u
out=${1:?usage: gpu_visit.sh OUTDIR [PART...]}
shift
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
unset PYTHONDONTWRITEBYTECODE
python=${PYTHON:-python3}
left=${SECONDS_LEFT:-590}
rows=$out/results.jsonl
summary=$out/summary.txt
: >"$summary"
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
[ "$gpus" -eq 0 ] && echo "no GPU here" && exit 1
parts=("$@")
if [ ${#parts[@]} -eq 0 ]; then
    parts=(check single)
    [ "$gpus" -ge 2 ] && parts=(check switch layouts single)
    [ "$gpus" -ge 4 ] && parts=(check switch fuse memory save layouts single)
fi

# step LOG LIMIT NAME COMMAND...: run with a limit, keep its output, note how it ended.
step() {
    local log=$out/$1 limit=$2 name=$3 began=$SECONDS code room=$((left - SECONDS))
    shift 3
    if [ "$room" -lt 15 ]; then
        echo "skipped  $name: the visit's time is used up" | tee -a "$summary"
        return
    fi
    [ "$limit" -gt "$room" ] && limit=$room
    echo "=== $name ($*)" | tee -a "$log"
    timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$log"
    code=${PIPESTATUS[0]}
    echo "code $code  $((SECONDS - began)) s  $name" >>"$summary"
}

bench() { # bench LOG LIMIT NAME ARGUMENTS...
    local log=$1 limit=$2 name=$3
    shift 3
    step "$log" "$limit" "$name" "$python" -m puzzle.cli bench "$@"
}

on() { # on GPU COMMAND...: one device, beside the others
    local gpu=$(($1 % gpus))
    shift
    CUDA_VISIBLE_DEVICES=$gpu "$@"
}

part_check() {
    on 0 bench check-1.log 200 "check on 1 GPU" check &
    [ "$gpus" -lt 2 ] || bench check.log 150 "check on $gpus GPUs" check --world "$gpus" --models llama,qwen2
    wait
    bench check.log 150 "whole runs on $gpus GPUs" iterations --world "$gpus"
}

part_switch() {
    local pairs=("1,2,1:2,1,1" "2,1,1:1,1,2" "1,2,1:1,1,2")
    [ "$gpus" -ge 4 ] && pairs=("1,4,1:2,2,1" "1,4,1:4,1,1" "2,2,1:4,1,1" "1,4,1:1,1,4")
    bench switch.log 150 "switch" switch --pairs "${pairs[@]}" --out "$rows"
    NCCL_P2P_DISABLE=1 bench switch.log 100 "switch without peer access" switch --pairs "${pairs[@]}" --repeats 3 --out "$rows"
}

part_fuse() { # two GPUs cannot hold two 7B models in training
    local layers=0
    [ "$gpus" -lt 4 ] && layers=14
    bench fuse.log 150 "fused pipelines" fuse --layout "1,$gpus,1" --layers $layers --compile --out "$rows" --traces "$out/traces"
}

part_memory() {
    bench memory.log 100 "peaks of 7B/350M" memory --layouts "1,$gpus,1" "2,$((gpus / 2)),1" --out "$out/ppo"
    bench memory.log 100 "peaks of 7B/7B" memory --models 7b 7b --layouts "2,$((gpus / 2)),1" --offload.optimizer true --out "$out/ppo"
}

part_save() {
    bench save.log 60 "steps during a save" checkpoint --folder "$out/saves" --model 7b --layers 2 --out "$rows"
}

part_layouts() {
    local half=$((gpus / 2)) layout
    for layout in "$gpus,1,1" "$half,2,1" "1,$gpus,1" "1,1,$gpus"; do
        bench layouts.log 90 "generate on $layout" generate --layout "$layout" --batches 128 --modes graphs \
            --lengths fixed exponential --repeats 3 --out "$rows"
    done
}

part_single() {
    on 0 bench train.log 200 "7B, gradients summed" train --out "$rows" &
    [ "$gpus" -lt 2 ] && wait
    {
        on 1 bench generate.log 240 "generate 7B" generate --out "$rows"
        on 1 bench generate.log 90 "early stop" generate --batches 128 --modes graphs --lengths exponential --repeats 3 --out "$rows"
    } &
    [ "$gpus" -lt 3 ] && wait
    on 2 bench adamw.log 200 "7B with AdamW" train --optimizer --modes compile --repeats 3 --out "$rows" &
    wait
}

{
    nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.max.sm --format=csv
    nvidia-smi topo -m
    timeout -k 5 60 "$python" scripts/gpu_facts.py
} >"$out/facts.log" 2>&1
export PYTORCH_ALLOC_CONF=expandable_segments:True
for part in "${parts[@]}"; do
    "part_$part"
done

{
    echo
    grep -h -E '^(FAIL|error)' "$out"/*.log
    grep -h -E ' MFU |tokens/s' "$out"/*.log
    for log in switch fuse memory save; do
        [ -f "$out/$log.log" ] && tail -n 30 "$out/$log.log"
    done
    cat "$out"/check*.log | grep -c '^ok ' | sed 's/$/ comparisons held/'
    echo
    cat "$summary"
} >"$out/table.txt" 2>/dev/null
rm -rf "$summary" "$out/saves"
packed=$(mktemp)
tar -C "$out" -czf "$packed" --exclude '*.safetensors' . &&
    find "$out" -mindepth 1 -maxdepth 1 ! -name table.txt ! -name results.jsonl -exec rm -rf {} + && mv "$packed" "$out/logs.tgz"
cat "$out/table.txt"
