#!/bin/bash
# Two iterations of recipes on one GPU, with random weights of their models' shape: bash scripts/recipes_visit.sh OUTDIR [RECIPE...]
# Recipes: qwen3-0.6b-grpo and qwen3-0.6b-ppo (by default; a GPU of 80 GB), qwen3-4b-grpo on one GPU of 141 GB instead of four of 80.
# There is no network where this runs: prompts are made here, in the form of openai/gsm8k, and read as bytes. Everything else is the recipe's own.
# SECONDS_LEFT (default 590) bounds the visit.
set -u
out=${1:?usage: recipes_visit.sh OUTDIR [RECIPE...]}
shift
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
unset PYTHONDONTWRITEBYTECODE
python=${PYTHON:-python3}
left=${SECONDS_LEFT:-590}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ $# -gt 0 ] || set -- qwen3-0.6b-grpo qwen3-0.6b-ppo

"$python" - "$work/questions.jsonl" <<'END'
import json, random, sys

rng = random.Random(0)
with open(sys.argv[1], "w") as file:
    for _ in range(600):
        a, b = rng.randrange(2, 99), rng.randrange(2, 99)
        question = f"A farm sells {a} eggs in the morning and {b} in the evening. How many does it sell on that day?"
        file.write(json.dumps({"question": question, "answer": f"{a} + {b} = {a + b}\n#### {a + b}"}) + "\n")
END

status=0
read -ra extra <<<"${OPTIONS:-}" # further options, such as a smaller batch
for recipe in "$@"; do
    case $recipe in
    qwen3-0.6b-*) shape=(hidden_size 1024 intermediate_size 3072 num_hidden_layers 28 num_attention_heads 16) ;;
    qwen3-4b-*) shape=(hidden_size 2560 intermediate_size 9728 num_hidden_layers 36 num_attention_heads 32) ;;
    *) echo "no shape of $recipe here" && exit 1 ;;
    esac
    shape+=(model_type qwen3 num_key_value_heads 8 head_dim 128 vocab_size 151936 max_position_embeddings 40960
        rms_norm_eps 1e-6 rope_theta 1000000 tie_word_embeddings true)
    options=()
    for ((at = 0; at < ${#shape[@]}; at += 2)); do
        options+=("--actor.init.${shape[at]}" "${shape[at + 1]}")
    done
    room=$((left - SECONDS))
    if [ "$room" -lt 30 ]; then
        echo "skipped $recipe: the visit's time is used up"
        continue
    fi
    echo "=== $recipe"
    # The layout is the recipe's for one GPU; the last words on the command line win.
    timeout -k 10 "$room" "$python" -m puzzle train --config "examples/recipes/$recipe.yaml" --out "$out/$recipe" \
        --actor.model null "${options[@]}" --layout.dp 1 --data.tokenizer bytes --data.chat_template false \
        --data.prompts "$work/questions.jsonl" --data.eval_prompts null --eval.every 0 --iterations 2 \
        --checkpoint.save false --checkpoint.best false --log.plots false "${extra[@]}" 2>&1 | tee "$out/$recipe.txt"
    code=${PIPESTATUS[0]}
    echo "code $code  $recipe  $SECONDS s"
    [ "$code" -eq 0 ] || status=1
done
exit "$status"
