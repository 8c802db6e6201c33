"""The cache after accepted paths were committed: positions are found wherever they lie, and nothing was copied."""
# ruff: noqa: E402 - nothing below may be imported where MLX is absent

from __future__ import annotations

import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed: pip install 'redrafter[mlx]'")

from redrafter.backends.mlx.kv_cache import SLOT_STEP, KVCache

TEXTS = ([3, 1, 4, 1, 5], [9, 2, 6])
PATHS = ([0, 2, 3, 6], [0, 5, 5, 5])
KEPT = (4, 2)
NODES = 7


def key_of(token: int) -> mx.array:
    """[1, 2] per head of 2: keys, then values."""
    return mx.array([[[token, token]], [[-token, -token]]], dtype=mx.float32).reshape(2, 2)


def write(cache: KVCache, row: int, slot_BN: mx.array, tokens: list[list[int]]) -> None:
    cache.place(row, slot_BN, cache.slots)
    for layer in range(2):
        cache.write(layer, mx.stack([mx.stack([key_of(t + 100 * layer) for t in line]) for line in tokens]))


def told(cache: KVCache, row: int, tokens: int, layer: int = 1) -> list[int]:
    """What the row says, by position."""
    stored = cache.layers[layer][row][cache.slot_of[row, :tokens]]
    assert mx.array_equal(stored[:, 0], -stored[:, 1]).item()
    return [int(x) - 100 * layer for x in stored[:, 0, 0].tolist()]


@pytest.fixture
def committed() -> tuple[KVCache, list[list[int]]]:
    """Two rows, each with its text and the accepted part of a tree of seven nodes."""
    cache = KVCache(2, 1, 2, mx.float32)
    cache.reserve(3, 40)
    for row, text in enumerate(TEXTS):
        write(cache, row, mx.arange(len(text), dtype=mx.int32)[None], [text])
    lengths = mx.array([len(text) for text in TEXTS], dtype=mx.int32)
    nodes = [[20 + n for n in range(NODES)], [40 + n for n in range(NODES)]]
    cache.expect(2, NODES)
    write(cache, 0, cache.find(0, lengths[:, None] + mx.arange(NODES)), nodes)
    cache.keep_path(lengths, mx.array(PATHS, dtype=mx.int32))
    said = [text + [line[n] for n in path[:k]] for text, line, path, k in zip(TEXTS, nodes, PATHS, KEPT, strict=True)]
    return cache, said


def test_a_kept_path_lies_behind_its_text(committed: tuple[KVCache, list[list[int]]]) -> None:
    cache, said = committed
    for row in (0, 1):
        assert told(cache, row, len(said[row])) == said[row]
        slots, positions = cache.slot_of[row].tolist(), cache.position_of[row].tolist()
        assert sorted(slots) == list(range(40)) and all(positions[slot] == p for p, slot in enumerate(slots))
        assert slots != list(range(40))
    again = mx.array([len(line) for line in said], dtype=mx.int32)
    write(cache, 0, cache.find(0, again[:, None] + mx.arange(NODES)), [[60 + n for n in range(NODES)]] * 2)
    cache.keep_path(again, mx.array([[0, 1, 1, 1], [0, 4, 6, 6]], dtype=mx.int32))
    assert told(cache, 0, len(said[0]) + 2) == [*said[0], 60, 61]
    assert told(cache, 1, len(said[1]) + 3) == [*said[1], 60, 64, 66]


@pytest.mark.parametrize("tokens", [0, 4, 7])
def test_a_row_that_is_read_into_again_is_settled(committed: tuple[KVCache, list[list[int]]], tokens: int) -> None:
    cache, said = committed
    cache.settle(0, tokens)
    assert cache.slot_of[0].tolist() == cache.position_of[0].tolist() == list(range(40))
    assert told(cache, 0, tokens) == said[0][:tokens]
    assert told(cache, 1, len(said[1])) == said[1]


def test_rows_are_copied_and_exchanged_by_position(committed: tuple[KVCache, list[list[int]]]) -> None:
    cache, said = committed
    cache.copy_prefix(0, 2, 8)
    assert told(cache, 2, 8) == said[0][:8]
    cache.swap_rows(0, 1, 9)
    assert told(cache, 0, 5) == said[1] and told(cache, 1, 9) == said[0]
    cache.reserve(4, 60)
    assert told(cache, 1, 9) == said[0] and cache.slot_of[3].tolist() == list(range(60))


def test_attention_looks_as_far_as_a_path_may_lie(committed: tuple[KVCache, list[list[int]]]) -> None:
    cache, _ = committed
    cache.reserve(3, 4 * SLOT_STEP)
    assert cache.limit_of(SLOT_STEP - 2, 1) == 2 * SLOT_STEP, "a position's slot lies up to a tree behind it"
    cache.settle(0, 0)
    cache.settle(1, 0)
    assert cache.limit_of(SLOT_STEP - 2, 1) == SLOT_STEP


def test_a_commit_copies_no_keys() -> None:
    cache = KVCache(2, 1, 64, mx.float32)
    cache.reserve(2, 4096)
    cache.place(0, mx.zeros((2, NODES), dtype=mx.int32), 64)
    seen = [layer[:, :64] * 1 for layer in cache.layers]  # a kernel that reads holds what it reads
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    cache.keep_path(mx.array([9, 5], dtype=mx.int32), mx.array(PATHS, dtype=mx.int32))
    mx.eval(cache.arrays, seen)
    assert mx.get_peak_memory() - before < cache.layers[0].nbytes / 2


def test_a_write_to_all_rows_is_one_to_some_of_them() -> None:
    """They take different operations."""
    slots, tokens = mx.array([[5, 0, 9], [1, 2, 38]], dtype=mx.int32), [[7, 8, 9], [3, 2, 1]]
    stored = []
    for rows in (2, 3):
        cache = KVCache(2, 1, 2, mx.float32)
        cache.reserve(rows, 40)
        write(cache, 0, slots, tokens)
        stored.append(mx.stack(cache.layers)[:, :2])
    assert mx.array_equal(*stored).item() and stored[0][1, 1, 38, 0, 0].item() == 101
