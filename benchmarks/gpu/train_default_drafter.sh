#!/usr/bin/env bash
# Train the default drafter on one GPU in about 25 minutes: texts, distillation, tokens per step.
#   benchmarks/gpu/train_default_drafter.sh MODEL_FOLDER WORK_FOLDER PROMPTS_JSONL QUESTIONS_JSONL [STAGE...]
# Stages: smoke (a minute: every stage once, tiny), data, train (run it again to go on), eval. Default: the last three.
# It needs no installation: from a source checkout, PYTHONPATH=src is enough.
set -euo pipefail
model=$1 work=$2 prompts=$3 questions=$4
shift 4
export PYTHONUNBUFFERED=1
redrafter() { python3 -m redrafter.cli "$@"; }
for stage in "${@:-data train eval}"; do
    for name in $stage; do
        case $name in
        smoke)
            redrafter data --model "$model" --out "$work/smoke" --prompts "$prompts" --no-own --tokens 100000 --set max_new=64
            redrafter train --model "$model" --data "$work/smoke" --out "$work/smoke-run" --steps 60 --compile
            redrafter eval --model "$model" --drafter "$work/smoke-run" --prompts "$questions" --category mt_bench \
                --max-new-tokens 64
            ;;
        data)
            redrafter data --model "$model" --out "$work/data" --prompts "$prompts" --seconds 440 \
                --json-out "$work/datagen.json"
            ;;
        train)
            redrafter train --model "$model" --data "$work/data" --out "$work/run" --compile --minutes 14 --stop-after 560
            ;;
        eval)
            redrafter eval --model "$model" --drafter "$work/run" --prompts "$questions" --json-out "$work/run/eval.json"
            redrafter eval --model "$model" --drafter "$work/run" --prompts "$questions" --temperature 1 \
                --json-out "$work/run/eval-t1.json"
            redrafter card "$work/run" --eval "$work/run/eval.json" --eval "$work/run/eval-t1.json" \
                --generation "$work/data/manifest.json"
            ;;
        *)
            echo "unknown stage $name: smoke, data, train, eval" >&2
            exit 2
            ;;
        esac
    done
done
