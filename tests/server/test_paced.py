"""The stand-in for a GPU says the same through HTTP as without it, a chunk per step."""

from __future__ import annotations

from redrafter import SamplingParams
from tests.server.client import MESSAGES, chat, events
from tests.server.paced import ACCEPTED, paced_llm
from tests.server.serving import running


def test_a_paced_answer_comes_in_chunks_of_a_step() -> None:
    llm = paced_llm(step=0.001, prompt=0.001)
    alone = llm.generate([MESSAGES], SamplingParams(max_new_tokens=30))[0].text
    with running(llm) as run:
        told = events(chat(run.url, max_tokens=30, stream=True))
        run.engine.check()
    texts = [text for event in told if (text := event["choices"][0]["delta"].get("content"))]
    assert "".join(texts) == alone
    assert len(texts) == 30 // (ACCEPTED + 1)
