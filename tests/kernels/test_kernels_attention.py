"""Tree attention against the softmax written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.twins import random

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")
from redrafter.backends.torch.kernels.attention import AttentionPlan, ancestor_words, plan_attention, tree_attention


def random_masks(rows: int, nodes: int, seed: int = 0) -> Tensor:
    """[B, N, N] of random trees, parents before children."""
    generator = torch.Generator().manual_seed(seed)
    parent = (torch.rand(rows, nodes, generator=generator) * torch.arange(nodes)).long()
    mask = torch.eye(nodes, dtype=torch.bool).repeat(rows, 1, 1)
    for b in range(rows):
        for i in range(1, nodes):
            mask[b, i] |= mask[b, parent[b, i]]
    return mask


def visible_slots(mask_BNN: Tensor, lengths_B: Tensor, slots: int) -> Tensor:
    rows, nodes, _ = mask_BNN.shape
    visible = torch.zeros(rows, nodes, slots, dtype=torch.bool)
    for b, length in enumerate(lengths_B.tolist()):
        visible[b, :, :length] = True
        visible[b, :, length : length + nodes] = mask_BNN[b]
    return visible


def eager(q: Tensor, k: Tensor, v: Tensor, visible_BNS: Tensor, scale: float, softcap: float | None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1).nan_to_num() for x in (k, v))
    scores = q.double() @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible_BNS[:, None], float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


CASES = [  # rows, heads, KV heads, nodes, slots, head width, softcap
    (1, 4, 2, 1, 70, 64, None),
    (2, 4, 2, 5, 200, 24, None),
    (1, 3, 1, 100, 300, 64, None),
    (2, 2, 1, 9, 90, 96, 30.0),
    (1, 2, 2, 3, 40, 256, None),
    (2, 4, 4, 2, 40, 16, None),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_attention(case: tuple, dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    rows, heads, kv_heads, nodes, slots, width, softcap = case
    # As the layers hand them over: views of [B, N, heads, d] and of a cache with more rows and slots.
    q = random(rows, nodes, heads, width, seed=1).transpose(1, 2)
    k, v = (random(rows + 1, kv_heads, slots + 3, width, seed=s)[:rows, :, :slots] for s in (2, 3))
    lengths = torch.randint(0, slots - nodes + 1, (rows,), generator=torch.Generator().manual_seed(4))
    lengths[0] = slots - nodes
    mask = random_masks(rows, nodes)
    visible = visible_slots(mask, lengths, slots)
    unused = ~visible.any(1)[:, None].expand(rows, kv_heads, slots)
    k[unused], v[unused] = float("nan"), float("nan")  # what nobody wrote must not be read
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    got = tree_attention(q, k, v, lengths.to(device), ancestor_words(mask.to(device)), width**-0.5, softcap)
    assert got.is_contiguous() and got.dtype == dtype
    expected = eager(q.cpu(), k.cpu(), v.cpu(), visible, width**-0.5, softcap)
    torch.testing.assert_close(got.cpu().double(), expected, rtol=0, atol=tolerance)


SHARING = AttentionPlan(64, 64, 4, 1, 4, 3, 16)


@pytest.mark.parametrize(
    ("plan", "slots", "nodes"),
    [
        (SHARING, 300, 40),  # a short text: the four programs of a tile share its rows
        (SHARING, 1200, 64),  # a long one: they share its slots
        (SHARING, 1023, 17),  # rows of the same launch may be either
        (AttentionPlan(64, 64, 2, 2, 4, 3, 32), 300, 100),
    ],
    ids=str,
)
def test_programs_share_rows_over_short_texts_and_slots_over_long_ones(
    plan: AttentionPlan, slots: int, nodes: int, device: torch.device
) -> None:
    q = random(2, 2, nodes, 128, seed=1)
    k, v = (random(2, 1, slots, 128, seed=s) for s in (2, 3))
    lengths, mask = torch.tensor([slots - nodes, 57]), random_masks(2, nodes)
    visible = visible_slots(mask, lengths, slots)
    unused = ~visible.any(1)[:, None].expand(2, 1, slots)
    k[unused], v[unused] = float("nan"), float("nan")
    q, k, v = (x.to(device, torch.float16) for x in (q, k, v))
    plan = plan._replace(tiles=-(-2 * nodes // plan.tile_rows))  # two heads per KV head
    got = tree_attention(q, k, v, lengths.to(device), ancestor_words(mask.to(device)), 0.1, plan=plan)
    expected = eager(q.cpu(), k.cpu(), v.cpu(), visible, 0.1, None)
    torch.testing.assert_close(got.cpu().double(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "nodes", "width", "plan"),
    [
        (32, 32, 1, 128, AttentionPlan(16, 64, 4, 1, 4, 2)),
        (32, 32, 16, 128, AttentionPlan(16, 64, 4, 1, 4, 3)),
        (32, 32, 32, 128, AttentionPlan(16, 64, 2, 2, 4, 3)),
        (32, 32, 64, 128, SHARING),
        (32, 8, 64, 128, SHARING._replace(tiles=4)),
        (9, 3, 48, 64, AttentionPlan(16, 128, 4, 9, 4, 2)),
    ],
)
def test_there_is_about_one_program_per_multiprocessor(
    heads: int, kv_heads: int, nodes: int, width: int, plan: AttentionPlan
) -> None:
    """As measured on one H200: one text of the shapes of Llama-2-7B, Llama-3-8B and SmolLM2-135M."""
    q, k = torch.empty(1, heads, nodes, width), torch.empty(1, kv_heads, 2048, width, dtype=torch.bfloat16)
    assert plan_attention(q, k) == plan
    assert 96 <= kv_heads * plan.parts * plan.tiles <= 192
    exact = [plan_attention(q[:, :, :n], k.float()) for n in (1, nodes)]
    assert exact[0]._replace(tiles=1) == exact[1]._replace(tiles=1), "float32 adds in the same order"


def numpy_multiplies_rows_alike() -> bool:
    """Whether a row of numpy's product, which the interpreter takes, is the same wherever it stands. On an AMD EPYC
    without AVX-512 it is not."""
    a, b = random(16, 64, seed=1).numpy(), random(64, 64, seed=2).numpy()
    return bool(((a @ b)[::-1] == a[::-1].copy() @ b).all())


def test_a_chain_of_nodes_is_plain_decoding_bit_for_bit_in_float32(device: torch.device) -> None:
    """Blocks of slots do not move with the number of nodes or the length, so sums run in the same order."""
    if device.type == "cpu" and not numpy_multiplies_rows_alike():
        pytest.skip("this CPU's numpy, which interprets, adds up a row by its place in the matrix")
    q = random(1, 4, 40, 64, seed=1).to(device)
    k, v = (random(1, 2, 300, 64, seed=s).to(device) for s in (2, 3))
    length = torch.tensor([190], device=device)
    chain = ancestor_words(torch.ones(1, 40, 40, dtype=torch.bool, device=device).tril())
    together = tree_attention(q, k, v, length, chain, 0.125)
    assert plan_attention(q, k).parts > 1
    for i in (0, 1, 17, 39):
        alone = tree_attention(q[:, :, i : i + 1], k, v, length + i, chain[:, :1], 0.125)
        assert torch.equal(alone[0, 0], together[0, i])


def test_counters_are_left_at_zero_and_do_not_matter(device: torch.device) -> None:
    q, k = random(1, 2, 3, 64, seed=1).to(device), random(1, 2, 400, 64, seed=2).to(device)
    words = ancestor_words(torch.ones(1, 3, 3, dtype=torch.bool, device=device).tril())
    arrived = torch.zeros(8, dtype=torch.int32, device=device)
    first = tree_attention(q, k, k, torch.tensor([397], device=device), words, 0.1, arrived=arrived)
    assert arrived.sum() == 0
    for _ in range(3):
        again = tree_attention(q, k, k, torch.tensor([397], device=device), words, 0.1, arrived=arrived)
        assert torch.equal(again, first) and arrived.sum() == 0


def test_ancestor_words() -> None:
    mask = random_masks(2, 100)
    words = ancestor_words(mask)
    assert words.shape == (2, 100, 2)
    for i, j in ((0, 0), (63, 63), (64, 64), (99, 0), (99, 63), (70, 65), (99, 99)):
        assert ((words[1, i, j // 64] >> (j % 64)) & 1).item() == mask[1, i, j].item()
    assert torch.equal(ancestor_words(torch.ones(3, 1, 1, dtype=torch.bool)), torch.tensor([[[1, 0]]] * 3))
