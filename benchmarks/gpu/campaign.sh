#!/usr/bin/env bash
# All that is measured on one H200, on a machine that pack.sh's and mlx_pack.sh's parts were brought to:
#   benchmarks/gpu/campaign.sh exact PARTS QUESTIONS OUT     1 minute: answers in float32; writes the instrument for MLX
#   benchmarks/gpu/campaign.sh torch PARTS QUESTIONS OUT     6 minutes: the 7B shape and SmolLM2-135M ($SHAPES)
#   benchmarks/gpu/campaign.sh serve PARTS QUESTIONS OUT     3 minutes: the 7B shape through HTTP
#   benchmarks/gpu/campaign.sh mlx PARTS QUESTIONS OUT       4 minutes, after exact: MLX beside mlx-lm ($DTYPES)
# PARTS: the folder of pack.sh's three parts together; `mlx_h200.sh keep` has put aside the others. What is timed has the
# GPU to itself. CONTROL= leaves out the count of forks of padded plain steps, half a minute. LIMIT=0 takes all prompts at
# batch 1 instead of 16: 9 minutes of the 7B shape, 2 of SmolLM2-135M.
# Say which commit this is in REDRAFTER_COMMIT where the sources came without their history.
set -uo pipefail
stage=$1 parts=$2 questions=$3 out=$4
# shellcheck source=benchmarks/gpu/unpack.sh
. benchmarks/gpu/unpack.sh "$parts" >"$out/unpack.txt" 2>&1
here=$(dirname "$0") date=${CAMPAIGN:-$(date +%F)} shape=llama-2-7b work=${WORK:-/tmp/redrafter-campaign}
mkdir -p "$work"
# A figure's command names the drafter's folder.
[ -d "$work/smollm2-135m-instruct" ] || cp -r "$DRAFTER" "$work/"
drafter=$work/smollm2-135m-instruct
speed() { python3 "$here/speed.py" --model "$MODEL" --drafter "$drafter" --questions "$questions" --out "$out" "$@"; }
mlx() { bash "$here/mlx_h200.sh" "$@"; }
case $stage in
exact)
    # A cache of its own, so that the start of the next stage is that of a machine where nothing is compiled.
    TRITON_CACHE_DIR=$work/triton-fp32 speed --prefix "$date-h200-" --stage fp32 --max-context 2048 --exact 100 \
        >"$out/fp32.txt" 2>&1 &
    { mlx install && mlx widen "$MODEL" "$drafter" $shape "$work/mlx" --width 1152; } >"$out/widen.txt" 2>&1 &
    wait
    cat "$out/fp32.txt"
    ;;
torch)
    # shellcheck disable=SC2086
    TRITON_CACHE_DIR=$work/triton speed --prefix "$date-h200-" $(printf -- '--stage %s ' ${SHAPES:-7b small}) \
        --max-context 2048 --limit "${LIMIT:-16}" --batches 4 8 32 --sampled 4 8 32 ${CONTROL---control} >"$out/speed.txt" 2>&1
    cat "$out/speed.txt"
    ;;
serve)
    TRITON_CACHE_DIR=$work/triton python3 "$here/../serving.py" speed --model "$MODEL" --drafter "$drafter" \
        --instrument $shape --device cuda --dtype bfloat16 --levels 1,8,32 --max-batch 32 --max-context 1024 --count 16 \
        --prompts "$questions" --category mt_bench --limit 16 --tokens 256 --out "$out/$date-h200-serve-speed.json" \
        >"$out/serve.txt" 2>&1
    cat "$out/serve.txt"
    ;;
mlx)
    # float32: its steps are as long as their bytes take, as a Mac's are. In 16 bits the host's launches limit MLX on CUDA.
    for dtype in ${DTYPES:-float32 bfloat16}; do
        mlx bench "$work/mlx/model" "$work/mlx/drafter" "$questions" "$out" "$date-h200-mlx-7b-$dtype" 12 \
            --category mt_bench --beam-width 8 --branching 8 --draft-length 5 --tree-size 48 --dtype $dtype \
            >"$out/mlx-$dtype.txt" 2>&1
        cat "$out/mlx-$dtype.txt"
    done
    mlx cache "$out"
    ;;
*)
    echo "unknown stage $stage: exact, torch, serve, mlx" >&2
    exit 2
    ;;
esac
