"""A target and drafters made of tables, small enough to enumerate: no model, no rounding, every history its own law.

A history's state is the sum of one random number per (position, token), so it depends on every token of the path and
on nothing else; the target sums what the tree's mask lets a node see, exactly as attention would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from redrafter.algorithm.accept import Accepted
from redrafter.algorithm.beam import Reading
from redrafter.algorithm.lookup import Chain
from redrafter.algorithm.noise import key_of
from redrafter.algorithm.sampling import Penalties, Sampling
from redrafter.algorithm.step import DecodeState, step
from redrafter.algorithm.tree import TokenTree
from redrafter.backends.torch.ops import TorchOps

OPS = TorchOps()
STATES, POSITIONS = 4093, 256


@dataclass
class Shape:
    beam_width: int
    draft_length: int
    tree_size: int
    branching: int = 4
    seed_coupled: bool = True
    prompt_lookup: int = 0

    @property
    def deepest(self) -> int:
        return max(self.draft_length, min(self.prompt_lookup, self.tree_size - 1))


class Tables:
    """The random tables behind a target: [POSITIONS, V] integers and [STATES, V] logits."""

    def __init__(self, vocab_size: int, seed: int, scale: float = 1.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocab_size = vocab_size
        self.word = torch.randint(STATES, (POSITIONS, vocab_size), generator=generator)
        self.logits = torch.randn(STATES, vocab_size, generator=generator) * scale

    def state_of(self, tokens: list[int]) -> int:
        """Of a whole text."""
        return sum(int(self.word[i, t]) for i, t in enumerate(tokens)) % STATES


class TableTarget:
    """``committed`` [B] is the cache: the sum over all committed tokens. ``nodes`` are the slots that verify wrote."""

    def __init__(self, tables: Tables, prompts: list[list[int]]) -> None:
        self.tables = tables
        self.vocab_size = tables.vocab_size
        self.committed = torch.tensor([tables.state_of(p) for p in prompts])

    def verify(self, tree: TokenTree, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        self.nodes = self.tables.word[lengths_B[:, None] + tree.depth, tree.tokens]
        seen = (tree.mask * self.nodes[:, None, :]).sum(-1)
        state = (self.committed[:, None] + seen) % STATES
        return self.tables.logits[state], state[..., None].float()

    def commit(self, lengths_B: Tensor, accepted: Accepted) -> None:
        kept = torch.arange(accepted.path.shape[1])[None] <= accepted.length[:, None]
        self.committed = (self.committed + (self.nodes.gather(1, accepted.path) * kept).sum(-1)) % STATES


class TableState(NamedTuple):
    history: Tensor  # [B, W]
    position: Tensor  # [B]


class TableDrafter:
    """kind: perfect (the target's own logits) | random (another table) | worst (the target's, upside down) | broken
    (NaN and infinities among a random table's logits)."""

    def __init__(self, target: TableTarget, kind: str, token_ids: Tensor | None = None) -> None:
        self.target, self.token_ids = target, token_ids
        own = Tables(target.vocab_size, seed=977).logits
        self.logits_SV = {
            "perfect": target.tables.logits,
            "random": own,
            "worst": -target.tables.logits,
            "broken": torch.where(own > 1, torch.nan, torch.where(own < -1, torch.inf, own)),
        }[kind]

    def begin(self, reading: Reading) -> TableState:
        rows = torch.arange(reading.count.shape[0])
        position = reading.first + reading.count
        root = reading.tokens[rows, reading.count - 1]
        history = (self.target.committed + self.target.tables.word[position, root]) % STATES
        return TableState(history[:, None], position)

    def extend(self, state: TableState, beam_BW: Tensor, token_BW: Tensor) -> TableState:
        position = state.position + 1
        word = self.target.tables.word[position[:, None], token_BW]
        return TableState((state.history.gather(1, beam_BW) + word) % STATES, position)

    def recall(self, reading: Reading, length: int) -> Chain:
        """Anything: the plain tokens must come out whatever is recalled, and however surely."""
        seed = (reading.first * 37 + reading.tokens[:, 0])[:, None] + torch.arange(length)[None] * 11
        return Chain(seed % self.target.vocab_size, torch.tensor([0.0, 0.3, 0.9, 0.99])[seed // 5 % 4])

    def logits(self, state: TableState) -> Tensor:
        logits = self.logits_SV[state.history]
        return logits if self.token_ids is None else logits[..., self.token_ids]


def start(prompts: list[list[int]], sampling: Sampling) -> tuple[list[list[int]], DecodeState]:
    """The last token of each prompt plays the root; the others are committed."""
    root = torch.tensor([p[-1] for p in prompts])
    lengths = torch.tensor([len(p) - 1 for p in prompts])
    reading = Reading(torch.zeros(len(prompts), 1, 1), root[:, None], lengths - 1, torch.ones_like(root))
    return [p[:-1] for p in prompts], DecodeState(reading, root, lengths, sampling)


def generate(tables: Tables, prompts: list[list[int]], sampling: Sampling, shape: Shape, count: int, **how) -> Tensor:
    """[B, count] tokens after the root. ``how``: drafter (kind or None), step_fn (a control's), steps (a counter)."""
    committed, state = start(prompts, sampling)
    target = TableTarget(tables, committed)
    kind = how.get("drafter")
    drafter = TableDrafter(target, kind, how.get("token_ids")) if kind else None
    rows = torch.arange(len(prompts))
    filled = torch.zeros(len(prompts), dtype=torch.int64)
    out = torch.zeros(len(prompts), count + 1, dtype=torch.int64)  # the last column takes what is not wanted
    while int(filled.min()) < count:
        state, accepted, _ = how.get("step_fn", step)(OPS, target, drafter, state, shape)
        assert bool(accepted.finite.all())
        for d in range(accepted.tokens.shape[1]):
            column = torch.where(d <= accepted.length, filled + d, count).clamp(max=count)
            out[rows, column] = accepted.tokens[:, d]
        filled = filled + accepted.length + 1
        how.get("steps", []).append(accepted.length)
    return out[:, :count]


DEFAULTS = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition": 1.0,
    "presence": 0.0,
    "frequency": 0.0,
    "seed": 0,
    "bias": None,
}


def sampling_of(settings: list[dict], prompts: list[list[int]], vocab_size: int) -> Sampling:
    """Every field filled, whether or not a row uses it. The last token of a prompt is the first of the answer."""
    rows = [{**DEFAULTS, **s} for s in settings]

    def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([r[name] for r in rows], dtype=dtype)

    def counts(texts: list[list[int]]) -> Tensor:
        return torch.stack([torch.bincount(torch.tensor(t, dtype=torch.int64), minlength=vocab_size) for t in texts])

    temperature = column("temperature")
    top_k = column("top_k", torch.int64)
    return Sampling(
        inverse_temperature=torch.where(temperature > 0, 1 / temperature.clamp(min=1e-9), 0.0),
        key=torch.tensor([key_of(r["seed"]) for r in rows]),
        top_k=torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size),
        top_p=column("top_p"),
        log_min_p=column("min_p").log(),
        bias=torch.tensor([r["bias"] or [0.0] * vocab_size for r in rows]),
        penalties=Penalties(
            repetition=column("repetition"),
            presence=column("presence"),
            frequency=column("frequency"),
            prompt=counts([p[:-1] for p in prompts]).float(),
            answer=counts([p[-1:] for p in prompts]).float(),
        ),
    )
