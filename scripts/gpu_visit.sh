#!/bin/bash
# What needs GPUs, in one visit: bash scripts/gpu_visit.sh OUTDIR [PART...]
# Parts: check switch fuse memory save layouts single end rollout graphs sums (docs/performance.md); by default all but the last four that the
# host's GPUs allow. end: PPO in the published layout and in the planner's. Eight GPUs in two visits of ten minutes:
# check switch layouts, then fuse end. graphs: those of decoding that live on, in seven minutes on one GPU (SECONDS_LEFT=420). rollout: queue, pages and shared prompts, on one GPU or more, in eight minutes (SECONDS_LEFT=480). Set OLD to
# an older checkout of this repository, to time its generation beside this one's. sums: of tensor ranks in decode passes, on two GPUs or more.
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
    [ "$gpus" -ge 8 ] && pairs=("1,8,1:2,4,1" "1,8,1:8,1,1" "2,4,1:4,2,1" "1,1,8:8,1,1")
    bench switch.log 150 "switch" switch --pairs "${pairs[@]}" --out "$rows"
    NCCL_P2P_DISABLE=1 bench switch.log 100 "switch without peer access" switch --pairs "${pairs[@]}" --repeats 3 --out "$rows"
}

part_fuse() { # two GPUs cannot hold two 7B models in training
    local layers=0 counts=(4 8 16 32)
    [ "$gpus" -lt 4 ] && layers=14
    [ "$gpus" -ge 8 ] && counts=(8 16 32)
    bench fuse.log 150 "fused pipelines" fuse --layout "1,$gpus,1" --layers $layers --compile --microbatches "${counts[@]}" \
        --traced 32 --out "$rows" --traces "$out/traces"
}

part_memory() {
    bench memory.log 100 "peaks of 7B/350M" memory --layouts "1,$gpus,1" "2,$((gpus / 2)),1" --out "$out/ppo"
    bench memory.log 100 "peaks of 7B/7B" memory --models 7b 7b --layouts "2,$((gpus / 2)),1" --offload.optimizer true --out "$out/ppo"
}

part_save() {
    bench save.log 60 "steps during a save" checkpoint --folder "$out/saves" --model 7b --layers 2 --out "$rows"
}

part_layouts() {
    local half=$((gpus / 2)) layout layouts sequences=(128) lengths=(fixed exponential)
    layouts=("$gpus,1,1" "$half,2,1" "1,$gpus,1" "1,1,$gpus")
    [ "$gpus" -ge 8 ] && layouts+=("2,4,1") && sequences=(128 512) && lengths=(fixed)
    for layout in "${layouts[@]}"; do
        bench layouts.log 90 "generate on $layout" generate --layout "$layout" --sequences "${sequences[@]}" --modes graphs --repeats 1 \
            --lengths "${lengths[@]}" --repeats 3 --out "$rows"
    done
}

# Sums over tensor ranks in decode passes, by collectives and out of peers' memory: bits and seconds of one, then whole passes.
part_sums() {
    bench check-sums.log 90 "sums of $gpus ranks" sums --world "$gpus" --out "$rows"
    bench sums.log 150 "generate by both ways to sum" generate --layout "$gpus,1,1" --sequences 32 128 --modes graphs \
        --tp-sums collective peer --repeats 3 --out "$rows"
}

# PPO end to end, 16 sequences per GPU, 256 + 256 tokens: base, opt and what the planner takes (CALIBRATION, default h200);
# predictions come first. Two GPUs do not hold two 7B models in training.
part_end() {
    local critic name work how half=$((gpus / 2)) critics=(350m 7b)
    [ "$gpus" -lt 4 ] && critics=(350m)
    for critic in "${critics[@]}"; do
        work=$out/end-$critic.yaml
        cat >"$work" <<YAML
device: cuda
dtype: bf16
iterations: 5
batch: $((16 * gpus))
data: {random_tokens: 256}
generation: {min_new_tokens: 256, max_new_tokens: 256, greedy: true}
algorithm: {microbatch: 8}
actor: {init: {preset: 7b}}
critic: {init: {preset: $critic}}
reward: {init: {preset: $critic}}
checkpoint: {save: false}
log: {samples: 0, tensorboard: false, plots: false, cluster: ${gpus}xGPU, actor: 7B, critic: ${critic^^}, provenance: measured, figures: [figure8]}
YAML
        step "end-$critic-search.log" 60 "layouts searched, 7B/$critic" "$python" -m puzzle.cli plan search --config "$work" \
            --gpus "$gpus" --calibration "${CALIBRATION:-h200}"
        for name in base opt planned; do
            how=(--layout.pp "$gpus")
            [ "$name" = opt ] && how+=(--generation.layout.tp 2 --generation.layout.pp "$half"
                --intra.fuse_training true --intra.fuse_inference true)
            [ "$name" = planned ] && how=(--plan auto --calibration "${CALIBRATION:-h200}")
            step "end-$critic-$name.log" 100 "7B/$critic $name" "$python" -m puzzle.cli train --config "$work" \
                --out "$out/end/$critic-$name" --log.variant "$name" "${how[@]}"
        done
    done
    step end.log 60 "predicted beside measured" "$python" -m puzzle.cli plan compare "$out/end" --calibration "${CALIBRATION:-h200}"
}

part_single() {
    on 0 bench train.log 200 "7B, gradients summed" train --out "$rows" &
    [ "$gpus" -lt 2 ] && wait
    {
        on 1 bench generate.log 240 "generate 7B" generate --repeats 1 --out "$rows"
        on 1 bench generate.log 90 "early stop" generate --sequences 128 --modes graphs --lengths exponential --repeats 3 --out "$rows"
    } &
    [ "$gpus" -lt 3 ] && wait
    on 2 bench adamw.log 200 "7B with AdamW" train --optimizer --modes compile --repeats 3 --out "$rows" &
    wait
}

# The jobs of part_rollout, each on a GPU of its own where there are several.
long=(generate --modes graphs --arms early --repeats 1 --lengths exponential --out "$rows")

rollout_fixed() {
    on 0 bench rollout-fixed.log 100 "fixed lengths" generate --sequences 16 32 64 128 256 --modes graphs --repeats 1 --out "$rows"
    [ -z "${OLD:-}" ] || (cd "$OLD" && PYTHONPATH=$OLD on 0 bench rollout-old.log 100 "fixed lengths, before" generate \
        --batches 16 32 64 128 256 --modes graphs)
    on 0 bench rollout-check.log 100 "queue and pages give the same tokens" check --models llama,qwen2
}

rollout_kept() { # early stop's gain with graphs recorded in every iteration, and once
    on 0 bench rollout-kept.log 100 "graphs that live" generate --sequences 128 --modes graphs kept --lengths exponential \
        --new 256 --repeats 2 --out "$rows"
}

rollout_groups() {
    on 1 bench rollout-groups.log 90 "64 prompts of 8 samples" generate --sequences 512 --repeats 1 --samples 8 --prompt 1024 \
        --modes graphs --out "$rows"
    on 1 bench rollout-groups.log 110 "512 prompts" generate --sequences 512 --prompt 1024 --modes graphs --repeats 1 --out "$rows"
}

rollout_varied() {
    on 2 bench rollout-varied.log 120 "1024 of exponential lengths" "${long[@]}" --sequences 1024 --prompt 64-1024 \
        --new 2048 --mean 512
}

rollout_long() {
    on 3 bench rollout-long.log 320 "2048 of at most 8k" "${long[@]}" --sequences 2048 --prompt 256-1024 --new 7168 --mean 512
}

# Graphs that go on from iteration to iteration: same tokens, what recording costs, and a whole run with and without.
part_graphs() {
    on 0 bench graphs-check.log 100 "graphs give the same tokens" check --models llama,qwen2
    rollout_kept
    on 0 bench graphs-long.log 80 "prompts of 32k tokens" generate --sequences 4 --prompt 32768 --new 64 --modes graphs --repeats 1 --out "$rows"
    local keep
    for keep in false true; do
        on 0 step "graphs-train-$keep.log" 60 "PPO, graphs kept: $keep" "$python" -m puzzle.cli train --out "$out/graphs-$keep" \
            --device cuda --dtype bf16 --iterations 5 --batch 64 --data.random_tokens 128 --generation.max_new_tokens 128 \
            --generation.keep_graphs "$keep" --actor.init.preset 7b --actor.layers 8 --critic.init.preset 350m \
            --reward.init.preset 350m --algorithm.microbatch 16 --checkpoint.save false --log.samples 0 --log.plots false \
            --log.tensorboard false --eval.every 0 --switch.verify false
    done
}

part_rollout() {
    # A cache takes what memory is free: one job at a time on a GPU. Alone, what has no numbers yet comes first.
    {
        rollout_groups
        [ "$gpus" -ge 4 ] || rollout_long
    } &
    [ "$gpus" -gt 1 ] || wait
    {
        rollout_fixed
        [ "$gpus" -ge 4 ] || rollout_varied
    } &
    if [ "$gpus" -ge 4 ]; then
        rollout_varied &
        rollout_long &
    fi
    wait
    [ "$gpus" -ge 4 ] || return 0
    local layout
    for layout in 4,1,1 2,2,1 1,4,1 1,1,4; do
        bench rollout-layouts.log 60 "generate on $layout" generate --layout "$layout" --sequences 128 --modes graphs --repeats 1 --out "$rows"
        bench rollout-layouts.log 60 "a queue on $layout" "${long[@]}" --layout "$layout" --sequences 512 --at-a-time 128 \
            --prompt 64-256 --new 512
    done
    bench rollout-check.log 100 "the same tokens on $gpus GPUs" check --world "$gpus" --models llama
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
    cat "$out"/*check*.log | grep -c '^ok ' | sed 's/$/ comparisons held/'
    echo
    cat "$summary"
} >"$out/table.txt" 2>/dev/null
rm -rf "$summary" "$out/saves"
packed=$(mktemp)
tar -C "$out" -czf "$packed" --exclude '*.safetensors' . &&
    find "$out" -mindepth 1 -maxdepth 1 ! -name table.txt ! -name results.jsonl -exec rm -rf {} + && mv "$packed" "$out/logs.tgz"
cat "$out/table.txt"
