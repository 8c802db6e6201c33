"""The library's front door over the real engine and a tiny random Llama: text with and without speculation."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from redrafter import LLM, DecodeConfig, SamplingParams
from redrafter.backends.torch.drafter import Drafter
from redrafter.backends.torch.load import TorchBackend, make_target
from redrafter.engine import Engine
from redrafter.errors import InvalidRequest, NonFiniteLogits
from redrafter.text import Tokenizer
from tests import fakes
from tests.tiny import drafter_config, make_model

VOCAB = 280  # more than the tokenizer has: models pad theirs, and such ids have no text
PROMPTS = ["why?", "the née 你", "a" * 30]


SHAPE = DecodeConfig(beam_width=3, branching=3, draft_length=3, tree_size=10)


def make_llm(drafter: bool = True, context: int = 128, shape: DecodeConfig = SHAPE) -> LLM:
    torch.manual_seed(3)
    config = drafter_config(vocab_size=VOCAB)
    target = make_target(make_model("llama", vocab_size=VOCAB), config.feature_layers)
    backend = TorchBackend(target, Drafter(config) if drafter else None, context, eos_ids=[])
    return LLM(Engine(backend, shape, max_batch=2), Tokenizer(fakes.byte_level(), "tiny"), model="tiny")


@cache
def shared() -> LLM:
    return make_llm()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_says_the_same_with_and_without_speculation(temperature: float) -> None:
    llm = shared()
    params = SamplingParams(temperature=temperature, seed=5, max_new_tokens=24)
    drafted = llm.generate(PROMPTS, params)
    plain = llm.generate(PROMPTS, params, speculation=False)
    assert [c.token_ids for c in drafted] == [c.token_ids for c in plain]
    assert [c.text for c in drafted] == [c.text for c in plain]
    assert [c.text for c in drafted] == [llm.tokenizer.decode(c.token_ids) for c in drafted]
    assert all(c.statistics.drafted_steps == c.statistics.steps for c in drafted)
    assert all(c.statistics.drafted_steps == 0 and c.statistics.tokens_per_step == 1 for c in plain)
    assert llm.dtype == "float32"


def test_a_stop_string_ends_both_ways_at_the_same_token_and_frees_the_row() -> None:
    llm = shared()
    params = SamplingParams(temperature=1.0, seed=1, max_new_tokens=40)
    whole = llm.generate("why?", params)[0].text
    stop = whole[len(whole) // 2 :][:3]
    params = SamplingParams(temperature=1.0, seed=1, max_new_tokens=40, stop=(stop,))
    ways = [llm.generate("why?", params, speculation=way)[0] for way in (True, False)]
    assert ways[0].token_ids == ways[1].token_ids
    assert {way.text for way in ways} == {whole.partition(stop)[0]}
    assert {way.finish_reason for way in ways} == {"stop"}
    assert llm.generate("why?", params)[0].text == ways[0].text


def test_a_stream_left_early_frees_its_row_for_the_next_request() -> None:
    llm = shared()
    params = SamplingParams(max_new_tokens=20)
    expected = llm.generate("why?", params)[0]
    for _ in range(3):
        for _chunk in llm.stream("the née 你", params):
            break
    chunks = list(llm.stream("why?", params))
    assert chunks[-1].completion.token_ids == expected.token_ids
    assert "".join(chunk.text for chunk in chunks) == expected.text


def test_next_logits_are_those_that_the_greedy_answer_followed() -> None:
    llm = shared()
    completion = llm.generate("why?", SamplingParams(max_new_tokens=8))[0]
    ids = [*completion.prompt_token_ids, *completion.token_ids]
    for end in range(len(completion.prompt_token_ids), len(ids)):
        logits = llm.next_logits(ids[:end])
        assert len(logits) == VOCAB and logits.index(max(logits)) == ids[end]
    assert llm.generate("why?", SamplingParams(max_new_tokens=8))[0].token_ids == completion.token_ids
    stream = llm.stream("why?")
    next(stream)
    with pytest.raises(InvalidRequest, match="while 1 requests run"):
        llm.next_logits(ids)
    stream.close()


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers() -> None:
    llm = shared()
    with pytest.raises(InvalidRequest, match=r"the prompt has 300 tokens and the context holds 128"):
        llm.generate("a" * 300, raw=True)
    assert llm.generate("why?", SamplingParams(max_new_tokens=1))[0].finish_reason == "length"


def test_an_answer_that_fills_the_context_ends_with_length_both_ways() -> None:
    llm = make_llm(context=40)
    params = SamplingParams(max_new_tokens=100)
    ways = [llm.generate("a" * 25, params, raw=True, speculation=way)[0] for way in (True, False)]
    assert [way.finish_reason for way in ways] == ["length", "length"]
    assert ways[0].token_ids == ways[1].token_ids
    assert len(ways[0].token_ids) == 15


def test_a_draft_longer_than_the_tree_is_large_has_room_in_the_cache() -> None:
    llm = make_llm(shape=DecodeConfig(beam_width=2, branching=2, draft_length=12, tree_size=3))
    params = SamplingParams(max_new_tokens=6)
    ways = [llm.generate("why?", params, speculation=way)[0].token_ids for way in (True, False)]
    assert ways[0] == ways[1]


def test_weights_that_give_nan_are_an_error_and_no_text() -> None:
    llm = make_llm(drafter=False)
    with torch.no_grad():
        for parameter in llm.engine.backend.target.model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(float("nan"))
    with pytest.raises(NonFiniteLogits, match="not finite"):
        llm.generate("why?")
    assert not llm.engine.has_work
