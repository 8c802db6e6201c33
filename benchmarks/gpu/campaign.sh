#!/usr/bin/env bash
# All that is measured on one H200, on a machine that pack.sh's and mlx_pack.sh's parts were brought to:
#   benchmarks/gpu/campaign.sh torch PARTS QUESTIONS OUT     5 minutes: float32 answers, 7B shape, SmolLM2-135M
#   benchmarks/gpu/campaign.sh serve PARTS QUESTIONS OUT     3 minutes: the 7B shape through HTTP
#   benchmarks/gpu/campaign.sh mlx PARTS QUESTIONS OUT       3 minutes, after torch: the 7B shape in MLX beside mlx-lm
# PARTS: the folder of pack.sh's three parts together; `mlx_h200.sh keep` has put aside the others. What needs the GPU to
# itself has it: the instrument for MLX is written while float32 answers are compared, of which nothing is timed.
# CONTROL= leaves out the count of forks of padded plain steps, half a minute.
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
torch)
    # A cache of its own, so that the start of the next stage is that of a machine where nothing is compiled.
    TRITON_CACHE_DIR=$work/triton-fp32 speed --prefix "$date-h200-" --stage fp32 --max-context 2048 --exact 100 \
        >"$out/fp32.txt" 2>&1 &
    { mlx install && mlx widen "$MODEL" "$drafter" $shape "$work/mlx" --width 1152; } >"$out/widen.txt" 2>&1 &
    wait
    TRITON_CACHE_DIR=$work/triton speed --prefix "$date-h200-" --stage 7b --stage small --max-context 2048 --limit 16 \
        --batches 8 32 --sampled 8 32 ${CONTROL---control} >"$out/speed.txt" 2>&1
    cat "$out/fp32.txt" "$out/speed.txt"
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
    for dtype in float32 bfloat16; do
        mlx bench "$work/mlx/model" "$work/mlx/drafter" "$questions" "$out" "$date-h200-mlx-7b-$dtype" 12 \
            --category mt_bench --beam-width 8 --branching 8 --draft-length 5 --tree-size 48 --dtype $dtype \
            >"$out/mlx-$dtype.txt" 2>&1
        cat "$out/mlx-$dtype.txt"
    done
    mlx cache "$out"
    ;;
*)
    echo "unknown stage $stage: torch, serve, mlx" >&2
    exit 2
    ;;
esac
