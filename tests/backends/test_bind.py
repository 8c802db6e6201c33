"""What is folded or looked up when a drafter is bound to its target changes no draft."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from redrafter.algorithm.beam import DraftBeams, Reading, draft
from redrafter.backends.torch.drafter import Drafter
from redrafter.backends.torch.drafting import TorchDrafter
from redrafter.backends.torch.load import bind, make_target
from redrafter.backends.torch.ops import TorchOps
from redrafter.backends.torch.target import TorchTarget
from redrafter.errors import InvalidRequest
from redrafter.params import DecodeConfig
from redrafter.train.settings import drafter_bytes
from tests.tiny import VOCAB, WIDTH, drafter_config, make_model

ROWS, TEXT, DRAFT = 8, 12, 40
SHAPE = DecodeConfig(beam_width=4, branching=4, draft_length=4, tree_size=24, prompt_lookup=0)


@pytest.fixture(scope="module")
def target() -> TorchTarget:
    return make_target(make_model(), (0, 2))


def random_drafter(**changes: Any) -> Drafter:
    torch.manual_seed(7)
    drafter = Drafter(drafter_config(draft_vocabulary=DRAFT, **changes)).requires_grad_(False)
    drafter.token_ids.copy_(torch.randperm(VOCAB)[:DRAFT])
    for parameter in drafter.parameters():
        parameter.mul_(2)
    return drafter


def drafts(worker: TorchDrafter) -> DraftBeams:
    worker.allocate(ROWS, TEXT)
    torch.manual_seed(8)
    features, tokens = torch.randn(ROWS, TEXT, 3 * WIDTH), torch.randint(VOCAB, (ROWS, TEXT))
    first = torch.zeros(ROWS, dtype=torch.int64)
    return draft(TorchOps(), worker, Reading(features, tokens, first, first + TEXT), tokens[:, -1], SHAPE)


def unfolded(target: TorchTarget, drafter: Drafter, vocabulary: int = 0) -> TorchDrafter:
    rows = target.head_weight[drafter.token_ids[: vocabulary or None]]
    head = drafter.head if drafter.config.head == "own" else lambda x: x @ rows.T
    return TorchDrafter(drafter, target.embed, head, vocabulary)


def assert_same_drafts(ours: DraftBeams, theirs: DraftBeams) -> None:
    for name in ("tokens", "parent", "depth", "final"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.allclose(ours.score, theirs.score, atol=1e-4)
    assert theirs.tokens.unique().numel() >= 16, "the same few tokens everywhere say little"


@pytest.mark.parametrize("table", [False, True], ids=["product", "table"])
@pytest.mark.parametrize("cell", ["gru", "rnn"])
@pytest.mark.parametrize("sizes", [{}, {"width": 16, "exit_dim": 24}, {"exit_dim": 20}], ids=str)
def test_drafts_are_those_of_the_separate_matrices(
    target: TorchTarget, sizes: dict[str, int], cell: str, table: bool
) -> None:
    drafter = random_drafter(cell=cell, **sizes)
    expected = drafts(unfolded(target, drafter))
    worker = bind(target, copy.deepcopy(drafter), table=table)
    assert isinstance(worker.drafter.exit, torch.nn.Identity)
    assert_same_drafts(drafts(worker), expected)


def test_fewer_draft_tokens(target: TorchTarget) -> None:
    drafter = random_drafter(cell="gru")
    expected = drafts(unfolded(target, drafter, 30))
    assert set(expected.tokens.flatten().tolist()) <= set(drafter.token_ids[:30].tolist())
    assert_same_drafts(drafts(bind(target, drafter, 30)), expected)


@pytest.mark.parametrize("changes", [{"exit_dim": WIDTH + 8}, {"draft_vocabulary": 0}], ids=["wide", "whole"])
def test_what_would_read_more_bytes_is_left_alone(target: TorchTarget, changes: dict[str, int]) -> None:
    drafter = Drafter(drafter_config(**{"draft_vocabulary": DRAFT, **changes}))
    before = drafter_bytes(drafter.config).per_depth
    bound = bind(target, drafter).drafter
    assert bound.exit.out_features == WIDTH
    rows = changes.get("draft_vocabulary", DRAFT) or VOCAB
    assert before > 2 * WIDTH * (rows + drafter.config.exit_dim)


def test_the_table_holds_every_token_and_its_bytes_are_reported(target: TorchTarget) -> None:
    drafter = random_drafter(cell="gru", width=16, exit_dim=24)
    size = drafter_bytes(drafter.config)
    table = bind(target, drafter, table=True).table
    assert isinstance(table, Tensor) and table.shape == (VOCAB, 48) and size.table == 2 * table.numel()
    assert size.per_depth - size.per_depth_with_table == 2 * (WIDTH * 16 + 16 * 48)
    # gates, input_proj with its bias, a block, the folded head
    matrices = 16 * 48 + 48, 32 * 24 + 24, 24 * 24 + 24, 24 * 24 + 24, DRAFT * 24
    assert size.per_depth_with_table == 2 * sum(matrices)


def test_a_table_that_saves_nothing_is_refused(target: TorchTarget) -> None:
    with pytest.raises(InvalidRequest, match="cell='sum' would save no product"):
        bind(target, random_drafter(cell="sum"), table=True)
