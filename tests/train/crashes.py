"""A tiny target, texts of it, and what tries to break its training: kills and damaged checkpoints.

The tests use a few of each; ``benchmarks/robustness.py`` counts many.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from redrafter.errors import CorruptModel
from redrafter.files import sha256
from redrafter.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from redrafter.train.samples import ShardWriter, write_manifest
from redrafter.train.target import TrainingTarget
from redrafter.train.writing import Writer, WritingConfig

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "steps": 12,
    "draft_length": 3,
    "batch_tokens": 700,
    "chunk": 128,
    "draft_vocabulary": 40,
    "warmup_steps": 4,
    "lr": 5e-3,
    "ema": 0.9,
    "eval_every": 6,
    "eval_texts": 6,
    "batches_per_step": 2,
    "anchors": 0.7,
}
WORDS = 60
TEMPLATE = (
    "<s> w0 w1 <e> {% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} <e> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def write_model(folder: Path) -> None:
    """A random target with a word-level tokenizer and a chat template, as any Hugging Face model."""
    names = ["<e>", "<s>", "user", "assistant", *(f"w{i}" for i in range(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", bos_token="<s>")
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(names),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
        bos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_data(target: TrainingTarget, folder: Path) -> None:
    """Greedy texts from a few starts: short, repetitive, learnable in seconds."""
    shard = ShardWriter(64)
    prompts = [np.array([1, 2, i % 60 + 4, i // 60 + 4]) for i in range(180)]
    settings = WritingConfig(max_new=40, drop_loops=False)
    for text in Writer(target, {0}, cache_tokens=180 * 44).write(prompts, settings):
        if len(text.tokens) > 3:
            heldout = text.row % 9 == 0
            shard.add(prompts[text.row], text.tokens, sampled=False, ended=text.ended, heldout=heldout)
    shard.write(folder / "shard-00000.safetensors", {})
    write_manifest(folder, {"shard-00000.safetensors": sha256(folder / "shard-00000.safetensors")}, {})


def final(out: Path) -> str:
    return sha256(max((out / "checkpoints").glob("step-*")) / "tensors.safetensors")


def command(model: Path, data: Path, out: Path) -> list[str]:
    sets = [x for key, value in SMALL.items() for x in ("--set", f"{key}={value}")]
    where = ["--model", str(model), "--data", str(data), "--out", str(out), "--device", "cpu", "--save-every", "2"]
    return [sys.executable, "-m", "redrafter.cli", "train", *where, *sets]


def environment(**extra: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"} | extra


def kill_at_random(arguments: list[str], rng: random.Random, kills: int) -> int:
    """Start the command and kill it ``kills`` times at random moments after its first step; -> kills that struck."""
    struck = 0
    out = Path(arguments[arguments.index("--out") + 1])
    for _ in range(kills):
        child = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before, limit = set((out / "checkpoints").glob("*")), time.monotonic() + 60
        while child.poll() is None and set((out / "checkpoints").glob("*")) == before and time.monotonic() < limit:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        struck += child.poll() is None
        child.kill()
        child.wait()
    return struck


def kill_runs(model: Path, data: Path, base: Path, kills: int, tell: Callable[[str], None] = print) -> dict[str, int]:
    """Kill runs four times each, let each end, and hold its last checkpoint against that of a run in peace."""

    def finish(out: Path) -> str | None:
        done = subprocess.run(command(model, data, out), env=environment(), capture_output=True, timeout=300)
        return final(out) if done.returncode == 0 else None

    reference = finish(base / "whole")
    if reference is None:
        raise RuntimeError("the run in peace failed")
    rng = random.Random(2)
    found = {"kills": 0, "kills_survived": 0, "runs": 0, "runs_unusable": 0, "runs_that_differ": 0}
    while found["kills"] < kills:
        out = base / f"run-{found['runs']}"
        struck = kill_at_random(command(model, data, out), rng, min(4, kills - found["kills"]))
        last = finish(out)
        found["kills"] += struck
        found["kills_survived"] += struck if last == reference else 0
        found["runs"] += 1
        found["runs_unusable"] += last is None
        found["runs_that_differ"] += last not in (None, reference)
        shutil.rmtree(out)
        tell(f"{found['kills']} kills, {found['kills_survived']} survived")
    return found


def some_checkpoint(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    tensors = {"weights.a": torch.randn(5, 7, generator=generator), "rng": torch.arange(9, dtype=torch.uint8)}
    return Checkpoint(step, tensors, {"progress": {"step": step, "best": 1.25}})


def damaged_checkpoints(base: Path, cases: int) -> dict[str, int]:
    """Truncate, flip a bit of, or fill with zeros one file of a checkpoint, ``cases`` times; how many were loaded."""
    whole = save_checkpoint(base / "whole", some_checkpoint(7), keep=1)
    contents = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert load_checkpoint(whole).step == 7
    rng = random.Random(0)
    damaged = base / whole.name
    found = {"damaged": cases, "loaded": 0, "truncated": 0, "bit_flipped": 0, "zero_filled": 0}
    for case in range(cases):
        shutil.rmtree(damaged, ignore_errors=True)
        damaged.mkdir()
        name = rng.choice(sorted(contents))
        for other, data in contents.items():
            (damaged / other).write_bytes(data)
        data = bytearray(contents[name])
        found[("truncated", "bit_flipped", "zero_filled")[case % 3]] += 1
        if case % 3 == 0:
            del data[rng.randrange(len(data)) :]
        elif case % 3 == 1:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            first = rng.randrange(len(data))
            last = min(len(data), first + rng.choice((16, 512, 4096)))
            if not any(data[first:last]):
                first, last = 0, len(data)
            data[first:last] = bytes(last - first)
        assert bytes(data) != contents[name]
        (damaged / name).write_bytes(data)
        try:
            load_checkpoint(damaged)
            found["loaded"] += 1
        except CorruptModel:
            continue
    return found
