# shellcheck shell=bash
# To be read by a shell in the source tree (`. benchmarks/gpu/unpack.sh FOLDER`), where FOLDER holds what pack.sh made:
# sets PYTHONPATH, MODEL (a folder with the default model in float32) and DRAFTER (the shipped one).
_folder=$1
mkdir -p "$_folder/site"
# The machine's own packages come first: a newer one may want what is not there.
python3 - "$_folder" <<'EOF'
import sys, zipfile
from importlib.util import find_spec
from pathlib import Path
folder = Path(sys.argv[1])
for wheel in folder.glob("*.whl"):
    name = wheel.name.split("-")[0].replace("markdown_it_py", "markdown_it")
    if find_spec(name) is None and not (folder / "site" / name).exists():
        zipfile.ZipFile(wheel).extractall(folder / "site")
EOF
export PYTHONPATH=$PWD/src:$PWD:$_folder/site${PYTHONPATH:+:$PYTHONPATH}
export MODEL=$_folder/smollm2-135m-instruct DRAFTER=$PWD/src/redrafter/assets/smollm2-135m-instruct
if [ ! -d "$MODEL" ]; then
    cat "$_folder"/gguf.part[012] >"$_folder/model.gguf"
    python3 -c "
import sys; from pathlib import Path
from redrafter.models.convert import dequantise
folder = Path(sys.argv[2]); folder.mkdir(); dequantise(Path(sys.argv[1]), folder, print)" "$_folder/model.gguf" "$MODEL"
fi
