"""Exactness end to end on a tiny model: speculative ids equal plain ids whatever drafts, however, beside whom."""

from __future__ import annotations

import math

import pytest
import torch

from redrafter.backends.torch.linear import row_invariant
from redrafter.backends.torch.load import TorchBackend
from redrafter.engine import Engine
from redrafter.errors import InvalidRequest, NonFiniteLogits
from redrafter.params import PLAIN, DecodeConfig, SamplingParams
from tests.tiny import TINY_SHAPES, VOCAB, ScriptedDrafter, make_backend, run, run_all, set_drafter

PROMPT = [5, 17, 33, 8, 90, 41, 41, 12, 60, 3, 77, 24, 9]
SHAPES = [(1, 1, 1), (1, 1, 6), (2, 3, 2), (4, 4, 4), (8, 8, 8), (16, 2, 5), (64, 4, 8)]
SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 11},
    "hot": {"temperature": 4.0, "seed": 2**63 + 5},
    "cut": {"temperature": 2.0, "seed": 3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "penalised": {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    "all": {
        "temperature": 1.5,
        "seed": 9,
        "top_p": 0.95,
        "repetition_penalty": 0.8,
        "frequency_penalty": -0.3,
        "logit_bias": {7: 4.0, 11: -math.inf, 30: 2.5},
    },
}


@pytest.fixture(scope="module")
def backend() -> TorchBackend:
    return make_backend()


def params(name: str, **changes: object) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 40, **SETTINGS[name], **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_setting_with_random_ideal_and_adversarial_drafters(
    backend: TorchBackend, name: str, shape: tuple[int, int, int]
) -> None:
    width, branching, length = shape
    plain, _ = run(Engine(backend, PLAIN), PROMPT, params(name))
    text = PROMPT + plain
    random = backend.drafter
    sizes = {(1, 1, 1): (2,), (8, 8, 8): (1, 2, 3, 17, 64, 128), (64, 4, 8): (128,)}.get(shape, (12,))
    try:
        for size in sizes:
            config = DecodeConfig(beam_width=width, branching=branching, draft_length=length, tree_size=size)
            for drafter in (
                random,
                ScriptedDrafter(text),
                ScriptedDrafter(text, adversarial=True),
                ScriptedDrafter(text, wrong_every=3),
            ):
                ids, statistics = run(Engine(set_drafter(backend, drafter), config), PROMPT, params(name))
                assert ids == plain, (size, type(drafter).__name__)
        assert statistics.steps >= 1
    finally:
        backend.drafter = random


def test_an_ideal_drafter_is_believed(backend: TorchBackend) -> None:
    """Without this the equality above could hold because nothing is ever accepted."""
    plain, _ = run(Engine(backend, PLAIN), PROMPT, params("greedy"))
    random = backend.drafter
    try:
        set_drafter(backend, ScriptedDrafter(PROMPT + plain))
        shape = DecodeConfig(beam_width=2, branching=2, draft_length=4, tree_size=8, prompt_lookup=0)
        ids, statistics = run(Engine(backend, shape), PROMPT, params("greedy"))
        assert ids == plain
        assert statistics.tokens_per_step == 5.0 and statistics.steps == 8
        assert statistics.accepted_at_depth == [8, 8, 8, 8]
        assert 0 < statistics.removed_share < 1
    finally:
        backend.drafter = random


def test_seed_coupled_beams_change_the_speed_and_not_the_text(backend: TorchBackend) -> None:
    one = DecodeConfig(tree_size=16, seed_coupled=True)
    other = DecodeConfig(tree_size=16, seed_coupled=False)
    assert (
        run(Engine(backend, one), PROMPT, params("sampled"))[0]
        == run(Engine(backend, other), PROMPT, params("sampled"))[0]
    )


def test_a_seed_is_a_text_and_another_seed_another() -> None:
    backend = make_backend()
    texts = {tuple(run(Engine(backend, PLAIN), PROMPT, params("hot", seed=s))[0]) for s in (1, 1, 2, 3)}
    assert len(texts) == 3


@pytest.mark.parametrize(
    "config", [PLAIN, DecodeConfig(tree_size=20, beam_width=4, draft_length=5)], ids=["plain", "tree"]
)
def test_a_ragged_batch_gives_each_request_its_own_answer(backend: TorchBackend, config: DecodeConfig) -> None:
    """Different lengths, settings and ends; more requests than rows, so rows are freed, moved and taken again."""
    generator = torch.Generator().manual_seed(5)
    prompts, settings = [], []
    for i, name in enumerate([*SETTINGS, *SETTINGS]):
        length = 1 + 7 * i % 40
        prompts.append(torch.randint(3, VOCAB, (length,), generator=generator).tolist())
        settings.append(params(name, max_new_tokens=3 + 5 * i % 31))
    together = run_all(Engine(backend, config, max_batch=5), prompts, settings)
    for prompt, p, (ids, statistics) in zip(prompts, settings, together, strict=True):
        assert ids == run(Engine(backend, PLAIN), prompt, p)[0]
        assert statistics.answer_tokens == len(ids) == p.max_new_tokens


def ideal(backend: TorchBackend, plain: list[int], length: int = 6) -> Engine:
    set_drafter(backend, ScriptedDrafter(PROMPT + plain))
    return Engine(backend, DecodeConfig(beam_width=2, branching=2, draft_length=length, tree_size=12))


def test_requests_end_inside_an_accepted_path() -> None:
    """A stop id, the token limit and a full context, each met in the middle of seven tokens accepted at once."""
    backend = make_backend(context=60)
    plain, _ = run(Engine(backend, PLAIN), PROMPT, params("hot"))
    stop = plain[9]
    first = plain.index(stop)
    engine = ideal(backend, plain)
    ids, _ = run(engine, PROMPT, params("hot", stop_token_ids=(stop,)))
    assert ids == plain[:first]
    for limit in (1, 2, 6, 7, 8, 20):
        ids, _ = run(engine, PROMPT, params("hot", max_new_tokens=limit))
        assert ids == plain[:limit]
    full, _ = run(Engine(backend, PLAIN), PROMPT, params("hot", max_new_tokens=500))
    assert len(full) == 60 - len(PROMPT)
    assert run(ideal(backend, full), PROMPT, params("hot", max_new_tokens=500))[0] == full


def test_finish_reasons_and_eos() -> None:
    backend = make_backend()
    plain, _ = run(Engine(backend, PLAIN), PROMPT, params("hot"))
    backend.eos_ids = frozenset({plain[5]})
    engine = Engine(backend, DecodeConfig(tree_size=8))

    def reason(**changes: object) -> tuple[str | None, int]:
        engine.add("a", PROMPT, params("hot", **changes))
        events = []
        while engine.has_work:
            events += engine.step()
        return events[-1].finish_reason, events[-1].statistics.answer_tokens

    assert reason() == ("stop", plain.index(plain[5]))
    assert reason(ignore_eos=True) == ("length", 40)
    assert reason(max_new_tokens=2) == ("length", 2)


def test_cancel_frees_the_row_and_disturbs_nobody(backend: TorchBackend) -> None:
    alone, _ = run(Engine(backend, PLAIN), PROMPT, params("sampled"))
    engine = Engine(backend, DecodeConfig(tree_size=8), max_batch=2)
    for name in ("a", "b", "c"):
        engine.add(name, PROMPT, params("sampled"))
    engine.step()
    engine.cancel("a")
    engine.cancel("nobody")
    ids: dict[str, list[int]] = {"b": [], "c": []}
    reasons = {}
    first = True
    while engine.has_work:
        for event in engine.step():
            if event.request_id != "a":
                ids[event.request_id].extend(event.tokens)
            if event.finish_reason:
                reasons[event.request_id] = event.finish_reason
        first = False
    assert not first and reasons == {"a": "cancelled", "b": "length", "c": "length"}
    assert ids["c"] == alone and alone[-len(ids["b"]) :] == ids["b"]


def test_nan_logits_end_one_request_and_not_its_neighbour(backend: TorchBackend) -> None:
    alone, _ = run(Engine(backend, PLAIN), PROMPT, params("greedy"))
    engine = Engine(backend, DecodeConfig(tree_size=8), max_batch=2)
    engine.add("good", PROMPT, params("greedy"))
    engine.add("bad", [4, 5, 6], params("greedy", logit_bias={9: 1.0}))
    verify, target = backend.target.verify, backend.target

    def poisoned(tree: object, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, features = verify(tree, lengths)  # type: ignore[arg-type]
        if len(lengths) == 2 and int(lengths[1]) > 8:
            logits[1] = float("nan")
        return logits, features

    target.verify = poisoned  # type: ignore[method-assign]
    try:
        ids, errors = [], []
        while engine.has_work:
            for event in engine.step():
                if event.request_id == "good":
                    ids += event.tokens
                elif event.error is not None:
                    errors.append(event.error)
    finally:
        target.verify = verify  # type: ignore[method-assign]
    assert ids == alone
    assert len(errors) == 1 and isinstance(errors[0], NonFiniteLogits) and "'bad'" in str(errors[0])


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([], {}, "0 tokens"),
        ([5] * 200, {}, "200 tokens and the context holds 200"),
        ([5, VOCAB], {}, f"{VOCAB} is not in the vocabulary"),
        ([-1], {}, "-1 is not in the vocabulary"),
        ([5], {"logit_bias": {VOCAB + 3: 1.0}}, "not in the vocabulary"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_by_value(
    backend: TorchBackend, prompt: list[int], changes: dict[str, object], message: str
) -> None:
    engine = Engine(backend, PLAIN)
    with pytest.raises(InvalidRequest, match=message):
        engine.add("a", prompt, params("greedy", **changes))
    assert not engine.has_work
    engine.add("a", PROMPT, params("greedy"))
    with pytest.raises(InvalidRequest, match="already in use"):
        engine.add("a", PROMPT, params("greedy"))


def test_bfloat16_on_this_cpu_is_exact_too() -> None:
    if not row_invariant(torch.bfloat16, TINY_SHAPES):
        pytest.skip("rows of packed products depend on their number on this CPU")
    backend = make_backend(dtype=torch.bfloat16)
    for name in SETTINGS:
        plain, _ = run(Engine(backend, PLAIN), PROMPT, params(name, max_new_tokens=80))
        ids, _ = run(Engine(backend, DecodeConfig(tree_size=20)), PROMPT, params(name, max_new_tokens=80))
        assert ids == plain, name


def test_a_text_that_repeats_itself_needs_fewer_steps_with_prompt_lookup(backend: TorchBackend) -> None:
    """Of a model whose answers loop, with a drafter that knows nothing; and no token is another."""
    prompt, asked = PROMPT * 3, params("greedy", max_new_tokens=48, logit_bias=dict.fromkeys(PROMPT[:2], 30.0))
    plain, _ = run(Engine(backend, PLAIN), prompt, asked)
    steps = []
    for lookup in (0, 15):
        shape = DecodeConfig(beam_width=2, branching=2, draft_length=2, tree_size=16, prompt_lookup=lookup)
        ids, statistics = run(Engine(backend, shape), prompt, asked)
        assert ids == plain
        steps.append(statistics.steps)
    assert steps[1] < steps[0]
