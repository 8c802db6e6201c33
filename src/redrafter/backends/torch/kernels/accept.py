"""The target's choice at every node and the longest path it agrees with. The eager twins are in ``algorithm/accept``.

``choose_tiles`` reads the logits once: every tile of the vocabulary leaves its largest key. ``accept``, one program per
row, takes the largest of those and walks the tree. B rows, N nodes, V vocabulary, T tiles, D = L + 1 depths.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from redrafter.algorithm.accept import LARGEST, Accepted, Choice
from redrafter.algorithm.tree import TokenTree
from redrafter.backends.torch.kernels.early import early, start_early
from redrafter.backends.torch.kernels.topk import NO_KEY, key_index, key_value, order_key, tile_size

_LARGEST = tl.constexpr(LARGEST)


class Sampled(NamedTuple):
    """What rows that sample add to their logits."""

    noise: Tensor  # [B, D, V] float32
    inverse_temperature: Tensor  # [B] float32, 0 for greedy rows


@triton.jit
def _choose_tiles(
    logits,
    noise,
    inverse_temperature,
    depth,
    keys,
    vocabulary,
    row_stride,
    noise_stride,
    depth_stride,
    nodes,
    BLOCK: tl.constexpr,
    SAMPLED: tl.constexpr,
    EARLY: tl.constexpr,
):
    start_early(EARLY)
    row = tl.program_id(0).to(tl.int64)  # over B x N
    tile = tl.program_id(1)
    column = tile * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    z = tl.load(logits + row * row_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    if SAMPLED:
        batch_row = row // nodes
        # Splat before comparing: the interpreter cannot splat a bool.
        inverse = tl.load(inverse_temperature + batch_row) + tl.zeros([BLOCK], tl.float32)
        start = batch_row * noise_stride + tl.load(depth + row) * depth_stride
        gumbel = tl.load(noise + start + column, mask=inside & (inverse > 0), other=0.0)
        z = tl.where(inverse > 0, z * inverse + gumbel, z)
    key = tl.where(inside, order_key(z, column), NO_KEY)
    tl.store(keys + row * tl.num_programs(1) + tile, tl.max(key, axis=0))


def choose_tiles(logits_BNV: Tensor, depth_BN: Tensor, sampled: Sampled | None = None) -> Tensor:
    """[B, N, T] keys (``topk.order_key``): the largest score of every tile. The largest of a node's keys is its choice
    (``algorithm.accept.choose`` where temperature is the only setting); float32, bfloat16 or float16 logits."""
    rows, nodes, vocabulary = logits_BNV.shape
    logits_RV = logits_BNV.reshape(rows * nodes, vocabulary)
    assert logits_RV.stride(1) == 1 and depth_BN.is_contiguous()
    block = tile_size(vocabulary)
    tiles = triton.cdiv(vocabulary, block)
    keys = torch.empty(rows, nodes, tiles, dtype=torch.int64, device=logits_BNV.device)
    noise, inverse = (keys, keys) if sampled is None else sampled
    assert noise.stride(-1) == 1
    _choose_tiles[(rows * nodes, tiles)](
        logits_RV,
        noise,
        inverse,
        depth_BN,
        keys,
        vocabulary,
        logits_RV.stride(0),
        noise.stride(0),
        noise.stride(1),
        nodes,
        BLOCK=block,
        SAMPLED=sampled is not None,
        num_warps=block // 512,
        **early(keys),
        enable_fp_fusion=False,  # z * inverse + gumbel rounds twice, as in the algorithm
    )
    return keys


@triton.jit
def _accept(
    tokens,
    parent,
    depth,
    mask,
    live,
    choice,
    choice_finite,
    keys,
    tiles,
    path,
    length,
    bonus,
    emitted,
    finite,
    NODES: tl.constexpr,
    DEPTHS: tl.constexpr,
    NODES_P: tl.constexpr,
    DEPTHS_P: tl.constexpr,
    TILES_P: tl.constexpr,
    FROM_KEYS: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = row * NODES
    node = tl.arange(0, NODES_P)
    is_node = node < NODES
    # The tree is older than the launch before.
    node_depth = tl.load(depth + start + node, mask=is_node, other=-1)
    above = tl.load(parent + start + node, mask=is_node, other=0)
    token = tl.load(tokens + start + node, mask=is_node, other=-2)
    alive = tl.load(live + start + node, mask=is_node, other=0)
    inside = is_node[:, None] & is_node[None, :]
    seen = tl.load(mask + (start + node[None, :]) * NODES + node[:, None], mask=inside, other=0)
    start_early(EARLY)
    if FROM_KEYS:
        tile = tl.arange(0, TILES_P)[None, :]
        here = is_node[:, None] & (tile < tiles)
        best = tl.max(tl.load(keys + (start + node[:, None]) * tiles + tile, mask=here, other=NO_KEY), axis=1)
        value = key_value(best)
        is_finite = (value > -_LARGEST) & (value < _LARGEST)
        tl.store(choice + start + node, key_index(best), mask=is_node)
        tl.store(choice_finite + start + node, is_finite.to(tl.int8), mask=is_node)
        tl.debug_barrier()  # a node reads its parent's choice, which another thread wrote
    wanted = tl.load(choice + start + above, mask=is_node, other=-1)
    match = ((token == wanted) & (alive != 0)) | (node_depth == 0)

    # [ancestor, node]: a node is on the path iff no ancestor, itself included, is other than the target's choice.
    broken = tl.sum(((seen != 0) & (match == 0)[:, None]).to(tl.int32), axis=0)
    on_path = (broken == 0) & is_node
    count = tl.sum(on_path.to(tl.int32), axis=0) - 1

    step = tl.arange(0, DEPTHS_P)
    is_step = step < DEPTHS
    step_depth = tl.minimum(step, count)
    hit = on_path[:, None] & (node_depth[:, None] == step_depth[None, :])
    first = tl.min(tl.where(hit, node[:, None], NODES_P), axis=0)
    first = tl.where(first < NODES_P, first, 0).to(tl.int64)
    chosen = tl.load(choice + start + first, mask=is_step, other=0)
    good = tl.load(choice_finite + start + first, mask=is_step, other=1)
    tl.store(path + row * DEPTHS + step, first, mask=is_step)
    tl.store(emitted + row * DEPTHS + step, chosen, mask=is_step)
    tl.store(bonus + row, tl.sum(tl.where(step == DEPTHS - 1, chosen, 0), axis=0))
    tl.store(length + row, count.to(tl.int64))
    tl.store(finite + row, (tl.sum((good == 0).to(tl.int32), axis=0) == 0).to(tl.int8))


def accept(tree: TokenTree, choice: Choice | Tensor, depths: int) -> Accepted:
    """``algorithm.accept.accept`` of a choice or of the keys of ``choose_tiles``; up to 128 nodes."""
    rows, nodes = tree.tokens.shape
    keys, tiles = None, 1
    if isinstance(choice, Tensor):
        keys, tiles = choice, choice.shape[2]
        choice = Choice(torch.empty_like(tree.tokens), torch.empty_like(tree.live))
    assert all(x.is_contiguous() for x in (*tree[:5], *choice))
    device = tree.tokens.device
    path, emitted = (torch.empty(rows, depths, dtype=torch.int64, device=device) for _ in range(2))
    length, bonus = (torch.empty(rows, dtype=torch.int64, device=device) for _ in range(2))
    finite = torch.empty(rows, dtype=torch.bool, device=device)
    _accept[(rows,)](
        tree.tokens,
        tree.parent,
        tree.depth,
        tree.mask.view(torch.int8),
        tree.live.view(torch.int8),
        choice.token,
        choice.finite.view(torch.int8),
        choice.token if keys is None else keys,
        tiles,
        path,
        length,
        bonus,
        emitted,
        finite.view(torch.int8),
        NODES=nodes,
        DEPTHS=depths,
        NODES_P=triton.next_power_of_2(nodes),
        DEPTHS_P=triton.next_power_of_2(depths),
        TILES_P=triton.next_power_of_2(tiles),
        FROM_KEYS=keys is not None,
        num_warps=4 if nodes * tiles <= 1024 else 8,
        **early(path),
    )
    return Accepted(path, length, bonus, emitted, finite)
