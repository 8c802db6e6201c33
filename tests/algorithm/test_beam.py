"""Beam search against enumeration of the whole tree of a small table drafter."""

from __future__ import annotations

import itertools

import pytest
import tables
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import OPS, Shape, Tables, TableTarget

from redrafter.algorithm.beam import DraftBeams, beam_tokens, draft, no_beams
from redrafter.algorithm.noise import gumbel, key_of
from redrafter.algorithm.sampling import Sampling

V = 6
TABLES = Tables(V, seed=5)
PROMPTS = [[1, 2, 3], [4, 0, 5, 5, 2]]


def setting(kind: str = "perfect", token_ids: torch.Tensor | None = None, prompts=PROMPTS):
    committed, state = tables.start(prompts, Sampling())
    return tables.TableDrafter(TableTarget(TABLES, committed), kind, token_ids), state


def run(shape: Shape, noise=None, kind: str = "perfect", token_ids=None) -> DraftBeams:
    drafter, state = setting(kind, token_ids)
    return draft(OPS, drafter, state.reading, state.root, shape, noise)


def noise_for(length: int, inverse_temperature: list[float]):
    key = torch.tensor([key_of(9), key_of(10)])
    position = torch.tensor([[len(p) + d for d in range(length)] for p in PROMPTS])
    return gumbel(OPS, key, position, torch.arange(V)), torch.tensor(inverse_temperature)


def log_weights(row: int, path: tuple[int, ...], noise=None, ids=range(V)) -> dict[int, float]:
    """log weight of every child of a path, from the tables directly."""
    text = [*PROMPTS[row], *path]
    z = TABLES.logits[TABLES.state_of(text)]
    if noise is not None and noise[1][row] > 0:
        z = z * noise[1][row] + noise[0][row, len(path)]
    z = z[list(ids)].log_softmax(-1)
    return {token: float(z[i]) for i, token in enumerate(ids)}


def enumerate_pool(row: int, shape: Shape, noise=None, ids=range(V)) -> tuple[dict, list]:
    """Scores of every scored path, and the final beams, by scoring the whole tree and cutting it afterwards."""
    whole = {(): 0.0}
    for depth in range(1, shape.draft_length + 1):
        for path in itertools.product(ids, repeat=depth):
            whole[path] = whole[path[:-1]] + log_weights(row, path[:-1], noise, ids)[path[-1]]
    beams: list[tuple[int, ...]] = [()]
    pool: dict[tuple[int, ...], float] = {}
    for depth in range(1, shape.draft_length + 1):
        scored: list[tuple[int, ...]] = []
        for beam in beams:
            children = sorted((whole[(*beam, t)], (*beam, t)) for t in ids)[::-1]
            scored += [
                c for _, c in children[: max(shape.branching, shape.beam_width) if depth == 1 else shape.branching]
            ]
        pool |= {path: whole[path] for path in scored}
        beams = sorted(scored, key=lambda p: -whole[p])[: shape.beam_width]
    return pool, beams


def written_out(beams: DraftBeams, row: int) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for slot, (token, parent) in enumerate(zip(beams.tokens[row].tolist(), beams.parent[row].tolist(), strict=True)):
        assert parent < slot
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


SHAPES = [(w, k, n) for w in (1, 2, 3, 5, 9) for k in (1, 2, 6, 9) for n in (1, 2, 3)]


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize(("width", "branching", "length"), SHAPES)
def test_the_pool_and_the_beams_are_those_of_the_whole_tree(width, branching, length, coupled):
    shape = Shape(width, length, 1, branching)
    noise = noise_for(length, [1.25, 0.0]) if coupled else None  # the second row is greedy and ignores the noise
    beams = run(shape, noise)
    tokens, scores = beam_tokens(OPS, beams)
    for row in range(len(PROMPTS)):
        pool, final = enumerate_pool(row, shape, noise)
        paths = written_out(beams, row)
        assert sorted(paths) == sorted(pool)
        for path, score, depth in zip(paths, beams.score[row].tolist(), beams.depth[row].tolist(), strict=True):
            assert score == pytest.approx(pool[path], abs=1e-5)
            assert depth == len(path)
        assert [tuple(t) for t in tokens[row].tolist()] == final
        for path, row_scores in zip(final, scores[row].tolist(), strict=True):
            assert row_scores == pytest.approx([pool[path[: d + 1]] for d in range(length)], abs=1e-5)


def test_a_reduced_draft_vocabulary_maps_to_target_ids():
    ids = [4, 1, 5]
    shape = Shape(2, 3, 1, branching=3)
    for noise in (None, noise_for(3, [1.0, 2.0])):
        beams = run(shape, noise, token_ids=torch.tensor(ids))
        for row in range(len(PROMPTS)):
            pool, _ = enumerate_pool(row, shape, noise, ids)
            assert sorted(written_out(beams, row)) == sorted(pool)


@settings(max_examples=60, deadline=None)
@given(
    *(st.integers(1, 64), st.integers(1, 64), st.integers(1, 8)),
    *(st.sampled_from(["perfect", "random", "worst", "broken"]), st.integers(0, 9)),
)
def test_invariants_of_the_pool(width, branching, length, kind, lookup):
    beams = run(Shape(width, length, 1, branching, prompt_lookup=lookup), kind=kind)
    for row in range(len(PROMPTS)):
        paths = written_out(beams, row)  # asserts that parents stand first
        assert len(set(paths)) == len(paths), "siblings are distinct, so no path occurs twice"
        for parent, score in zip(beams.parent[row].tolist(), beams.score[row].tolist(), strict=True):
            assert score <= (float(beams.score[row, parent]) if parent >= 0 else 0.0)
        assert all(len(paths[slot]) == length for slot in beams.final[row].tolist())
    assert beams.final.shape[1] == min(width, V if length == 1 else beams.final.shape[1])


def test_no_beams_is_an_empty_pool():
    beams = no_beams(OPS, torch.tensor([3, 4]))
    assert beams.tokens.shape == (2, 0)
    assert beams.score.dtype == torch.float32
    assert beams.draft_length == 0
