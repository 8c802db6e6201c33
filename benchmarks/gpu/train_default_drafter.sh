#!/usr/bin/env bash
# Train the default drafter on one GPU in about 25 minutes: texts, distillation, tokens per step.
#   benchmarks/gpu/train_default_drafter.sh MODEL_FOLDER WORK_FOLDER PROMPTS_JSONL QUESTIONS_JSONL [STAGE...]
# Stages: smoke (a minute: every stage once, tiny), generate, distill (run it again to go on), evaluate. Default: the last three.
set -euo pipefail
model=$1 work=$2 prompts=$3 questions=$4
shift 4
export PYTHONUNBUFFERED=1
for stage in "${@:-generate distill evaluate}"; do
    for name in $stage; do
        case $name in
        smoke)
            python3 -m redrafter.train.generate --model "$model" --out "$work/smoke" --prompts "$prompts" --seconds 30 --max-new 64
            python3 -m redrafter.train.distill --model "$model" --data "$work/smoke" --out "$work/smoke-run" --seconds 40 --compile
            python3 -m redrafter.train.evaluate --model "$model" --drafter "$work/smoke-run/drafter" --prompts "$questions" \
                --category mt_bench --max-new 64 --beam-widths 8 --vocabularies 0 8192
            ;;
        generate)
            python3 -m redrafter.train.generate --model "$model" --out "$work/data" --prompts "$prompts" --seconds 440 --loop-share 0.1
            ;;
        distill)
            resume=()
            [ -e "$work/run/state.pt" ] && resume=(--resume)
            python3 -m redrafter.train.distill --model "$model" --data "$work/data" --out "$work/run" --compile \
                --total-seconds 840 --seconds 580 "${resume[@]}"
            ;;
        evaluate)
            python3 -m redrafter.train.evaluate --model "$model" --drafter "$work/run/drafter" --data "$work/data" \
                --prompts "$questions" --category mt_bench --out "$work/run/tokens_per_step.json"
            ;;
        *)
            echo "unknown stage $name: smoke, generate, distill, evaluate" >&2
            exit 2
            ;;
        esac
    done
done
