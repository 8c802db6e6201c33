"""The drafting side of a step on kernels against the algorithm's text, over drafters, shapes and settings."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from redrafter.algorithm.accept import accept, choose
from redrafter.algorithm.beam import DraftBeams, Reading, draft
from redrafter.algorithm.lookup import Chain
from redrafter.algorithm.noise import key_of
from redrafter.algorithm.sampling import Sampling
from redrafter.algorithm.step import step_noise
from redrafter.algorithm.tree import pack
from redrafter.params import DecodeConfig
from tests.kernels.twins import OPS, random

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")
from redrafter.backends.torch.kernels import step as fast

STATES = 101


class State(NamedTuple):
    history: Tensor  # [B, W]


class HashDrafter:
    """Every history has a random row of logits of its own."""

    def __init__(self, logits_SV: Tensor, token_ids: Tensor | None = None) -> None:
        self.logits_SV, self.token_ids = logits_SV, token_ids

    def begin(self, reading: Reading) -> State:
        return State(reading.tokens[:, -1:] % STATES)

    def extend(self, state: State, beam_BW: Tensor, token_BW: Tensor) -> State:
        return State((state.history.gather(1, beam_BW) * 31 + token_BW * 7 + 3) % STATES)

    def recall(self, reading: Reading, length: int) -> Chain | None:
        """Another chain for every root: of tokens the drafter likes or not, sure or not; of each third root nothing."""
        seed = reading.tokens[:, -1:] + torch.arange(length, device=reading.tokens.device)[None] * 3
        tokens = seed % self.logits_SV.shape[1]
        liked = self.logits_SV[self.begin(reading).history].nan_to_num(0.0).argmax(-1)
        tokens = torch.where(seed % 2 == 0, tokens, liked)
        if self.token_ids is not None:
            tokens = self.token_ids[tokens] + seed // 5 % 2  # at times one that the drafter cannot say
        sure = torch.tensor([0.75, 0.2, 0.9, 1e-6, 0.5], device=seed.device)[seed % 5]
        return Chain(tokens, torch.where(reading.tokens[:, -1:] % 3 == 0, 0.0, sure))

    def logits(self, state: State) -> Tensor:
        return self.logits_SV[state.history]


def tables(kind: str, vocabulary: int) -> Tensor:
    logits = random(STATES, vocabulary, seed=vocabulary, scale=2)
    if kind == "equal":  # every child of every beam scores alike: all ties, and exact ones
        return torch.zeros(STATES, vocabulary)
    if kind == "coarse":  # many ties among a beam's children
        return logits.round()
    if kind == "broken":
        return torch.where(logits > 5, torch.nan, torch.where(logits < -5, torch.inf, logits))
    return logits


def reading_of(rows: int, device: torch.device) -> tuple[Reading, Tensor]:
    root = torch.arange(rows, device=device) * 13 + 5
    one = torch.ones(rows, dtype=torch.int64, device=device)
    return Reading(torch.zeros(rows, 1, 1, device=device), root[:, None], one * 0, one), root


def assert_same_pool(got: DraftBeams, expected: DraftBeams) -> None:
    for name in ("tokens", "parent", "depth", "final"):
        left, right = getattr(got, name), getattr(expected, name)
        assert left.dtype == right.dtype and torch.equal(left, right), name
    torch.testing.assert_close(got.score, expected.score, rtol=1e-5, atol=1e-5)
    assert (got.draft_length, got.tail) == (expected.draft_length, expected.tail)


GRID = [
    DecodeConfig(beam_width=w, branching=k, draft_length=d, tree_size=n)
    for w, k, d, n in (
        (1, 1, 1, 2),
        (1, 3, 4, 6),
        (2, 1, 3, 5),
        (3, 5, 3, 16),
        (4, 4, 5, 32),
        (8, 8, 6, 64),
        (16, 2, 3, 64),
    )
]


KINDS = ["random", "coarse", "equal", "broken"]


@pytest.mark.parametrize("shape", GRID, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_draft_and_pack_are_the_algorithms(kind: str, shape: DecodeConfig, device: torch.device) -> None:
    drafter = HashDrafter(tables(kind, 40).to(device))
    rows = 1 + (KINDS.index(kind) + GRID.index(shape)) % 4
    reading, root = reading_of(rows, device)
    expected = draft(OPS, drafter, reading, root, shape)
    got = fast.fast_draft(drafter, reading, root, shape)
    assert_same_pool(got, expected)
    tree = fast.fast_pack(got, root, shape.tree_size).tree
    assert all(torch.equal(a, b) for a, b in zip(tree[:5], pack(OPS, got, root, shape.tree_size)[:5], strict=True))


@pytest.mark.parametrize("vocabulary", [5, 1500])
@pytest.mark.parametrize("reduced", [False, True])
def test_seed_coupled_draft_is_the_algorithms(vocabulary: int, reduced: bool, device: torch.device) -> None:
    shape = DecodeConfig(beam_width=4, branching=6, draft_length=3, tree_size=20)
    ids = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(2))[: vocabulary * 3 // 5].to(device)
    table = tables("random", vocabulary).to(device)
    drafter = HashDrafter(table[:, : len(ids)] if reduced else table, ids if reduced else None)
    reading, root = reading_of(3, device)
    noise = random(3, 4, vocabulary, seed=1).to(device), torch.tensor([1.0, 0.0, 1.6], device=device)
    expected = draft(OPS, drafter, reading, root, shape, noise)
    assert_same_pool(fast.fast_draft(drafter, reading, root, shape, noise), expected)
    assert not torch.equal(draft(OPS, drafter, reading, root, shape).tokens, expected.tokens)


def test_draft_reads_bfloat16_logits(device: torch.device) -> None:
    shape = DecodeConfig(beam_width=4, branching=4, draft_length=3, tree_size=20)
    table = tables("random", 300).to(device, torch.bfloat16)
    reading, root = reading_of(2, device)
    got = fast.fast_draft(HashDrafter(table), reading, root, shape)
    assert_same_pool(got, draft(OPS, HashDrafter(table.float()), reading, root, shape))


SETTINGS = {"greedy": {}, "sampled": {"inverse_temperature": [1.0, 0.0, 2.0]}, "cut": {"top_k": [3, 30, 1]}}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_whole_drafting_side_is_the_algorithms(setting: str, device: torch.device) -> None:
    vocabulary, shape = 30, DecodeConfig(beam_width=3, branching=3, draft_length=4, tree_size=24)
    fields = {name: torch.tensor(value, device=device) for name, value in SETTINGS[setting].items()}
    key = torch.tensor([key_of(s) for s in (1, 2, 3)], device=device)
    sampling = Sampling(key=key, **fields)
    depths = shape.deepest + 1
    lengths = torch.tensor([5, 17, 900], device=device)

    class Sized:
        vocab_size = vocabulary

    class Held:
        pass

    held = Held()
    held.sampling, held.lengths = sampling, lengths
    noise = step_noise(OPS, Sized(), held, depths)
    quick = fast.fast_noise(sampling, lengths, depths, vocabulary)
    assert (noise is None) == (quick is None) == ("inverse_temperature" not in fields)
    if noise is not None:
        torch.testing.assert_close(quick[0], noise[0], rtol=2e-6, atol=2e-6)

    drafter = HashDrafter(tables("random", vocabulary).to(device))
    reading, root = reading_of(3, device)
    tree = fast.fast_pack(fast.fast_draft(drafter, reading, root, shape, noise), root, shape.tree_size).tree
    eager_tree = pack(OPS, draft(OPS, drafter, reading, root, shape, noise), root, shape.tree_size)
    assert all(torch.equal(a, b) for a, b in zip(tree[:5], eager_tree[:5], strict=True))
    # The target agrees with the drafter's own table at each node's history, so paths are accepted.
    history = torch.zeros_like(tree.tokens)
    for n in range(tree.tokens.shape[1]):
        above = history.gather(1, tree.parent[:, n : n + 1])[:, 0]
        history[:, n] = (above * 31 + tree.tokens[:, n] * 7 + 3) % STATES if n else root % STATES
    logits = drafter.logits_SV[history]
    gumbel = None if noise is None else noise[0]
    expected = accept(OPS, tree, choose(OPS, logits, tree, sampling, gumbel), depths)
    got = fast.fast_choose_accept(logits, tree, sampling, gumbel, depths)
    assert all(torch.equal(a, b) for a, b in zip(got[:5], expected[:5], strict=True))
    assert int(expected.length.max()) >= 2


def test_what_the_kernels_cover() -> None:
    assert fast.covers_shape(DecodeConfig(), 49_152)
    assert fast.covers_shape(DecodeConfig(beam_width=16, branching=16, tree_size=128), 49_152)
    assert not fast.covers_shape(DecodeConfig(beam_width=32, branching=16), 49_152)
    assert fast.covers_shape(DecodeConfig(beam_width=32, branching=16), 8)
    assert not fast.covers_shape(DecodeConfig(tree_size=129), 49_152)
    assert not fast.covers_shape(DecodeConfig(tree_size=1), 49_152)
    assert not fast.covers_shape(DecodeConfig(beam_width=16, branching=16, draft_length=32), 49_152)
    assert fast.covers_sampling(Sampling(inverse_temperature=torch.ones(1), key=torch.ones(1, 2)))
    assert not fast.covers_sampling(Sampling(top_p=torch.ones(1)))
