"""The library's front door over a scripted engine: what is answered, streamed, cut, cancelled and refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redrafter import SamplingParams
from redrafter.errors import InvalidRequest, NonFiniteLogits
from redrafter.text import Piece
from tests import fakes
from tests.fakes import scripted

ANSWER = "the sky is blue, née 你好 😀. the end"


def test_one_prompt_gives_a_list_of_one() -> None:
    llm = scripted(ANSWER)
    (completion,) = llm.generate("why?")
    assert completion.text == ANSWER
    assert list(completion.token_ids) == llm.engine.answer
    assert completion.finish_reason == "stop"
    assert completion.statistics.answer_tokens == len(completion.token_ids)
    assert llm.tokenizer.decode(completion.prompt_token_ids) == "why?"


def test_a_text_is_a_user_message_unless_raw_or_without_a_template() -> None:
    llm = scripted(ANSWER)
    messages = [{"role": "user", "content": "why?"}]
    assert llm.encode("why?") == llm.encode(messages) == llm.tokenizer.encode("<|user|>why?<|end|><|assistant|>")
    assert llm.encode("why?", raw=True) == llm.tokenizer.encode("why?")
    llm.tokenizer._tokenizer.chat_template = None
    assert llm.encode("why?") == llm.tokenizer.encode("why?")


def test_lists_are_answered_in_their_order_each_with_its_settings() -> None:
    llm = scripted(ANSWER)
    params = [SamplingParams(max_new_tokens=n) for n in (4, 40, 1)]
    prompts = ["a", [{"role": "system", "content": "b"}, {"role": "user", "content": "c"}], "d"]
    completions = llm.generate(prompts, params)
    assert [len(c.token_ids) for c in completions] == [4, len(llm.engine.answer), 1]
    assert [c.finish_reason for c in completions] == ["length", "stop", "length"]
    assert [list(c.prompt_token_ids) for c in completions] == [llm.encode(p) for p in prompts]


@given(st.integers(1, 9), st.sampled_from(["the", "😀", "e ", "好 ", "blue, n", "absent"]), st.integers(1, 60))
def test_a_stop_string_cuts_the_same_whatever_a_step_delivers(stride: int, stop: str, limit: int) -> None:
    """Inside an accepted path, across tokens and across steps."""
    params = SamplingParams(stop=(stop,), max_new_tokens=limit)
    reference = scripted(ANSWER, stride=1).generate("why?", params)[0]
    llm = scripted(ANSWER, stride=stride)
    completion = llm.generate("why?", params)[0]
    assert (completion.text, completion.token_ids) == (reference.text, reference.token_ids)
    whole = llm.tokenizer.decode(llm.engine.answer[:limit])
    assert completion.text == whole.partition(stop)[0]
    assert completion.finish_reason == ("stop" if stop in whole or whole == ANSWER else "length")
    assert stop in llm.tokenizer.decode(completion.token_ids) or stop not in whole
    assert not llm.engine.has_work


def test_stream_is_generate_in_pieces_with_the_drafted_ones_marked() -> None:
    llm = scripted(ANSWER, stride=4)
    chunks = list(llm.stream("why?"))
    completion = llm.generate("why?")[0]
    assert "".join(chunk.text for chunk in chunks) == completion.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == completion.token_ids
    assert [chunk.completion is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].completion.text == completion.text
    assert chunks[0].spans == (Piece("t", True), Piece("he", True), Piece(" ", True), Piece("s", False))


def test_a_held_back_stream_gives_the_rest_at_the_end() -> None:
    llm = scripted("abcab", stride=2)
    texts = [chunk.text for chunk in llm.stream("x", SamplingParams(stop=("abd",)))]
    assert texts == ["", "abc", "ab"]


def test_leaving_a_stream_cancels_the_request() -> None:
    llm = scripted(ANSWER)
    for chunk in llm.stream("why?"):
        assert chunk.token_ids
        break
    assert llm.engine.cancelled == ["request-0"]
    assert not llm.engine.has_work


def test_a_stream_never_started_asks_nothing_of_the_engine() -> None:
    llm = scripted(ANSWER)
    llm.stream("why?").close()
    assert not llm.engine.has_work


def test_streams_and_answers_may_be_interleaved() -> None:
    llm = scripted(ANSWER)
    one, two = llm.stream("1"), llm.stream("2")
    texts = [next(one).text, next(two).text]
    assert llm.generate("3")[0].text == ANSWER
    texts[0] += "".join(chunk.text for chunk in one)
    texts[1] += "".join(chunk.text for chunk in two)
    assert texts == [ANSWER, ANSWER]


def test_without_speculation_the_plain_twin_answers() -> None:
    llm = scripted(ANSWER)
    completion = llm.generate("why?", speculation=False)[0]
    assert completion.statistics.tokens_per_step == 1
    assert completion.token_ids == llm.generate("why?")[0].token_ids
    stream = llm.stream("why?", speculation=False)
    next(stream)
    with pytest.raises(InvalidRequest, match="finish or close"):
        llm.generate("why?")
    stream.close()
    assert llm.generate("why?")[0].text == ANSWER


def failing(engine: fakes.ScriptedEngine) -> None:
    engine.fail_after = 6


def test_logits_that_are_not_finite_end_the_request_with_its_error() -> None:
    llm = scripted(ANSWER, prepare=failing)
    with pytest.raises(NonFiniteLogits, match="float32"):
        llm.generate("why?")
    texts: list[str] = []
    with pytest.raises(NonFiniteLogits):
        texts.extend(chunk.text for chunk in llm.stream("why?"))
    assert "".join(texts) == llm.tokenizer.decode(llm.engine.answer[:6])
    short, long = llm.generate(["a", "b"], [SamplingParams(max_new_tokens=5), SamplingParams()])
    assert (short.finish_reason, short.error) == ("length", None)
    assert (long.finish_reason, type(long.error)) == ("error", NonFiniteLogits)
    assert long.text == llm.tokenizer.decode(llm.engine.answer[:6])
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    ("prompts", "params", "says"),
    [
        ("", None, "empty"),
        ([], None, "no prompt"),
        (["a", ""], None, "empty"),
        (["a", 3], None, "prompt 1 is 3"),
        (["a", {"role": "user", "content": "b"}], None, "prompt 1"),
        ([[]], None, "empty"),
        (["a", "b"], [SamplingParams()], "1 SamplingParams for 2 prompts"),
        ([{"role": "tool", "content": "b"}], None, "no tools here"),
        ("a\ud800", None, "Unicode"),
        (["a", "b" * 100], None, "the context holds 64"),
    ],
)
def test_what_cannot_be_asked_is_refused_and_leaves_nothing_behind(prompts, params, says: str) -> None:
    llm = scripted(ANSWER)
    with pytest.raises(InvalidRequest, match=says):
        llm.generate(prompts, params)
    assert not llm.engine.has_work
    assert llm.generate("why?")[0].text == ANSWER
