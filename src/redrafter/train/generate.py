"""The target writes its own training texts: ``python -m redrafter.train.generate --model M --out D --seconds 420``.

It writes prompts (sampled at T = 1 from the chat template up to where the user's text starts) and answers them,
greedily or sampled. Prompts of a JSONL file are answered too, greedily and once sampled.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from redrafter.errors import InvalidRequest
from redrafter.train.chat import chat_frame, digest, encode, end_ids, is_heldout
from redrafter.train.samples import ShardWriter
from redrafter.train.target import TrainingTarget
from redrafter.train.writing import Text, Writer, WritingConfig, loops


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="redrafter.train.generate", description=__doc__)
    p.add_argument("--model", required=True, help="folder of the target")
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    p.add_argument("--seconds", type=float, default=420.0, help="wall-clock budget, loading included")
    p.add_argument("--prompts", type=Path, help='JSONL with a "prompt" field')
    p.add_argument("--own", action=argparse.BooleanOptionalAction, default=True, help="the target writes prompts")
    p.add_argument("--prompt-share", type=float, default=0.2, help="share of the time left spent on writing prompts")
    p.add_argument("--pool", type=int, default=400_000, help="own prompts at most before answering starts")
    p.add_argument("--greedy-share", type=float, default=0.65, help="share of the batches answered greedily")
    p.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.7], help="of the other batches")
    p.add_argument("--rows", type=int, default=6144, help="rows of a batch at most")
    p.add_argument("--prompt-rows", type=int, default=8192)
    p.add_argument("--max-new", type=int, default=320)
    p.add_argument("--max-prompt", type=int, default=192, help="tokens of the user's text at most")
    p.add_argument("--min-prompt", type=int, default=4)
    p.add_argument("--tail", type=float, default=0.03, help="share of a batch's rows at which stragglers are cut")
    p.add_argument("--loop-share", type=float, default=0.0, help="share of the looping answers that is kept")
    p.add_argument("--cache-tokens", type=int, default=0, help="slots of the key/value cache (0: 60 %% of free memory)")
    p.add_argument("--seed", type=int, default=0)
    return p


def cache_slots(target: TrainingTarget) -> int:
    """How many tokens' keys and values 60 % of the free device memory holds."""
    config = target.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * config.num_key_value_heads * width * target.embedding.element_size()
    free = torch.cuda.mem_get_info()[0] if target.device.type == "cuda" else 2**31
    return int(0.6 * free / size)


class Generation:
    """One run: the prompts seen, the shards written, and a count of everything that happened."""

    def __init__(self, args: argparse.Namespace, deadline: float) -> None:
        self.args, self.deadline = args, deadline
        self.target = TrainingTarget.load(args.model, args.device, getattr(torch, args.dtype))
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.frame = chat_frame(self.tokenizer)
        end = end_ids(self.tokenizer, self.target.config)
        self.writer = Writer(self.target, end, args.cache_tokens or cache_slots(self.target), args.seed)
        self.shards = ShardWriter(args.out, self.target.config.vocab_size)
        self.rng = np.random.default_rng(args.seed)
        self.seen: set[int] = set()
        self.count: Counter[str] = Counter()
        self.prompt_seconds = 0.0

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def own_prompts(self, until: float) -> list[str]:
        """Prompts that the target writes until that time, or until the pool is full."""
        args = self.args
        before = np.array(encode(self.tokenizer, [self.frame.before])[0])
        settings = WritingConfig(max_new=args.max_prompt, temperature=1.0, drop_loops=False, tail=0.01, check_every=16)
        rows = min(args.prompt_rows, self.writer.rows_that_fit(len(before), settings))
        prompts: list[str] = []
        while len(prompts) < args.pool and time.monotonic() < until:
            texts = self.writer.write([before] * rows, settings, until)
            self.count["own_prompts_written"] += len(texts)
            whole = [t for t in texts if t.ended and len(t.tokens) > args.min_prompt and not loops(t.tokens)]
            self.count["own_prompts_unusable"] += len(texts) - len(whole)
            decoded = self.tokenizer.batch_decode([t.tokens[:-1].tolist() for t in whole], skip_special_tokens=False)
            prompts += self.fresh(decoded)
        return prompts

    def fresh(self, prompts: list[str]) -> list[str]:
        """Those not seen before, that say something and hold no special token."""
        special = [t for t in self.tokenizer.all_special_tokens if t]
        out = []
        for prompt in (p.strip() for p in prompts):
            key = digest(prompt)
            if key in self.seen:
                self.count["prompts_repeated"] += 1
            elif not any(c.isalnum() for c in prompt) or any(s in prompt for s in special):
                self.count["prompts_unusable"] += 1
            else:
                self.seen.add(key)
                out.append(prompt)
        return out

    def answer(self, prompts: list[str], temperatures: list[float]) -> None:
        """One answer per prompt; every batch has one temperature, drawn from the list."""
        ids = [np.array(x) for x in encode(self.tokenizer, [self.frame.render(p) for p in prompts])]
        groups = group_by_length([len(x) for x in ids], self.batch_rows)
        for group in self.rng.permutation(len(groups)):
            if self.late:
                return
            index = groups[group]
            temperature = float(self.rng.choice(temperatures))
            settings = WritingConfig(max_new=self.args.max_new, temperature=temperature, tail=self.args.tail)
            texts = self.writer.write([ids[i] for i in index], settings, self.deadline)
            self.keep(texts, [prompts[i] for i in index], [ids[i] for i in index], temperature)

    def batch_rows(self, length: int) -> int:
        return min(self.args.rows, self.writer.rows_that_fit(length, WritingConfig(max_new=self.args.max_new)))

    def keep(self, texts: list[Text], prompts: list[str], ids: list[np.ndarray], temperature: float) -> None:
        for text in texts:
            self.count["answers"] += 1
            heldout = is_heldout(prompts[text.row])
            if text.looped or loops(text.tokens):
                self.count["answers_looping"] += 1
                if heldout or self.rng.random() >= self.args.loop_share:
                    continue
                self.count["kept_looping"] += 1
            if len(text.tokens) < 3:
                self.count["answers_too_short"] += 1
                continue
            sampled = temperature > 0
            self.shards.add(ids[text.row], text.tokens, sampled=sampled, ended=text.ended, heldout=heldout)
            self.count["kept"] += 1
            self.count["kept_truncated"] += not text.ended
            self.count["kept_sampled"] += sampled
            self.count["kept_heldout"] += heldout
            self.count["kept_prompt_tokens"] += len(ids[text.row])
            self.count["kept_answer_tokens"] += len(text.tokens)
        self.shards.flush()
        print(
            json.dumps({"seconds": round(self.args.seconds + time.monotonic() - self.deadline), **self.count}),
            flush=True,
        )


def group_by_length(lengths: list[int], rows_for: Any) -> list[np.ndarray]:
    """Indices in batches, shortest first; a batch ends at a change of length once it is half full.

    Batches of one length need no padding and no mask, which the fused attention kernels prefer.
    """
    order = np.argsort(np.array(lengths, dtype=np.int64), kind="stable")
    groups: list[np.ndarray] = []
    first = 0
    for i in range(1, len(order) + 1):
        size = i - first
        full = rows_for(lengths[order[i - 1]])
        ends = i == len(order) or lengths[order[i]] != lengths[order[i - 1]]
        if i == len(order) or size >= full or (ends and size >= full // 2):
            groups.append(order[first:i])
            first = i
    return groups


def read_prompts(path: Path, limit_characters: int = 1200) -> list[str]:
    """The "prompt" field of every line; longer ones are left out."""
    prompts = []
    for number, line in enumerate(path.read_text().strip().split("\n"), 1):
        record = json.loads(line)
        if "prompt" not in record:
            raise InvalidRequest(f'{path}:{number}: no "prompt" field; give one per line')
        if len(record["prompt"]) <= limit_characters:
            prompts.append(record["prompt"])
    return prompts


def mix(args: argparse.Namespace) -> list[float]:
    """Temperatures in the wanted proportion, twenty of them."""
    greedy = round(20 * args.greedy_share)
    return [0.0] * greedy + [args.temperatures[i % len(args.temperatures)] for i in range(20 - greedy)]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parser().parse_args(argv)
    started = time.monotonic()
    run = Generation(args, started + args.seconds)
    if args.prompts:
        real = run.fresh(read_prompts(args.prompts))
        run.count["real_prompts"] = len(real)
        run.answer(real, [0.0])
        run.answer(real, args.temperatures)
    while args.own and not run.late:
        mark = time.monotonic()
        prompts = run.own_prompts(mark + args.prompt_share * (run.deadline - mark))
        run.count["own_prompts"] += len(prompts)
        run.prompt_seconds += time.monotonic() - mark
        run.answer(prompts, mix(args))
    seconds = time.monotonic() - started
    report = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("model", "out", "prompts")},
        "counts": dict(run.count),
        "seconds": round(seconds, 1),
        "seconds_writing_prompts": round(run.prompt_seconds, 1),
        "raw_tokens_per_second": round(run.writer.raw_tokens / seconds),
        "kept_answer_tokens_per_second": round(run.count["kept_answer_tokens"] / seconds),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "generation.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report), flush=True)
    return report


if __name__ == "__main__":
    main()
