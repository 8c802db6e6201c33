"""The output is a function of the target, the prompt, the settings and the seed, never of what was drafted."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import DEFAULTS, Shape, Tables, generate, sampling_of

from redrafter.algorithm.noise import key_of
from redrafter.algorithm.sampling import Sampling

V, COUNT = 8, 20
TABLES = Tables(V, seed=1)
PLAIN = Shape(beam_width=1, draft_length=1, tree_size=1)
# One row per setting, alone and together: a batch of them checks that rows do not leak into one another.
SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition": 1.7, "presence": 0.4},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.3},
    {"repetition": 1.6},
    {"presence": 1.5},
    {"frequency": 0.8},
    {"bias": [0.0, 3.0, -float("inf"), 0.0, -1.0, 0.0, 2.0, 0.0]},
    {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.05, "repetition": 1.2, "presence": 0.3, "frequency": 0.2},
]


def batch(seed: int) -> tuple[list[list[int]], list[dict]]:
    """Ragged prompts and every setting, each row with a seed of its own."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(V) for _ in range(rng.randint(2, 9))] for _ in SETTINGS]
    return prompts, [{**s, "seed": rng.getrandbits(64)} for s in SETTINGS]


PROMPTS, ROWS = batch(3)
SAMPLING = sampling_of(ROWS, PROMPTS, V)


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    return generate(TABLES, PROMPTS, SAMPLING, PLAIN, COUNT)


def test_plain_decoding_is_the_sequential_loop(plain):
    for row, (prompt, given_settings) in enumerate(zip(PROMPTS, ROWS, strict=True)):
        s = {**DEFAULTS, **given_settings}
        text, key = list(prompt), key_of(s["seed"])
        for _ in range(COUNT):
            z = slow.warp(TABLES.logits[TABLES.state_of(text)].numpy(), prompt[:-1], text[len(prompt) - 1 :], s)
            if s["temperature"] > 0:
                z = z + np.array([slow.gumbel(key, len(text), v) for v in range(V)])
            text.append(int(z.argmax()))
        assert plain[row].tolist() == text[len(prompt) :], f"row {row}: {given_settings}"


SHAPES = [(1, 1), (1, 4), (2, 3), (3, 1), (4, 5), (16, 2), (8, 8), (64, 8)]
SIZES = [1, 2, 3, 5, 17, 64, 128]


@pytest.mark.parametrize("drafter", ["perfect", "random", "worst", "broken"])
@pytest.mark.parametrize(("width", "length"), SHAPES)
def test_any_drafter_and_shape_gives_the_plain_tokens(plain, drafter, width, length):
    for index, size in enumerate(SIZES):
        shape = Shape(width, length, size, branching=(1, 3, V, 100)[index % 4], seed_coupled=index % 2 == width % 2)
        shape.prompt_lookup = (0, 3, 6)[index % 3]
        ids = generate(TABLES, PROMPTS, SAMPLING, shape, COUNT, drafter=drafter)
        assert torch.equal(ids, plain), f"{shape}"


@settings(max_examples=25, deadline=None)
@given(
    *(st.integers(1, 9), st.integers(1, 6), st.integers(1, 40), st.integers(1, 9)),
    *(st.booleans(), st.integers(0, 9), st.integers(0, 10**6)),
)
def test_any_tables_shape_and_seed(width, length, size, branching, coupled, lookup, seed):
    tables = Tables(V, seed)
    prompts, rows = batch(seed)
    sampling = sampling_of(rows, prompts, V)
    shape = Shape(width, length, size, branching, coupled, lookup)
    ids = generate(tables, prompts, sampling, shape, 8, drafter=("perfect", "random", "worst")[seed % 3])
    assert torch.equal(ids, generate(tables, prompts, sampling, PLAIN, 8))


def test_a_reduced_draft_vocabulary_gives_the_plain_tokens(plain):
    ids = torch.tensor([5, 0, 6])
    shape = Shape(4, 3, 12, branching=100)
    assert torch.equal(generate(TABLES, PROMPTS, SAMPLING, shape, COUNT, drafter="perfect", token_ids=ids), plain)


def test_a_batch_gives_what_each_row_gives_alone(plain):
    for row in range(len(PROMPTS)):
        sampling = sampling_of(ROWS[row : row + 1], PROMPTS[row : row + 1], V)
        ids = generate(TABLES, PROMPTS[row : row + 1], sampling, Shape(4, 3, 9), COUNT, drafter="random")
        assert torch.equal(ids[0], plain[row])


def test_settings_that_no_row_uses_may_be_absent(plain):
    """The same row through fewer fields: None is off."""
    alone = Sampling(inverse_temperature=SAMPLING.inverse_temperature[2:3], key=SAMPLING.key[2:3])
    ids = generate(TABLES, PROMPTS[2:3], alone, Shape(4, 3, 9), COUNT, drafter="random")
    assert torch.equal(ids[0], plain[2])
    greedy = generate(TABLES, PROMPTS[:1], Sampling(), Shape(4, 3, 9), COUNT, drafter="random")
    assert torch.equal(greedy[0], plain[0])


def test_a_perfect_drafter_is_accepted_whole():
    """Greedy, and sampled with seed-coupled beams: so the equality above is not that of a tree never accepted."""
    for temperature, coupled in itertools.product((0.0, 1.0), (True,)):
        sampling = sampling_of([{"temperature": temperature, "seed": 5}], [[1, 2, 3]], V)
        steps: list[torch.Tensor] = []
        shape = Shape(4, 5, 21, branching=V, seed_coupled=coupled)
        generate(TABLES, [[1, 2, 3]], sampling, shape, 24, drafter="perfect", steps=steps)
        assert len(steps) <= 8, f"temperature {temperature}: {[int(s) for s in steps]}"


def test_the_worst_drafter_is_hardly_accepted():
    steps: list[torch.Tensor] = []
    sampling = sampling_of([{"temperature": 0.0}], [[1, 2, 3]], V)
    generate(TABLES, [[1, 2, 3]], sampling, Shape(2, 4, 9), 20, drafter="worst", steps=steps)
    assert len(steps) == 20


def test_the_seed_matters():
    prompts = [[1, 2, 3]] * 2
    sampling = sampling_of([{"seed": 1}, {"seed": 2}], prompts, V)
    ids = generate(TABLES, prompts, sampling, PLAIN, COUNT)
    assert not torch.equal(ids[0], ids[1])
