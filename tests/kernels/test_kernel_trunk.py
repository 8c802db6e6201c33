"""What a step drafts from: the few launches of ``KernelDrafter.begin`` against ``TorchDrafter.begin``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")

from redrafter.algorithm.beam import Reading
from redrafter.backends.torch.cuda import KernelDrafter
from redrafter.backends.torch.drafter import Drafter
from redrafter.backends.torch.drafting import DraftState, TorchDrafter, token_table
from redrafter.backends.torch.kernels.matmul import MAX_ROWS
from redrafter.backends.torch.kernels.trunk import LastContext, scaled_parts
from redrafter.backends.torch.kernels.window import MAX_PAIRS
from redrafter.backends.torch.trunk import rms
from tests.tiny import VOCAB, drafter_config

D = 20


def reading_of(count: list[int], pairs: int, first: list[int] | None = None) -> Reading:
    """Random pairs; those past the count repeat the last one, as the algorithm promises."""
    generator = torch.Generator().manual_seed(len(count))
    features = torch.randn(len(count), pairs, 3 * D, generator=generator)
    tokens = torch.randint(VOCAB, (len(count), pairs), generator=generator)
    for row, c in enumerate(count):
        features[row, c:], tokens[row, c:] = features[row, c - 1], tokens[row, c - 1]
    where = [7 * row - 1 for row in range(len(count))] if first is None else first
    return Reading(features, tokens, torch.tensor(where), torch.tensor(count))


def pair_of(rows: int, **config: Any) -> tuple[TorchDrafter, KernelDrafter]:
    """The same drafter on its eager path and on kernels, with the same pairs kept."""
    torch.manual_seed(1)
    values = {"hidden_size": D, "width": 24, "exit_dim": 28, "cell": "gru", "context_state": True}
    drafter = Drafter(drafter_config(**{**values, **config})).requires_grad_(False)
    embedding = torch.randn(VOCAB, D)

    def embed(ids: Tensor) -> Tensor:
        return F.embedding(ids, embedding)

    table = token_table(drafter, embed) if drafter.config.cell == "gru" else None
    eager = TorchDrafter(drafter, embed, lambda x: x, table=table)
    fast = KernelDrafter(drafter, embed, lambda x: x, table=table, embedding=embedding)
    for made in (eager, fast):
        made.allocate(rows, 60)
        torch.manual_seed(2)
        for cache in (*made._keys, *made._values):
            cache.normal_()
    return eager, fast


def assert_same_start(eager: TorchDrafter, fast: KernelDrafter, reading: Reading) -> None:
    expected, state = eager.begin(reading), fast.begin(reading)
    proj = eager.drafter.input_proj
    part = F.linear(expected.context, proj.weight[:, : expected.context.shape[-1]], proj.bias)
    both = torch.stack([part, *(block.linear(part) for block in eager.drafter.blocks[:1])], -1).flatten(-2)
    torch.testing.assert_close(state.context, both, rtol=1e-4, atol=1e-5)
    assert_same_logits(eager, fast, expected, state)
    torch.testing.assert_close(state.state, expected.state, rtol=1e-4, atol=1e-5)
    for kept, new in zip((*eager._keys, *eager._values), (*fast._keys, *fast._values), strict=True):
        torch.testing.assert_close(new, kept, rtol=1e-4, atol=1e-5)


def assert_same_logits(eager: TorchDrafter, fast: KernelDrafter, expected: DraftState, state: DraftState) -> None:
    """Of the root's beam, of two beams that go on from it, and of three that go on from those crosswise."""
    rows = len(expected.state)
    torch.testing.assert_close(fast.logits(state), eager.logits(expected), rtol=1e-4, atol=1e-4)
    for parents in ([0, 0], [1, 0, 1]):
        beam = torch.tensor([parents] * rows)
        token = torch.arange(beam.numel()).view(beam.shape) % VOCAB
        expected, state = eager.extend(expected, beam, token), fast.extend(state, beam, token)
        torch.testing.assert_close(fast.logits(state), eager.logits(expected), rtol=1e-4, atol=1e-4)


def test_every_part_is_scaled_alone() -> None:
    reading = reading_of([3, 5], 5)
    embedding = torch.randn(VOCAB, D, generator=torch.Generator().manual_seed(0)) * 9
    parts = [rms(x) for x in reading.features.split(D, -1)] + [rms(F.embedding(reading.tokens, embedding))]
    got = scaled_parts(reading.features, reading.tokens, embedding)
    torch.testing.assert_close(got, torch.cat(parts, -1).view(10, -1), rtol=1e-6, atol=1e-6)
    strided = scaled_parts(reading.features[:, ::2], reading.tokens[:, ::2], embedding)
    assert torch.equal(strided, got.view(2, 5, -1)[:, ::2].reshape(6, -1))


@pytest.mark.parametrize("count", [[4], [1, 9, 5]], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"trunk_heads": 3, "trunk_kv_heads": 1, "trunk_expansion": 1.3, "trunk_window": 6},
        {"context_state": False, "state_size": 18},
        {"cell": "rnn"},
        {"num_blocks": 0},
        {"num_blocks": 2},
    ],
    ids=["shipped", "odd", "from zeros", "rnn", "no block", "two blocks"],
)
def test_a_step_begins_as_on_the_eager_path(count: list[int], config: dict[str, Any]) -> None:
    eager, fast = pair_of(3, **config)
    assert fast._last_context is not None
    assert_same_start(eager, fast, reading_of(count, 9))


@pytest.mark.parametrize(
    ("config", "beams", "made"),
    [({}, 8, True), ({}, MAX_ROWS // 2 + 1, False), ({"num_blocks": 0}, 8, False), ({"cell": "rnn"}, 8, False)],
)
def test_the_cells_product_is_made_before_the_search_has_picked(config: dict[str, Any], beams: int, made: bool) -> None:
    """In the block's launch, if there is one; not for more rows than kernels of few rows take."""
    eager, fast = pair_of(2, **config)
    reading = reading_of([4, 2], 5)
    nothing = torch.zeros(2, beams, dtype=torch.int64)
    wide = fast.extend(fast.begin(reading), nothing, nothing)
    expected = eager.logits(eager.extend(eager.begin(reading), nothing, nothing))
    torch.testing.assert_close(fast.logits(wide), expected, rtol=1e-4, atol=1e-4)
    assert (fast._ahead is not None and fast._ahead[0] is wide.state) == made


def test_more_pairs_than_a_kernel_of_few_rows_takes() -> None:
    eager, fast = pair_of(3)
    count = [50, 2, 44]
    assert 50 * len(count) > MAX_ROWS
    assert_same_start(eager, fast, reading_of(count, 50))


@pytest.mark.parametrize(
    ("config", "pairs"), [({"trunk_layers": 2}, 9), ({"trunk_heads": 0}, 9), ({}, MAX_PAIRS + 1)], ids=str
)
def test_what_is_not_covered_takes_the_eager_path(config: dict[str, Any], pairs: int) -> None:
    eager, fast = pair_of(2, **config)
    reading = reading_of([4, pairs], pairs)
    assert fast._last_context is None or not LastContext.covers(reading)
    assert_same_start(eager, fast, reading)


def test_in_16_bits_the_first_product_is_the_modules() -> None:
    drafter = pair_of(1)[1].drafter.half()  # the interpreter cannot multiply bfloat16
    context = LastContext(drafter, torch.zeros(VOCAB, D, dtype=torch.float16))
    x = torch.randn(18, drafter.fuse.in_features, generator=torch.Generator().manual_seed(1)).half()
    for rows in (1, 2, 18):
        torch.testing.assert_close(context._fused(x[:rows]), drafter.fuse(x[:rows]), rtol=1e-2, atol=1e-2)


def test_no_weight_is_held_twice() -> None:
    _, fast = pair_of(1)
    layer: Any = fast.drafter.trunk.layers[0]
    storage = [w.untyped_storage().data_ptr() for w in (layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight)]
    assert len(set(storage)) == 1
    assert layer.gate_proj.weight.untyped_storage().data_ptr() == layer.up_proj.weight.untyped_storage().data_ptr()


def test_idle_rows_write_behind_all_texts() -> None:
    _, fast = pair_of(2)
    before = fast._keys[0].clone()
    fast.begin(reading_of([2, 3], 3, first=[5, -2]))
    changed = (fast._keys[0] != before).any(-1).any(1)
    slots = before.shape[2]
    assert changed[0].nonzero()[:, 0].tolist() == [5, 6, 7]
    assert changed[1].nonzero()[:, 0].tolist() == [slots - 3, slots - 2, slots - 1]
