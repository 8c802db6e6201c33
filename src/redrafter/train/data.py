"""The target writes its own training texts: it answers prompts that are given and prompts that it writes itself.

The work is a fixed sequence of batches, a function of the settings and the seed alone; batch n becomes shard n, whole
or not at all. A run that was killed goes on at the first shard that is missing, so the data are the same however often
it was interrupted: nothing that goes into a shard looks at the clock.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from transformers import AutoTokenizer

from redrafter import __version__
from redrafter.errors import InvalidRequest
from redrafter.files import sha256
from redrafter.models.integrity import read_json
from redrafter.train.chat import chat_frame, digest, encode, end_ids, is_heldout, render
from redrafter.train.files import remove_leftovers, weights_sha256, write_json
from redrafter.train.prompts import Prompt
from redrafter.train.samples import ShardWriter, shard_counts, write_manifest
from redrafter.train.target import OpenModel, TrainingTarget
from redrafter.train.writing import Text, Writer, WritingConfig, loops

PLAN, LOCK = "plan.json", ".lock"
EMPTY_ROUNDS = 8
"""Rounds of own prompts without a usable new one, after which the model has no more to say."""
Tell = Callable[["DataProgress"], None]


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """own: the target writes prompts, too; greedy_share: of the batches that answer its own prompts; temperatures: of
    the other batches; rows, prompt_rows: rows of a batch at most (0: by the device); pool: batches of prompts written
    before they are answered; max_new: answer tokens (0: 320, or half a short context); max_prompt: tokens of a prompt
    (0: 192, or a quarter of a short context), at least min_prompt; tail: share of a batch's rows at which stragglers
    are cut; loop_share: share of the looping answers that is kept; heldout_one_in:
    every n-th prompt, by its hash, is held out; cache_tokens: slots of the key/value cache (0: by free memory)."""

    own: bool = True
    greedy_share: float = 0.65
    temperatures: tuple[float, ...] = (1.0, 0.7)
    rows: int = 0
    prompt_rows: int = 0
    pool: int = 4
    max_new: int = 0
    max_prompt: int = 0
    min_prompt: int = 4
    tail: float = 0.03
    loop_share: float = 0.1
    heldout_one_in: int = 50
    cache_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", tuple(self.temperatures))
        for name in ("greedy_share", "tail", "loop_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidRequest(f"{name}={getattr(self, name)} is not allowed: it must be from 0 to 1")
        for name, least in (("max_new", 0), ("max_prompt", 0), ("pool", 1), ("heldout_one_in", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise InvalidRequest(f"{name}={getattr(self, name)} is not allowed: it must be {least} or more")
        if not self.temperatures or min(self.temperatures) <= 0:
            raise InvalidRequest(f"temperatures={list(self.temperatures)}: give one or more, all over 0")


class DataProgress(NamedTuple):
    shards: int
    kept: int
    """answer tokens so far, those of earlier calls included"""
    rate: float
    """kept answer tokens per second of this call"""
    left: float | None
    """seconds until the budget is used up, if there is one"""


class AnswerBatch(NamedTuple):
    texts: list[str]
    """rendered, up to where the answer starts"""
    ids: list[np.ndarray]
    temperature: float


def cache_slots(target: TrainingTarget) -> int:
    """How many tokens' keys and values 60 % of the free device memory holds (of 2 GB on the CPU)."""
    config = target.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * config.num_key_value_heads * width * target.embedding.element_size()
    free = torch.cuda.mem_get_info()[0] if target.device.type == "cuda" else 2**31
    return max(4096, min(int(0.6 * free / size), 2**20 if target.device.type == "cpu" else 2**40))


def mix(settings: DataSettings) -> list[float]:
    """Temperatures in the wanted proportion, twenty of them."""
    greedy = round(20 * settings.greedy_share)
    return [0.0] * greedy + [settings.temperatures[i % len(settings.temperatures)] for i in range(20 - greedy)]


def group_by_length(lengths: list[int], rows_for: Callable[[int], int]) -> list[np.ndarray]:
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


class Generation:
    """One data folder: its plan, the prompts seen, the shards written and a count of everything that happened."""

    def __init__(self, model: OpenModel, folder: Path, prompts: list[Prompt], settings: DataSettings) -> None:
        self.model, self.folder, self.settings, self.given = model, folder, settings, prompts
        self.target = model.target()
        self.tokenizer = AutoTokenizer.from_pretrained(model.files.path, local_files_only=True)
        self.frame = chat_frame(self.tokenizer)
        self.facts = self._plan()
        self.writer = Writer(self.target, end_ids(self.tokenizer, self.target.config), self.facts["cache_tokens"])
        cpu = self.target.device.type == "cpu"
        self.rows = settings.rows or (64 if cpu else 6144)
        self.prompt_rows = settings.prompt_rows or (64 if cpu else 8192)
        self.seen: set[int] = set()
        self.count: Counter[str] = Counter()
        self.shards: dict[str, str] = {}

    def _plan(self) -> dict[str, Any]:
        """What the data are a function of; kept in the folder, so that a later call goes on with the same."""
        asked = {
            "model": self.model.files.name,
            "model_sha256": weights_sha256(self.model.files),
            "device": self.model.device.type,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "prompts_sha256": hashlib.sha256(json.dumps(self.given).encode()).hexdigest(),
            "settings": json.loads(json.dumps(asdict(self.settings))),
        }
        path = self.folder / PLAN
        if path.is_file():
            found = read_json(path)
            same = {**found.get("settings", {}), **found}
            for key, value in {**asked["settings"], **asked}.items():
                if key not in ("model", "settings") and same.get(key) != value:
                    raise InvalidRequest(
                        f"{self.folder} was begun with {key}={same.get(key)!r}, not {value!r}: "
                        "use the same or another --out"
                    )
            return found
        plan = asked | {
            "cache_tokens": self.settings.cache_tokens or cache_slots(self.target),
            "redrafter": __version__,
        }
        write_json(path, plan)
        return plan

    def run(self, tokens: int | None, seconds: float | None, tell: Tell) -> dict[str, Any]:
        """Write shards until ``tokens`` answer tokens are kept, ``seconds`` have passed or all prompts are answered."""
        started = time.monotonic()
        writing = longest = 0.0
        before = None
        remove_leftovers(self.folder)
        for index, batch in enumerate(self.batches(lambda: self._over(tokens, seconds, started, 0.0))):
            path = self.folder / f"shard-{index:05d}.safetensors"
            if not path.is_file():
                before = self.count["kept_answer_tokens"] if before is None else before
                if self._over(tokens, seconds, started, longest):
                    break
                mark = time.monotonic()
                self.write_shard(path, index, batch)
                longest = max(longest, time.monotonic() - mark)
                writing = time.monotonic() - started
            self.count.update(shard_counts(path))
            self.shards[path.name] = sha256(path)
            if before is not None:
                self.save_manifest()
                tell(self.progress(before, writing, tokens, seconds))
        made = self.count["kept_answer_tokens"] - (self.count["kept_answer_tokens"] if before is None else before)
        report = self.save_manifest() | {"seconds": round(time.monotonic() - started, 1), "new_answer_tokens": made}
        report["kept_answer_tokens_per_second"] = round(made / max(1e-9, report["seconds"]))
        return report

    def _over(self, tokens: int | None, seconds: float | None, started: float, need: float) -> bool:
        """``need``: seconds the next batch may take; a batch is never cut short, or texts would depend on it."""
        late = seconds is not None and time.monotonic() - started + need > seconds
        return late or (tokens is not None and self.count["kept_answer_tokens"] >= tokens)

    def progress(self, before: int, elapsed: float, tokens: int | None, seconds: float | None) -> DataProgress:
        kept = self.count["kept_answer_tokens"]
        rate = (kept - before) / max(1e-9, elapsed)
        left = [max(0.0, tokens - kept) / rate] if tokens is not None and rate > 0 else []
        left += [max(0.0, seconds - elapsed)] if seconds is not None else []
        return DataProgress(len(self.shards), kept, rate, min(left) if left else None)

    def save_manifest(self) -> dict[str, Any]:
        facts = self.facts | {"counts": dict(sorted(self.count.items()))}
        write_manifest(self.folder, self.shards, facts)
        return facts

    def batches(self, over: Callable[[], bool]) -> Iterator[AnswerBatch]:
        """The whole sequence: given prompts greedily, then sampled, then round after round of the target's own."""
        given = self.fresh([render(self.tokenizer, p.messages) for p in self.given])
        if given:
            yield from self.grouped(given, [0.0], 0)
            yield from self.grouped(given, list(self.settings.temperatures), 1)
        empty = 0
        for stage in count(2) if self.settings.own else ():
            texts: list[str] = []
            for part in range(self.settings.pool):
                path = self.folder / f"prompts-{stage - 2:04d}-{part:02d}.json"
                if not path.is_file():
                    if over():
                        return
                    write_json(path, self.own_prompts(stage, part))
                found = read_json(path)
                self.count.update(found["counts"])
                texts += self.fresh([self.frame.render(p) for p in found["prompts"]])
            empty = 0 if texts else empty + 1
            if empty == EMPTY_ROUNDS:
                tries = EMPTY_ROUNDS * self.settings.pool
                raise InvalidRequest(f"the model wrote no usable new prompt in {tries} batches: give --prompts")
            yield from self.grouped(texts, mix(self.settings), stage)

    def fresh(self, texts: list[str]) -> list[str]:
        """Those not seen before."""
        keys = [digest(t) for t in texts]
        out = []
        for text, key in zip(texts, keys, strict=True):
            self.count["prompts_repeated"] += key in self.seen
            if key not in self.seen:
                out.append(text)
            self.seen.add(key)
        return out

    def own_prompts(self, stage: int, part: int) -> dict[str, Any]:
        """Prompts that the target writes from where the user's text starts, at T = 1."""
        settings = self.settings
        self.writer.generator.manual_seed(_seed(settings.seed, stage, part))
        before = np.array(encode(self.tokenizer, [self.frame.before])[0], dtype=np.int64)
        if len(before) == 0:
            raise InvalidRequest("the model has no token to start its own prompts with: give --prompts")
        ends = bool(self.tokenizer.chat_template)
        longest = settings.max_prompt if ends else min(32, settings.max_prompt)
        config = WritingConfig(max_new=longest, temperature=1.0, drop_loops=False, tail=0.01, check_every=16)
        rows = min(self.prompt_rows, self.writer.rows_that_fit(len(before), config))
        texts = self.writer.write([before] * rows, config)
        texts.sort(key=lambda t: t.row)
        whole = [
            t for t in texts if (t.ended or not ends) and len(t.tokens) > settings.min_prompt and not loops(t.tokens)
        ]
        ids = [(t.tokens[:-1] if t.ended else t.tokens).tolist() for t in whole]
        decoded = [t.strip() for t in self.tokenizer.batch_decode(ids, skip_special_tokens=False)]
        special = [t for t in self.tokenizer.all_special_tokens if t]
        usable = [t for t in decoded if any(c.isalnum() for c in t) and not any(s in t for s in special)]
        counts = {"own_prompts_written": len(texts), "own_prompts_unusable": len(texts) - len(usable)}
        return {"prompts": usable, "counts": counts}

    def grouped(self, texts: list[str], temperatures: list[float], stage: int) -> Iterator[AnswerBatch]:
        """Batches of like length, in random order; every one has one temperature, drawn from the list."""
        rng = np.random.default_rng([self.settings.seed, stage])
        limit = self.model.context_limit - self.settings.max_new
        if limit < 1:
            raise InvalidRequest(
                f"max_new={self.settings.max_new} leaves no room in a context of {self.model.context_limit}: lower it"
            )
        ids = [np.array(x, dtype=np.int64) for x in encode(self.tokenizer, texts)]
        kept = [i for i, x in enumerate(ids) if len(x) <= limit]
        self.count["prompts_too_long"] += len(ids) - len(kept)
        config = WritingConfig(max_new=self.settings.max_new)
        groups = group_by_length(
            [len(ids[i]) for i in kept], lambda n: min(self.rows, self.writer.rows_that_fit(n, config))
        )
        for group in rng.permutation(len(groups)):
            chosen = [kept[i] for i in groups[group]]
            yield AnswerBatch([texts[i] for i in chosen], [ids[i] for i in chosen], float(rng.choice(temperatures)))

    def write_shard(self, path: Path, index: int, batch: AnswerBatch) -> None:
        settings = self.settings
        self.writer.generator.manual_seed(_seed(settings.seed, 1 << 30, index))
        config = WritingConfig(max_new=settings.max_new, temperature=batch.temperature, tail=settings.tail)
        shard, counts = ShardWriter(self.target.config.vocab_size), Counter[str]()
        rng = np.random.default_rng([settings.seed, 1 << 30, index])
        for text in sorted(self.writer.write(batch.ids, config), key=lambda t: t.row):
            if self._keep(text, batch, counts, rng):
                heldout = is_heldout(batch.texts[text.row], settings.heldout_one_in)
                sampled = batch.temperature > 0
                prompt = batch.ids[text.row]
                shard.add(prompt, text.tokens, sampled=sampled, ended=text.ended, heldout=heldout)
                counts.update(kept=1, kept_truncated=not text.ended, kept_sampled=sampled, kept_heldout=heldout)
                counts.update(kept_prompt_tokens=len(prompt), kept_answer_tokens=len(text.tokens))
        shard.write(path, counts)

    def _keep(self, text: Text, batch: AnswerBatch, counts: Counter[str], rng: np.random.Generator) -> bool:
        counts["answers"] += 1
        if text.looped or loops(text.tokens):
            counts["answers_looping"] += 1
            # Held-out texts show what answers are like; loops flatter a drafter.
            if (
                is_heldout(batch.texts[text.row], self.settings.heldout_one_in)
                or rng.random() >= self.settings.loop_share
            ):
                return False
            counts["kept_looping"] += 1
        if len(text.tokens) < 3:
            counts["answers_too_short"] += 1
            return False
        return True


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def generate(
    model: OpenModel,
    folder: Path,
    prompts: list[Prompt],
    settings: DataSettings,
    budget: tuple[int | None, float | None],
    tell: Tell,
) -> dict[str, Any]:
    """Fill ``folder`` up to ``budget`` (tokens, seconds); returns the manifest's facts and this call's rate."""
    if not prompts and not settings.own:
        raise InvalidRequest("no prompts and own=False: there is nothing to answer; give --prompts or leave --own on")
    limit = model.context_limit
    settings = replace(
        settings,
        max_new=settings.max_new or min(320, limit // 2),
        max_prompt=settings.max_prompt or min(192, limit // 4),
    )
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InvalidRequest(f"another process is writing {folder}: wait for it or use another --out") from error
    with lock:
        return Generation(model, folder, prompts, settings).run(*budget, tell)
