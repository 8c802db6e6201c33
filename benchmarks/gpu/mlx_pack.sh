#!/usr/bin/env bash
# MLX for CUDA 13 and mlx-lm in two files of less than 40 MB each, for a machine that reaches no package index.
#   benchmarks/gpu/mlx_pack.sh FOLDER_1 FOLDER_2
# NVIDIA's libraries are left out: they come with torch, and mlx_h200.sh points MLX at them.
set -euo pipefail
first=$1 second=$2
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip install --quiet --no-deps --no-compile --target "$work/site" --only-binary=:all: \
    --implementation cp --python-version 3.12 --platform manylinux_2_35_x86_64 --platform manylinux2014_x86_64 \
    mlx==0.32.4 mlx-cuda-13==0.32.4 mlx-lm==0.32.2
mkdir -p "$first" "$second"
tar -C "$work/site" -cf - . | xz -6 -T0 >"$work/mlx.tar.xz"
split -n 2 -d "$work/mlx.tar.xz" "$work/mlx.part"
mv "$work/mlx.part00" "$first/mlx.part0"
mv "$work/mlx.part01" "$second/mlx.part1"
sha256sum "$work/mlx.tar.xz" | cut -d' ' -f1 >"$second/mlx.sha256"
ls -l "$first" "$second"
