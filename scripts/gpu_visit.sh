#!/bin/bash
# All that needs GPUs, in one visit: bash scripts/gpu_visit.sh OUTDIR
# Steps have time limits of their own and go on after failures; logs lie in OUTDIR, a table of results comes last.
# SECONDS_LEFT (default 470) bounds the visit; steps that no longer fit are skipped and say so.
set -u
out=${1:?usage: gpu_visit.sh OUTDIR}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_ALLOC_CONF=expandable_segments:True HF_HUB_OFFLINE=1
unset PYTHONDONTWRITEBYTECODE
python=${PYTHON:-python3}
left=${SECONDS_LEFT:-470}
summary=$out/summary.txt
: >"$summary"

facts() {
    nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.max.sm --format=csv
    nvidia-smi topo -m
    timeout -k 5 60 "$python" scripts/gpu_facts.py
}

# step LOG LIMIT NAME COMMAND...: run with a limit, keep its output, note how it ended.
step() {
    local log=$out/$1 limit=$2 name=$3 began=$SECONDS code
    shift 3
    local room=$((left - SECONDS))
    if [ "$room" -lt 15 ]; then
        echo "skipped  $name: the visit's time is used up" | tee -a "$summary"
        return
    fi
    [ "$limit" -gt "$room" ] && limit=$room
    echo "=== $name ($*)" | tee -a "$log"
    if [ "$1" = facts ]; then
        facts 2>&1 | tee -a "$log"
        code=${PIPESTATUS[0]}
    else
        timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$log"
        code=${PIPESTATUS[0]}
    fi
    echo "code $code  $((SECONDS - began)) s  $name" >>"$summary"
}

puzzle() { # puzzle LOG LIMIT NAME ARGUMENTS...
    local log=$1 limit=$2 name=$3
    shift 3
    step "$log" "$limit" "$name" "$python" -m puzzle.cli bench "$@"
}

step facts.log 60 facts facts
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -1)
rows="$out/results.jsonl"

if [ "$gpus" -eq 0 ]; then
    echo "no GPU here" && exit 1
fi
# What needs several GPUs comes first where there are several: one GPU is easier to come by.
if [ "$gpus" -ge 2 ]; then
    puzzle check.log 110 "check on 2 GPUs" check --world 2 --models llama,qwen2,mid
    [ "$gpus" -ge 4 ] && puzzle check.log 110 "check on 4 GPUs" check --world 4 --models llama,qwen2
    pairs=("1,2,1:2,1,1" "2,1,1:1,2,1")
    [ "$gpus" -ge 4 ] && pairs=("1,4,1:2,2,1" "2,2,1:1,4,1" "1,4,1:4,1,1")
    puzzle switch.log 110 "switch" switch --pairs "${pairs[@]}" --out "$rows"
    puzzle train.log 60 "7B, pp 2" train --layout 1,2,1 --modes compile --repeats 3 --microbatches 8 --out "$rows"
    puzzle train.log 60 "7B, tp 2" train --layout 2,1,1 --modes compile --repeats 3 --out "$rows"
fi
puzzle check.log 110 "check on 1 GPU" check --world 1
puzzle train.log 110 "7B, gradients summed" train --out "$rows"
if [ "${memory:-0}" -gt 140000 ]; then layers=32; else layers=16; fi
puzzle train.log 80 "7B shape with AdamW, $layers layers" train --layers "$layers" --optimizer --modes compile --repeats 3 --out "$rows"
puzzle generate.log 130 "generate 7B" generate --batches 32,128,256 --out "$rows"

{
    echo
    grep -h -E '^(FAIL|error)' "$out"/*.log
    grep -h -E ' MFU |tokens/s' "$out"/*.log
    [ -f "$out/switch.log" ] && tail -n 12 "$out/switch.log"
    grep -h -c '^ok ' "$out/check.log" | sed 's/$/ comparisons held/'
    echo
    cat "$summary"
} >"$out/table.txt" 2>/dev/null
rm -f "$summary"
cat "$out/table.txt"
