"""Over seeds, three tokens have exactly the target's law; rules that are nearly right are told apart.

A p-value under 1e-6 rejects. The right rule is tried 16 times, so chance alone fails the file once in 60,000 seed
choices, and the seeds are fixed; a wrong rule must be rejected.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import slow
import torch
from controls import faulty_step, longest_beam_step, rejection_step
from tables import DEFAULTS, Shape, Tables, generate, sampling_of

from redrafter.algorithm.noise import key_of

V, COUNT, ROWS = 6, 3, 20_000
PROMPT = [2, 0, 5]
TABLES = Tables(V, seed=11)
PLAIN = Shape(beam_width=1, draft_length=1, tree_size=1)
TREE = Shape(beam_width=3, draft_length=3, tree_size=9, branching=3)
REJECTED = 1e-6
WARPED = {"temperature": 0.8, "top_k": 5, "top_p": 0.95, "repetition": 1.3, "presence": 0.2}


def law(settings: dict) -> np.ndarray:
    """[V**3] probabilities of all three-token answers, by enumeration."""
    s = {**DEFAULTS, **settings}
    out = np.zeros(V**COUNT)
    for index, answer in enumerate(itertools.product(range(V), repeat=COUNT)):
        probability, text = 1.0, list(PROMPT)
        for token in answer:
            z = slow.warp(TABLES.logits[TABLES.state_of(text)].numpy(), PROMPT[:-1], text[len(PROMPT) - 1 :], s)
            probability *= slow.softmax(z)[token]
            text.append(token)
        out[index] = probability
    return out


def p_value(ids: torch.Tensor, probabilities: np.ndarray) -> float:
    """Pearson's chi-square; outcomes that are expected fewer than five times count as one."""
    code = (ids * torch.tensor([V ** (COUNT - 1 - i) for i in range(COUNT)])).sum(1)
    seen = torch.bincount(code, minlength=V**COUNT).double().numpy()
    expected = probabilities * len(ids)
    if seen[probabilities == 0].any():
        return 0.0
    rare = expected < 5
    seen = np.append(seen[~rare], seen[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 5:
        seen, expected = seen[:-1], expected[:-1]
    statistic = ((seen - expected) ** 2 / expected).sum()
    half = torch.tensor([(len(seen) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def many_seeds(settings: dict, shape: Shape, first_seed: int, **how) -> torch.Tensor:
    """[ROWS, 3] answers to one prompt under as many seeds."""
    prompts = [PROMPT] * ROWS
    sampling = sampling_of([settings], [PROMPT], V)
    one = {k: v.expand(ROWS, *v.shape[1:]) for k, v in sampling._asdict().items() if isinstance(v, torch.Tensor)}
    penalties = sampling.penalties._replace(
        **{k: v.expand(ROWS, *v.shape[1:]) for k, v in sampling.penalties._asdict().items()}
    )
    one["key"] = torch.tensor([key_of(first_seed + i) for i in range(ROWS)])
    # Without penalties the field is left out, as the engine does.
    used = settings.keys() & {"repetition", "presence", "frequency"}
    sampling = sampling._replace(**one, penalties=penalties if used else None)
    return generate(TABLES, prompts, sampling, shape, COUNT, **how)


@pytest.fixture(scope="module")
def plain_law() -> np.ndarray:
    return law({})


@pytest.fixture(scope="module")
def warped_law() -> np.ndarray:
    return law(WARPED)


def test_the_laws_are_laws(plain_law, warped_law):
    assert abs(plain_law.sum() - 1) < 1e-12
    assert abs(warped_law.sum() - 1) < 1e-12
    assert (warped_law == 0).sum() > 10  # the cuts exclude answers, which the test then must never see


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("drafter", ["perfect", "random", "worst"])
def test_three_tokens_have_the_law_of_the_target(plain_law, drafter, coupled):
    shape = Shape(3, 3, 9, branching=3, seed_coupled=coupled, prompt_lookup=4 * coupled)
    assert p_value(many_seeds({}, shape, 10**6, drafter=drafter), plain_law) > REJECTED


@pytest.mark.parametrize("coupled", [True, False])
def test_the_law_with_sampling_settings(warped_law, coupled):
    shape = Shape(3, 3, 9, branching=3, seed_coupled=coupled)
    assert p_value(many_seeds(WARPED, shape, 2 * 10**6, drafter="perfect"), warped_law) > REJECTED


def test_seeds_far_apart_and_the_index_have_the_law_too(plain_law):
    """Neighbouring seeds were used above; now seeds that differ in the high word only."""
    prompts = [PROMPT] * ROWS
    for keys in ([key_of(i << 32) for i in range(ROWS)], [key_of(7, i) for i in range(ROWS)]):
        sampling = sampling_of([{}] * ROWS, prompts, V)._replace(key=torch.tensor(keys), penalties=None)
        assert p_value(generate(TABLES, prompts, sampling, PLAIN, COUNT), plain_law) > REJECTED


@pytest.mark.parametrize("drafter", ["perfect", "random"])
def test_control_the_longest_of_independently_tested_beams_is_rejected(plain_law, drafter):
    """The reference's rule conditions on success, and proposes what is not a draw from q."""
    ids = many_seeds({}, TREE, 1, drafter=drafter, step_fn=longest_beam_step())
    assert p_value(ids, plain_law) < REJECTED


def test_control_one_beam_of_the_reference_is_rejected_as_well(plain_law):
    ids = many_seeds({}, Shape(1, 3, 4), 1, drafter="perfect", step_fn=longest_beam_step())
    assert p_value(ids, plain_law) < REJECTED


def test_control_rejection_without_its_residual_is_rejected(plain_law):
    """The same code with the residual passes, so it is the residual that the test sees."""
    right = many_seeds({}, TREE, 1, drafter="random", step_fn=rejection_step(residual=True))
    wrong = many_seeds({}, TREE, 1, drafter="random", step_fn=rejection_step(residual=False))
    assert p_value(right, plain_law) > REJECTED
    assert p_value(wrong, plain_law) < REJECTED


def seed_equal(step_fn, drafter: str) -> float:
    """Share of rows whose ids are those of plain decoding."""
    prompts = [PROMPT] * 200
    sampling = sampling_of([{"seed": i} for i in range(200)], prompts, V)
    shape = Shape(4, 3, 16, branching=4)
    plain = generate(TABLES, prompts, sampling, PLAIN, 12)
    ids = generate(TABLES, prompts, sampling, shape, 12, drafter=drafter, step_fn=step_fn)
    return float((ids == plain).all(1).float().mean())


@pytest.mark.parametrize("fault", ["node_noise", "sibling_seen", "parent_off_by_one"])
def test_controls_fail_seed_equality(fault):
    assert seed_equal(faulty_step("none"), "perfect") == 1.0
    assert seed_equal(faulty_step(fault), "perfect") < 0.5
    assert seed_equal(faulty_step(fault), "random") < 0.9


@pytest.mark.parametrize("fault", ["sibling_seen", "parent_off_by_one"])
def test_controls_that_change_the_law_are_rejected(plain_law, fault):
    shape = Shape(4, 3, 16, branching=4)
    assert p_value(many_seeds({}, shape, 1, drafter="perfect", step_fn=faulty_step("none")), plain_law) > REJECTED
    assert p_value(many_seeds({}, shape, 1, drafter="perfect", step_fn=faulty_step(fault)), plain_law) < REJECTED
