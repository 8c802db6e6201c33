#!/usr/bin/env bash
# MLX on one NVIDIA GPU with CUDA 13: plain and speculative decoding and mlx-lm's own, side by side.
#   benchmarks/gpu/mlx_h200.sh keep FOLDER                       put aside a part that mlx_pack.sh made
#   benchmarks/gpu/mlx_h200.sh cache FOLDER                      the kernels compiled so far, for the next machine
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
# The host limits MLX on CUDA, and launching its kernels one by one takes less of it than making graphs of them: 12 to
# 15 ms a speculative step of float32 instead of 16 to 29, a plain one 8.5 instead of 8.15 (docs/log.md).
export MLX_USE_CUDA_GRAPHS=${MLX_USE_CUDA_GRAPHS:-0}
export MLX_MAX_MB_PER_BUFFER=${MLX_MAX_MB_PER_BUFFER:-300000} MLX_MAX_OPS_PER_BUFFER=${MLX_MAX_OPS_PER_BUFFER:-2000}
export MLX_CUDA_GRAPH_CACHE_SIZE=${MLX_CUDA_GRAPH_CACHE_SIZE:-1000} MLX_PTX_CACHE_DIR=$home/ptx
export PYTHONUNBUFFERED=1 PYTHONPATH=src:$site${PYTHONPATH:+:$PYTHONPATH}
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
    if [ -f "$1/ptx.tar.gz" ]; then
        tar -xzf "$1/ptx.tar.gz" -C "$home"
    fi
    ls -l "$home"
    ;;
cache) # minutes of work; `keep` takes the file up again
    tar -czf "$1/ptx.tar.gz" -C "$home" ptx
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

# What a step relies on: attention with a mask over strided keys, a first row of masked blocks, a position per vector.
q, kv = mx.random.normal((1, 9, 16, 64)), mx.random.normal((1, 256, 6, 64))
mask = mx.where(mx.arange(256)[None] >= 8 * mx.arange(16)[:, None], 0.0, -1e30)[None, None]
def attend(dtype):
    k, v = (x.transpose(0, 2, 1, 3) for x in mx.split(kv.astype(dtype), 2, axis=2))
    return mx.fast.scaled_dot_product_attention(q.astype(dtype), k, v, scale=0.125, mask=mask.astype(dtype))
x, at = mx.random.normal((6, 1, 1, 64)), mx.array([0, 3, 900, 0, 5, 5], dtype=mx.int32)
def turn(part, offset):
    return mx.fast.rope(part, 64, traditional=False, base=1e4, scale=1.0, offset=offset)
one_by_one = mx.concatenate([turn(x[i : i + 1], int(at[i])) for i in range(6)])
print("attention, bfloat16 - float32:", mx.abs(attend(mx.bfloat16) - attend(mx.float32)).max().item())
print("rotation by vector - one by one:", mx.abs(turn(x, at) - one_by_one).max().item())
print("unrotated at 0:", mx.array_equal(turn(x, at)[0], x[0]).item())
assert mx.default_device() == mx.gpu, "MLX sees no GPU"
PYTHON
    ;;
smoke)
    ask=(generate "Name three rivers." --backend mlx --device gpu --dtype bfloat16 --model "$1" --drafter "$2" -q
        --max-new-tokens 48 --beam-width 4 --branching 4 --draft-length 4 --tree-size 16)
    # What fails is told by where it stops failing: compiled steps, cuDNN's attention, or neither of them.
    for setting in A=0 MLX_DISABLE_COMPILE=1 MLX_CUDA_USE_CUDNN_SDPA=0 \
        "MLX_DISABLE_COMPILE=1 MLX_CUDA_USE_CUDNN_SDPA=0"; do
        echo "smoke with ${setting/A=0/everything on}"
        # shellcheck disable=SC2086
        if time env $setting python3 -m redrafter.cli "${ask[@]}" &&
            time env $setting python3 -m redrafter.cli "${ask[@]}" --compare --allow-forks --repeat 1; then
            exit 0
        fi
    done
    exit 1
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
    echo "unknown stage $stage: keep, cache, install, smoke, steps, widen, bench" >&2
    exit 2
    ;;
esac
