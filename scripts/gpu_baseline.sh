#!/bin/bash
# DeepSpeed-Chat and this project on the GPUs of a host, the same work: bash scripts/gpu_baseline.sh OUTDIR
# A 7B actor (and reference), a critic (and reward) of size CRITIC (350m, 7b), random weights, 256 + 256 tokens,
# ROWS sequences per GPU.
# Settings of DeepSpeed-Chat: the published one, then what might be better. Steps that no longer fit into SECONDS_LEFT
# are skipped and say so. STEPS chooses: compile ours published resident zero2 graphs plain sampled. Logs lie in OUTDIR.
# HYBRID names a folder with transformers 4.35.2 (the last that the Hybrid Engine works with), tokenizers and
# huggingface-hub of its time. TINY=1 runs toy sizes on CPUs: it proves the script, nothing else.
set -u
out=${1:?usage: gpu_baseline.sh OUTDIR}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export PYTORCH_ALLOC_CONF=expandable_segments:True
# DeepSpeed reads numbers here, where torch also takes 9.0a.
TORCH_CUDA_ARCH_LIST=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1)
export TORCH_CUDA_ARCH_LIST TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-/tmp/torch_extensions}
unset PYTHONDONTWRITEBYTECODE
python=${PYTHON:-python3}
steps=${STEPS:-compile ours published resident zero2 graphs plain sampled}
left=${SECONDS_LEFT:-500}
summary=$out/summary.txt
: >"$summary"

if [ -n "${TINY:-}" ]; then
    world=2 rows=2 length=8 pairs="1,1,2:2,1,1" device=cpu dtype=fp32 provenance=rehearsal name=cpu
    toy="vocab_size: 256, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4"
    actor="{init: {$toy}}" critic="{init: {$toy}}"
else
    world=$(nvidia-smi -L | grep -c '^GPU') rows=${ROWS:-16} length=256 device=cuda dtype=bf16
    provenance=measured actor="{init: {preset: 7b}}" critic="{init: {preset: ${CRITIC:-350m}}}"
    name="${world}x$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | sed 's/NVIDIA //; s/ .*//')"
    pairs="1,1,$world:$world,1,1"
fi
size=${CRITIC:-350m}
size=${size^^}
work=$out/work.yaml
cat >"$work" <<YAML
device: $device
dtype: $dtype
batch: $((world * rows))
data: {random_tokens: $length}
generation: {min_new_tokens: $length, max_new_tokens: $length}
actor: $actor
critic: $critic
reward: $critic
checkpoint: {save: false}
log: {samples: 4, plots: false, cluster: $name, actor: 7B, critic: $size, provenance: $provenance}
YAML

# step NAME LIMIT COMMAND...: run with a limit, keep its output, note how it ended.
step() {
    local name=$1 limit=$2 began=$SECONDS room=$((left - SECONDS))
    shift 2
    [[ " $steps " == *" ${name%%-*} "* ]] || return
    if [ "$room" -lt 40 ]; then
        echo "skipped  $name: the time is used up" | tee -a "$summary"
        return
    fi
    [ "$limit" -gt "$room" ] && limit=$room
    echo "=== $name ($*)" | tee -a "$out/$name.txt"
    timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$out/$name.txt" | grep -v Warning
    echo "code ${PIPESTATUS[0]}  $((SECONDS - began)) s  $name" >>"$summary"
}

chat() { # chat NAME LIMIT ITERATIONS OPTIONS...
    local name=$1 limit=$2 iterations=$3
    shift 3
    step "$name" "$limit" env PYTHONPATH="${HYBRID:+$HYBRID:}$PYTHONPATH" \
        "$python" DeepSpeedExamples/applications/DeepSpeed-Chat/main.py --config "$work" --out "$out/$name" \
        --num_processes "$world" --iterations "$iterations" "$@"
}

ours() { # ours NAME LIMIT VARIANT TP,PP,DP TP,PP,DP OPTIONS...
    local name=$1 limit=$2 variant=$3 axes
    IFS=, read -ra axes <<<"$4,$5"
    shift 5
    step "$name" "$limit" "$python" -m puzzle.cli train --config "$work" --out "$out/$name" \
        --layout.tp "${axes[0]}" --layout.pp "${axes[1]}" --layout.dp "${axes[2]}" --generation.layout.tp "${axes[3]}" \
        --generation.layout.pp "${axes[4]}" --generation.layout.dp "${axes[5]}" --iterations 6 --log.figures figure8 \
        --log.variant "$variant" --generation.greedy true --algorithm.microbatch $((rows < 8 ? rows : 8)) "$@"
}

compile() { # DeepSpeed's operators, beside our runs
    PYTHONPATH="${HYBRID:+$HYBRID:}$PYTHONPATH" MAX_JOBS=${MAX_JOBS:-32} timeout -k 5 240 "$python" -c '
from deepspeed.ops.op_builder import FusedAdamBuilder, InferenceBuilder
for builder in (FusedAdamBuilder, InferenceBuilder):
    builder().load(verbose=False)
' >"$out/compile.txt" 2>&1
    echo "code $?  $SECONDS s  compile" >>"$summary"
}

compiling=
if [ $device = cuda ] && [[ " $steps " == *" compile "* ]]; then
    compile &
    compiling=$!
fi
train=${pairs%:*} generate=${pairs#*:}
graphs=() && [ $device = cuda ] && graphs=(--compile true)
ours ours-opt 100 opt "$train" "$generate" --intra.fuse_training true --intra.fuse_inference true "${graphs[@]}"
ours ours-base 100 base "$train" "$train" "${graphs[@]}"
[ -n "$compiling" ] && wait "$compiling"

greedy=(--generation.greedy true --log.figures figure8)
hybrid=(--enable_hybrid_engine)
whole=(--per_device_training_batch_size "$rows")
half=(--per_device_training_batch_size $((rows / 2)))
zero2=(--actor_zero_stage 2 --critic_zero_stage 2)
zero3=(--actor_zero_stage 3 --critic_zero_stage 3)
published=("${zero3[@]}" --offload_reference_model --actor_gradient_checkpointing --critic_gradient_checkpointing)
chat published 170 6 "${published[@]}" "${hybrid[@]}" "${whole[@]}" "${greedy[@]}"
chat resident 110 3 "${zero3[@]}" "${hybrid[@]}" "${half[@]}" "${greedy[@]}"
chat zero2 110 3 "${zero2[@]}" "${hybrid[@]}" "${half[@]}" "${greedy[@]}"
[ $device = cuda ] && chat graphs 170 6 "${zero2[@]}" "${hybrid[@]}" --enable_cuda_graph "${half[@]}" "${greedy[@]}"
chat plain 110 3 "${zero2[@]}" "${half[@]}" "${greedy[@]}"
chat sampled 110 3 "${zero2[@]}" "${hybrid[@]}" "${half[@]}"

"$python" - "$out" >"$out/table" <<'PYTHON'
import sys
from pathlib import Path
from statistics import mean

from puzzle.runlog import load_runs

stages = ("generation", "inference", "training", "switch", "other")
print(f"{'run':<12}{'n':>3}{'e2e s':>9}" + "".join(f"{stage:>12}" for stage in stages) + "  entropy  what it warned of")
for folder in sorted(p.parent for p in Path(sys.argv[1]).glob("*/run.jsonl")):
    for run in load_runs(folder).runs:
        late = run.iterations[1:]
        if not late:
            print(f"{folder.name:<12}  0 iterations after the first")
            continue
        seconds = "".join(f"{mean(one.stage_seconds[stage] for one in late):12.3f}" for stage in stages)
        said = "; ".join(report.what for report in run.reports)
        entropy = run.iterations[0].metrics["entropy"]
        print(f"{folder.name:<12}{len(late):3}{mean(one.e2e_seconds for one in late):9.3f}{seconds}{entropy:9.4f}  {said}")
PYTHON
{ echo; cat "$summary"; grep -H -E '^error:|Error: ' "$out"/*.txt; } >>"$out/table"
mv "$out/table" "$out/table.txt"
cat "$out/table.txt"
