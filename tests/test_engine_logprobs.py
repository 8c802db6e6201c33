"""Log-probabilities of the target beside the tokens: its own, before any setting, the same with speculation."""

from __future__ import annotations

import pytest
import torch

from redrafter.backends.torch.load import TorchBackend
from redrafter.engine import Engine
from redrafter.errors import InvalidRequest
from redrafter.params import PLAIN, DecodeConfig, SamplingParams
from redrafter.requests import TokenLogprobs
from tests.test_engine import PROMPT, SETTINGS, params
from tests.tiny import VOCAB, ScriptedDrafter, make_backend, make_model, set_drafter
from tests.traffic import Answer, Visit, play

TREE = DecodeConfig(beam_width=3, branching=3, draft_length=4, tree_size=12)


@pytest.fixture(scope="module")
def backend() -> TorchBackend:
    return make_backend()


def ask(engine: Engine, *settings: SamplingParams) -> list[Answer]:
    return play(engine, [Visit(0, None, PROMPT, p) for p in settings])


def told(answer: Answer) -> list[TokenLogprobs]:
    assert all(e.logprobs is not None and len(e.logprobs) == len(e.tokens) for e in answer.events if e.tokens)
    return [entry for event in answer.events for entry in event.logprobs or ()]


@pytest.mark.parametrize("name", SETTINGS)
def test_they_are_the_models_own(backend: TorchBackend, name: str) -> None:
    """Against transformers' own forward over the whole text, whatever shaped the choice."""
    (answer,) = ask(Engine(backend, TREE), params(name, logprobs=5))
    with torch.no_grad():
        logits = make_model("llama", "eager")(torch.tensor([PROMPT + answer.ids])).logits[0]
    expected = torch.log_softmax(logits[len(PROMPT) - 1 : -1].float(), -1)
    entries = told(answer)
    assert len(entries) == 40
    for row, token, entry in zip(expected, answer.ids, entries, strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=2e-4)
        best = row.topk(5)
        assert [i for i, _ in entry.top] == best.indices.tolist()
        assert [v for _, v in entry.top] == pytest.approx(best.values.tolist(), abs=2e-4)


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("ideal", [False, True])
def test_they_equal_plain_decodings(ideal: bool, run_ahead: bool) -> None:
    backend = make_backend()
    asked = params("sampled", logprobs=20)
    (plain,) = ask(Engine(backend, PLAIN), asked)
    if ideal:
        set_drafter(backend, ScriptedDrafter(PROMPT + plain.ids))
    backend.run_ahead = run_ahead
    (drafted,) = ask(Engine(backend, TREE), asked)
    assert drafted.ids == plain.ids and (drafted.statistics.tokens_per_step > 4) == ideal
    for a, b in zip(told(plain), told(drafted), strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
        assert [i for i, _ in a.top] == [i for i, _ in b.top]
        assert [v for _, v in a.top] == pytest.approx([v for _, v in b.top], abs=1e-5)


def test_each_request_of_a_batch_gets_what_it_asked_for(backend: TorchBackend) -> None:
    wanted = (None, 0, 1, 20)
    answers = ask(Engine(backend, TREE, max_batch=4), *(params("sampled", logprobs=k) for k in wanted))
    assert len({tuple(a.ids) for a in answers}) == 1
    assert all(event.logprobs is None for event in answers[0].events)
    for k, answer in zip(wanted[1:], answers[1:], strict=True):
        assert {len(entry.top) for entry in told(answer)} == {k}
    first, last = told(answers[1]), told(answers[3])
    assert [e.logprob for e in first] == pytest.approx([e.logprob for e in last], abs=1e-5)


def test_they_are_cut_with_the_tokens(backend: TorchBackend) -> None:
    whole = ask(Engine(backend, PLAIN), params("hot"))[0].ids
    ideal = set_drafter(make_backend(), ScriptedDrafter(PROMPT + whole))
    (answer,) = ask(Engine(ideal, TREE), params("hot", logprobs=2, stop_token_ids=(whole[7],)))
    assert answer.ids == whole[: whole.index(whole[7])] and len(told(answer)) == len(answer.ids)


def test_nobody_asked_so_nothing_is_computed(backend: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    logprobs = backend._logprobs
    monkeypatch.setattr(
        backend, "_logprobs", lambda logits, tokens: (computed.append(len(tokens)), logprobs(logits, tokens))[1]
    )
    ask(Engine(backend, TREE), params("sampled"))
    assert computed == []
    ask(Engine(backend, TREE), params("sampled", logprobs=0))
    assert computed and set(computed) == {1}


def test_more_than_twenty_are_refused() -> None:
    for k in (-1, 21, True, 2.0):
        with pytest.raises(InvalidRequest, match="a whole number from 0 to 20"):
            SamplingParams(logprobs=k)  # type: ignore[arg-type]
    assert SamplingParams(logprobs=20).logprobs == 20 and VOCAB > 20
