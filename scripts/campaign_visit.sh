#!/bin/bash
# A piece of the campaign (docs/artifact.md) on the GPUs of a host that is there for minutes, without a network:
#   bash scripts/campaign_visit.sh OUTDIR [OPTIONS of puzzle campaign]
# OUTDIR gets CAMPAIGN.tgz, its folder, and SHIP.tgz, the logs that figures read. BEFORE names the CAMPAIGN.tgz of the
# last piece: this one goes on there. MINUTES (8.5) bound the runs; drawing and packing take another half.
# WHEELS names a folder with wheels that the host lacks (pydantic, deepspeed, ...); those in its folder hybrid are for
# DeepSpeed-Chat alone: transformers 4.35.2, the last that its Hybrid Engine works with, and what that needs.
# NCCL_P2P_DISABLE=1 makes a second cluster of the host: its own CAMPAIGN.tgz.
set -u
out=${1:?usage: campaign_visit.sh OUTDIR [OPTIONS of puzzle campaign]}
shift
began=$SECONDS
before=${BEFORE:+$(readlink -f "$BEFORE")} wheels=${WHEELS:+$(readlink -f "$WHEELS")}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3} work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export PYTORCH_ALLOC_CONF=expandable_segments:True
TORCH_CUDA_ARCH_LIST=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1)
export TORCH_CUDA_ARCH_LIST TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-/tmp/torch_extensions}
unset PYTHONDONTWRITEBYTECODE

install() { # install WHEELS-FOLDER TARGET
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$2" "$1"/*.whl || exit 1
}
options=()
if [ -n "$wheels" ]; then
    install "$wheels" "$work/site" && export PYTHONPATH="$PYTHONPATH:$work/site"
    [ -d "$wheels/hybrid" ] && install "$wheels/hybrid" "$work/hybrid" && options=(--baseline-packages "$work/hybrid")
fi
[ -z "$before" ] || tar -C "$work" -xzf "$before" || exit 1

compiling=
# DeepSpeed's operators are compiled beside our first runs, at the lowest priority.
if [ -n "$TORCH_CUDA_ARCH_LIST" ] && "$python" -c 'import deepspeed' 2>/dev/null; then
    PYTHONPATH="$work/hybrid:$PYTHONPATH" MAX_JOBS=${MAX_JOBS:-8} nice -n 19 "$python" -c '
from deepspeed.ops.op_builder import FusedAdamBuilder, InferenceBuilder
for builder in (FusedAdamBuilder, InferenceBuilder):
    builder().load(verbose=False)
' >"$out/compile.log" 2>&1 &
    compiling=$!
fi

"$python" -m puzzle.cli campaign --minutes "${MINUTES:-8.5}" --out "$work/campaign" --ship "$work/ship" \
    "${options[@]}" "$@" 2>&1 | tee "$out/campaign.log"
code=${PIPESTATUS[0]}
[ -z "$compiling" ] || kill "$compiling" 2>/dev/null
tar -C "$work" --exclude traces -czf "$out/CAMPAIGN.tgz" campaign && tar -C "$work" -czf "$out/SHIP.tgz" ship
echo "code $code, $((SECONDS - began)) s"
exit "$code"
