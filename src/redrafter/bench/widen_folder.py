"""The instrument as folders that every loader reads: the widened target and its widened drafter.

    python -m redrafter.bench.widen_folder MODEL_FOLDER DRAFTER OUT --shape llama-2-7b

writes OUT/model (weights, configuration, tokenizer) and OUT/drafter. See ``widen.py`` for what the instrument is.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from redrafter.backends.torch.checkpoint import load_drafter, save_drafter
from redrafter.bench.widen import SHAPES, shape_named, widen_model
from redrafter.bench.widen_drafter import widen_drafter
from redrafter.drafter_files import read_config
from redrafter.errors import InvalidRequest, RedrafterError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BESIDE = ("tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json", "vocab*", "merges.txt")
"""Files of a model's folder that are about text: the instrument speaks like the small model."""


def write_folders(
    model: Path, drafter: Path, out: Path, shape: str, dtype: str = "bfloat16", device: str = "cpu", width: int = 0
) -> tuple[Path, Path]:
    """The folders of the wide target and of its drafter. ``width``: the drafter's; 0: in proportion.

    Raises InvalidRequest where the shape cannot hold the model, before anything is written.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise InvalidRequest(f"dtype={dtype!r} is unknown: use {' or '.join(DTYPES)}")
    small: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    wide = shape_named(shape, small.config, tie=False)
    wide_drafter = widen_drafter(load_drafter(drafter), wide, DTYPES[dtype], device, 0, width)
    target_folder, drafter_folder = out / "model", out / "drafter"
    target = widen_model(small, wide, DTYPES[dtype], device, 0)
    target_folder.mkdir(parents=True, exist_ok=True)
    target.save_pretrained(target_folder)
    for pattern in BESIDE:
        for file in sorted(model.glob(pattern)):
            shutil.copy2(file, target_folder / file.name)
    metadata = {**(read_config(drafter).get("metadata") or {}), "instrument": shape}
    save_drafter(wide_drafter, drafter_folder, metadata)
    return target_folder, drafter_folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the instrument: a small model and drafter in a large shape.")
    parser.add_argument("model", type=Path)
    parser.add_argument("drafter", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-2-7b")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--device", default="cpu", help="where it is filled in: cuda takes seconds")
    parser.add_argument("--width", type=int, default=0, help="the drafter's width; 0: in proportion to the target's")
    asked = parser.parse_args()
    folders = write_folders(**vars(asked))
    print(*folders, sep="\n")


if __name__ == "__main__":
    try:
        main()
    except RedrafterError as error:
        sys.exit(f"error: {error}")
