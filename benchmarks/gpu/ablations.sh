#!/usr/bin/env bash
# What the claims about training rest on: data, the table of variants, scaling over two GPUs. No installation:
#   REDRAFTER_COMMIT=SHA benchmarks/gpu/ablations.sh MODEL WORK PROMPTS_JSONL QUESTIONS_JSONL RESULTS STAGE...
# Stages: smoke (two minutes: every stage once, tiny), data, ablations (8.5 minutes a call; again to go on), scaling
# (needs two GPUs). WORK keeps what a later call goes on from; results are JSON in the folder RESULTS.
# SECONDS_OF_DATA, MINUTES, STEPS, PER_GPU and BATCH_TOKENS change the sizes.
set -euo pipefail
model=$1 work=$2 prompts=$3 questions=$4 results=$5
shift 5
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/../../src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$work" "$results"
redrafter() { python3 -m redrafter.cli "$@"; }
ablations() { python3 "$here/ablations.py" --model "$model" --questions "$questions" "$@"; }
for stage in "$@"; do
    case $stage in
    smoke)
        redrafter data --model "$model" --out "$work/smoke-data" --prompts "$prompts" --no-own --tokens 200000 \
            --set max_new=64 --json-out "$results/smoke-data.json"
        ablations --data "$work/smoke-data" --work "$work/smoke" --out "$results/smoke-ablations.json" --steps 60 \
            --minutes 3 --max-new 64 --per-gpu 3 --variants shipped "no distillation" medusa paper --set eval_texts=20
        ;;
    data)
        redrafter data --model "$model" --out "$work/data" --prompts "$prompts" --seconds "${SECONDS_OF_DATA:-170}" \
            --json-out "$results/datagen.json"
        ;;
    ablations)
        ablations --data "$work/data" --work "$work/ablations" --out "$results/ablations.json" \
            --minutes "${MINUTES:-8.5}" --steps "${STEPS:-1200}" --per-gpu "${PER_GPU:-3}" \
            --set batch_tokens="${BATCH_TOKENS:-16384}"
        ;;
    scaling)
        python3 "$here/scaling.py" --model "$model" --data "$work/data" --work "$work/scaling" \
            --out "$results/ddp-scaling.json"
        ;;
    *)
        echo "unknown stage $stage: smoke, data, ablations, scaling" >&2
        exit 2
        ;;
    esac
done
