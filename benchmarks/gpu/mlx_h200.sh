#!/usr/bin/env bash
# MLX on one NVIDIA GPU with CUDA 13: plain and speculative decoding and mlx-lm's own, side by side.
#   benchmarks/gpu/mlx_h200.sh keep FOLDER                       put aside the parts that mlx_pack.sh made; once per part
#   benchmarks/gpu/mlx_h200.sh install                           join them, find NVIDIA's libraries, ask for the GPU
#   benchmarks/gpu/mlx_h200.sh smoke MODEL DRAFTER               a short answer both ways; compiles the kernels
#   benchmarks/gpu/mlx_h200.sh steps MODEL DRAFTER               milliseconds per step of some beam shapes
#   benchmarks/gpu/mlx_h200.sh widen MODEL DRAFTER SHAPE OUT [OPTION...]   the instrument: OUT/model and OUT/drafter
#   benchmarks/gpu/mlx_h200.sh bench MODEL DRAFTER PROMPTS OUT NAME LIMIT [OPTION...]
# Needs Python 3.12 with torch for CUDA 13 (its NVIDIA libraries are used) and the source tree as current folder.
set -euo pipefail
home=${MLX_FOLDER:-/tmp/mlx-cuda}
mkdir -p "$home"
nvidia=$(python3 -c 'import nvidia; print(list(nvidia.__path__)[0])')
site=$home/site
# What MLX compiles at run time includes CUDA's headers and is kept for the next process.
for folder in "${CUDA_HOME:-}" /usr/local/cuda "$nvidia/cu13"; do
    if [ -n "$folder" ] && [ -f "$folder/include/cuda_runtime.h" ]; then
        export CUDA_HOME=$folder
        break
    fi
done
export MLX_CUDA_GRAPH_CACHE_SIZE=${MLX_CUDA_GRAPH_CACHE_SIZE:-1000} MLX_PTX_CACHE_DIR=$home/ptx PYTHONUNBUFFERED=1 PYTHONPATH=src:$site${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$MLX_PTX_CACHE_DIR"
for folder in cu13 cudnn nccl cublas cuda_nvrtc cufft cusolver; do
    LD_LIBRARY_PATH=$nvidia/$folder/lib:${LD_LIBRARY_PATH:-}
done
if [ -d /usr/local/nvidia/lib64 ]; then
    LD_LIBRARY_PATH=$LD_LIBRARY_PATH:/usr/local/nvidia/lib64 # the driver's, where a container mounts it
fi
export LD_LIBRARY_PATH
redrafter() { python3 -m redrafter.cli "$@"; }
stage=$1
shift
case $stage in
keep)
    cp "$1"/mlx.* "$home/"
    ls -l "$home"
    ;;
install)
    cat "$home"/mlx.part0 "$home"/mlx.part1 >"$home/mlx.tar.xz"
    echo "$(cat "$home/mlx.sha256")  $home/mlx.tar.xz" | sha256sum --check
    mkdir -p "$site"
    python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="tar")' \
        "$home/mlx.tar.xz" "$site"
    ln -sfn "$nvidia" "$site/nvidia" # libmlx.so looks for the libraries beside itself
    if ldd "$site/mlx/lib/libmlx.so" | grep 'not found'; then
        find "$nvidia" -name '*.so*' | grep -E 'cublasLt|cufft|cusolver|nvrtc|cudnn\.so|nccl' || true
        exit 1
    fi
    echo "CUDA_HOME=${CUDA_HOME:-unset}"
    python3 - <<'PYTHON'
import time
import mlx.core as mx
started = time.perf_counter()
x = mx.random.normal((64, 64)).astype(mx.bfloat16)
y = mx.compile(lambda a: mx.sigmoid(a) * a + 1)(x @ x)[mx.array([3, 1])]
mx.eval(y)
print(mx.default_device(), mx.device_info(), f"{time.perf_counter() - started:.1f} s for the first kernels")
assert mx.default_device() == mx.gpu, "MLX sees no GPU"
PYTHON
    ;;
smoke)
    ask=(generate "Name three rivers." --backend mlx --device gpu --model "$1" --drafter "$2" -q --max-new-tokens 48
        --beam-width 4 --branching 4 --draft-length 4 --tree-size 16 --compare --repeat 1)
    if ! time redrafter "${ask[@]}"; then
        echo "with compiled steps it fails (above); without:"
        time MLX_DISABLE_COMPILE=1 redrafter "${ask[@]}"
    fi
    ;;
steps)
    python3 benchmarks/gpu/mlx_steps.py "$@"
    ;;
widen)
    python3 -m redrafter.bench.widen_folder "$1" "$2" "$4" --shape "$3" --device cuda "${@:5}"
    ;;
bench)
    model=$1 drafter=$2 prompts=$3 out=$4 name=$5 limit=$6
    shift 6
    redrafter bench --backend mlx --device gpu --dtype bfloat16 --model "$model" --drafter "$drafter" \
        --prompts "$prompts" --limit "$limit" --spread --max-new-tokens 256 --baseline mlx-lm \
        --out "$out" --name "$name" "$@"
    ;;
*)
    echo "unknown stage $stage: keep, install, smoke, steps, widen, bench" >&2
    exit 2
    ;;
esac
