"""The tree that an event tells of is the one its step verified."""

from __future__ import annotations

from itertools import pairwise

import pytest

from redrafter.engine import Engine
from redrafter.params import PLAIN, DecodeConfig, SamplingParams
from tests.tiny import make_backend

PROMPTS = [[5, 17, 33, 8, 90, 41, 41, 12], [60, 3, 77]]


@pytest.mark.parametrize("tree_size", [2, 9, 500])
def test_root_parents_and_the_agreed_path(tree_size: int) -> None:
    config = DecodeConfig(beam_width=4, branching=4, draft_length=3, tree_size=tree_size)
    engine = Engine(make_backend(), config, 2)
    texts = {str(number): list(prompt) for number, prompt in enumerate(PROMPTS)}
    for name, prompt in texts.items():
        engine.add(name, prompt, SamplingParams(max_new_tokens=30, temperature=2.0, seed=3))
    seen = agreed = 0
    while engine.has_work:
        for event in engine.step():
            tree = event.tree
            assert tree is not None
            tokens, parent, path = tree.tokens, tree.parent, tree.path
            assert len(tokens) == len(parent) == tree.nodes <= tree_size
            assert tokens[0] == texts[event.request_id][-1] and parent[0] == 0
            assert all(0 <= up < node for node, up in enumerate(parent) if node)
            assert len(set(zip(parent[1:], tokens[1:], strict=True))) == tree.nodes - 1
            assert [tokens[node] for node in path[1:]] == list(tree.agreed)
            assert all(parent[node] == up for up, node in pairwise(path))
            assert list(tree.agreed)[: event.drafted] == list(event.tokens[: event.drafted])
            texts[event.request_id] += event.tokens
            seen, agreed = seen + 1, agreed + len(tree.agreed)
    assert seen > 20 and agreed > 0


def test_plain_decoding_has_no_tree() -> None:
    engine = Engine(make_backend(), PLAIN)
    engine.add("x", PROMPTS[0], SamplingParams(max_new_tokens=3))
    events = [event for _ in range(20) for event in engine.step()]
    assert len(events) == 3 and all(event.tree is None for event in events)
