"""The recorded step, on kernels, against the plain backend: same answers, same counts, a graph per kind of step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")

from redrafter.algorithm.step import DecodeState
from redrafter.backends.protocol import PromptPart
from redrafter.backends.torch.attention import EXACT, FAST, KERNEL
from redrafter.backends.torch.cuda import GraphBackend
from redrafter.backends.torch.drafter import Drafter
from redrafter.backends.torch.drafting import TorchDrafter
from redrafter.backends.torch.graph import IDLE, copy_into, leaves
from redrafter.backends.torch.load import TorchBackend, make_target
from redrafter.batch import first_state, join, take_rows
from redrafter.bench.control import accepting_nothing
from redrafter.engine import Engine
from redrafter.params import PLAIN, DecodeConfig, SamplingParams
from tests.kernels.twins import in_pairs
from tests.tiny import VOCAB, drafter_config, make_model, run
from tests.traffic import Visit, play, random_visits

SHAPE = DecodeConfig(beam_width=3, branching=3, draft_length=3, tree_size=8)


class Turns:
    """Another shape at every step."""

    shapes: Sequence[DecodeConfig] = (
        SHAPE,
        PLAIN,
        DecodeConfig(beam_width=2, branching=2, draft_length=2, tree_size=4),
    )

    def __init__(self) -> None:
        self.steps = 0

    def choose(self, rows: int) -> DecodeConfig:
        self.steps += 1
        return self.shapes[self.steps // 2 % 3]

    def observe(self, config: DecodeConfig, accepted: Sequence[int], seconds: float | None) -> None:
        """Nothing to learn."""


@pytest.fixture(autouse=True)
def plain_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the kernels read the drafter's weights, which oneDNN's packing would hide."""
    monkeypatch.setattr("redrafter.backends.torch.linear.can_pack", lambda *_: False)


def rerun(function: Any) -> Any:
    """Stands in for CUDA's recorder: runs the function again and writes into the first results."""
    results = function()
    return (lambda: copy_into(results, function())), results


def make(kind: str, attention: str = EXACT, rows: int = 3, context: int = 200, **config: Any) -> TorchBackend:
    torch.manual_seed(0)
    drafter = Drafter(drafter_config(**config))
    if drafter.config.draft_vocabulary:
        drafter.token_ids.copy_(torch.randperm(VOCAB)[: drafter.config.draft_vocabulary].sort().values)
    target = make_target(make_model(attention=attention), drafter.config.feature_layers)
    if kind == "plain":
        return TorchBackend(target, drafter, context, {2}, table=drafter.config.cell == "gru")
    backend = GraphBackend(target, drafter, context, {2}, record=rerun)
    if rows:
        backend.reserve(rows, 264)
    return backend


def few_visits(seed: int, count: int, tokens: int) -> list[Visit]:
    """One more arrives at each step, and every answer has so many tokens: the interpreter is slow."""
    visits = random_visits(seed=seed, count=count, longest=6, cancels=0)
    return [
        visit._replace(arrives=i, params=replace(visit.params, max_new_tokens=tokens, stop_token_ids=()))
        for i, visit in enumerate(visits)
    ]


@pytest.mark.parametrize(
    "config",
    [
        {"attention": KERNEL, "cell": "gru", "context_state": True, "exit_dim": 24, "draft_vocabulary": 64},
        {"cell": "gru", "context_state": True, "exit_dim": 24, "num_blocks": 1, "draft_vocabulary": 64},
        {"cell": "rnn", "head": "own", "exit_dim": 0, "trunk_layers": 0, "feature_layers": ()},
    ],
    ids=["all kernels", "shipped", "paper"],
)
def test_random_traffic_is_answered_as_by_the_plain_backend(config: dict[str, Any]) -> None:
    visits = few_visits(seed=59, count=2, tokens=6)
    plain = play(Engine(make("plain", **{**config, "attention": EXACT}), Turns(), 3), visits)
    recorded = play(Engine(make("graph", **config), Turns(), 3), visits)
    assert [answer.ids for answer in recorded] == [answer.ids for answer in plain]
    assert [answer.reason for answer in recorded] == [answer.reason for answer in plain] == ["length"] * 2
    # What was drafted, too: a wrong draft would not show in the answers.
    assert [answer.counts for answer in recorded] == [answer.counts for answer in plain]
    assert sum(sum(answer.counts["accepted_at_depth"]) for answer in plain) >= 2


def test_a_graph_of_four_rows_serves_three() -> None:
    """The fourth is idle, and the prompt that is being read into its row stays whole."""
    config = {"cell": "gru", "exit_dim": 24, "num_blocks": 1, "draft_vocabulary": 64}
    small = DecodeConfig(beam_width=2, branching=2, draft_length=1, tree_size=3)
    outcomes = []
    for backend in (make("plain", **config), make("graph", KERNEL, rows=4, **config)):
        backend.reserve(4, 264)
        texts = [[5, 17, 33, 8], [41, 12, 60], [9, 4], [50, 51, 52, 53, 54]]
        features = [backend.prefill(row, text) for row, text in enumerate(texts)]
        states = [first_state(backend, small, features[i], root=20 + i, length=len(texts[i])) for i in range(3)]
        state = reduce(partial(join, backend.ops), states)
        before = backend.target.cache.keys[:, 3, :, :5].clone()
        for _ in range(2):
            state, accepted, tree = backend.step(state, small)
            outcomes.append((backend.read(backend.fetch(accepted, tree)), state.lengths.tolist()))
        assert torch.equal(backend.target.cache.keys[:, 3, :, :5], before) and before.abs().sum() > 0
    assert outcomes[:2] == outcomes[2:]
    assert isinstance(backend, GraphBackend) and backend.graphs == 1
    [(size, graph)] = backend._runner._graphs.popitem()[1].items()
    assert size == 4
    view = graph.first(3)
    assert all(a is b for a, b in zip(leaves(view.state), leaves(view.after), strict=True)), "copied at every step"
    # Row 0 leaves, the last takes its place: in the graph's own buffers, as it would elsewhere.
    wanted = take_rows(state, backend.array([2, 1]))
    kept = backend.keep_rows(state, [2, 1])
    assert kept is graph.first(2).after
    assert all(torch.equal(a, b) for a, b in zip(leaves(kept), leaves(wanted), strict=True))
    assert backend.keep_rows(wanted, [0]) is None, "not the graph's"
    assert backend.keep_rows(kept, [1, 0]) is None, "a row would be overwritten before it moves"


def test_a_row_that_ended_is_idle_before_the_host_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One answer ends with a token that ends it, one is full, the third goes on."""
    config: dict[str, Any] = {"cell": "rnn", "head": "own", "exit_dim": 0, "trunk_layers": 0, "feature_layers": ()}
    prompts = [[5, 17, 33, 8], [41, 12, 60], [9, 4, 7]]
    settings = [SamplingParams(max_new_tokens=count, ignore_eos=True) for count in (6, 2, 6)]

    def answers(backend: TorchBackend) -> list[list[int]]:
        engine, found = Engine(backend, SHAPE, 3), dict[str, list[int]]()
        for name, prompt, params in zip("abc", prompts, settings, strict=True):
            engine.add(name, prompt, params)
        while engine.has_work:
            for event in engine.step():
                found.setdefault(event.request_id, []).extend(event.tokens)
            engine.check()
        return [found[name] for name in "abc"]

    plain = make("plain", **config)
    first = answers(plain)
    settings[0] = replace(settings[0], stop_token_ids=(first[0][2],))
    wanted = [first[0][: first[0].index(first[0][2])], *first[1:]]
    assert wanted == answers(plain) and len(wanted[0]) > 0
    recorded = make("graph", KERNEL, **config)
    lengths, step = list[int](), recorded.step

    def watched(state: DecodeState, config: DecodeConfig) -> Any:
        lengths.extend(state.lengths.tolist())
        return step(state, config)

    monkeypatch.setattr(recorded, "step", watched)
    assert answers(recorded) == wanted
    assert lengths.count(IDLE) == 2, "once for each answer that ended while another went on"


def test_a_graph_serves_every_step_of_its_kind() -> None:
    backend = make("graph", cell="rnn", head="own", exit_dim=0, trunk_layers=0, feature_layers=())
    assert isinstance(backend, GraphBackend)
    engine = Engine(backend, SHAPE, 3)
    visits = few_visits(seed=59, count=2, tokens=3)
    play(engine, visits)
    first = backend.graphs
    play(engine, visits)
    assert 0 < first == backend.graphs
    backend.reserve(3, 300)
    assert backend.graphs == 0, "the cache moved: graphs that point to it must go"


def test_what_is_prepared_lasts_to_the_contexts_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """No request makes the cache move, which would drop all graphs: here a prompt and an answer that fill it."""
    for module in ("cuda", "prompt"):  # the interpreter takes two minutes for two hundred tokens
        for name, value in (("LENGTHS", (16,)), ("LONG", (2,)), ("SEGMENT", 8), ("MANY", (4,)), ("MOST", 32)):
            monkeypatch.setattr(f"redrafter.backends.torch.{module}.{name}", value)
    plain, recorded = make("plain", FAST, context=24), make("graph", KERNEL, rows=0, context=24)
    recorded.prepare(2, [SHAPE, PLAIN])
    assert (recorded.rows, recorded.slots) == (2, 24 + 16)
    prompt = [(7 * i) % (VOCAB - 3) + 3 for i in range(21)]
    answers = [
        run(Engine(b, SHAPE), prompt, SamplingParams(max_new_tokens=50, ignore_eos=True)) for b in (plain, recorded)
    ]
    assert answers[0][0] == answers[1][0] and len(answers[0][0]) == 3
    assert (recorded.rows, recorded.slots) == (2, 24 + 16)


def text(tokens: int, seed: int = 0) -> list[int]:
    return [(7 * i + seed) % (VOCAB - 3) + 3 for i in range(tokens)]


def assert_rows_hold_the_same(recorded: TorchBackend, plain: TorchBackend, row: int, tokens: int) -> None:
    """What reading so many tokens leaves in a row of every cache."""
    for name in ("keys", "values"):
        mine, theirs = (getattr(b.target.cache, name)[:, row, :, :tokens] for b in (recorded, plain))
        theirs = in_pairs(theirs) if name == "keys" else theirs
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=1e-4, atol=1e-5)
    assert isinstance(recorded.drafter, TorchDrafter) and isinstance(plain.drafter, TorchDrafter)
    for name in ("_keys", "_values"):
        mine, theirs = (getattr(b.drafter, name)[0][row, :, : tokens - 1] for b in (recorded, plain))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_prompt_is_read_as_in_chunks() -> None:
    """The graph that reads a prompt, in one go and behind a part already read, in any row, against the plain way."""
    plain, recorded = make("plain", FAST), make("graph", KERNEL)
    plain.reserve(3, 264)
    prompt = text(21)
    for row, cut in ((0, 0), (2, 0), (1, 9)):
        last, twin = None, None
        if cut:
            [(last, _)] = recorded.prefill_chunks([PromptPart(row, prompt[:cut], 0, None)])
            twin, _ = plain.prefill_chunk(row, prompt[:cut], 0, None)
        [(last, end)] = recorded.prefill_chunks([PromptPart(row, prompt, cut, last)])
        twin, _ = plain.prefill_chunk(row, prompt, cut, twin)
        assert end == 21
        torch.testing.assert_close(last, twin, rtol=1e-4, atol=1e-5)
        assert_rows_hold_the_same(recorded, plain, row, 21)


def test_several_prompts_and_a_long_one_are_read_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 tokens, of 19 in three segments, of 17 behind 6 already read, and of 11 behind 4 whose last pair the drafter
    has; more than one graph holds. A second time other texts: nothing is left of the first ones. Then one alone."""
    for name, value in (("LENGTHS", (8,)), ("SEGMENT", 8), ("MANY", (2, 4))):
        monkeypatch.setattr(f"redrafter.backends.torch.prompt.{name}", value)
    plain, recorded = make("plain", FAST, rows=4), make("graph", KERNEL, rows=4)
    plain.reserve(4, 264)
    for seed in (0, 40):
        texts = [text(n, seed + i) for i, n in enumerate((5, 19, 17, 11))]
        parts, twins = [], []
        for row, (ids, start) in enumerate(zip(texts, (0, 0, 6, 4), strict=True)):
            before, twin = None, None
            if start:
                [(before, _)] = recorded.prefill_chunks([PromptPart(row, ids[:start], 0, None)])
                twin, _ = plain.prefill_chunk(row, ids[:start], 0, None)
            if row == 3:  # the pair of the token before is there
                before = twin = None
                for backend in (plain, recorded):
                    for cache in (*backend.drafter._keys, *backend.drafter._values):  # type: ignore[union-attr]
                        cache[row, :, start - 1] = seed + 0.5
            parts.append(PromptPart(row, ids, start, before))
            twins.append(plain.prefill_chunk(row, ids, start, twin)[0])
        found = recorded.prefill_chunks(parts)
        assert [end for _, end in found] == [5, 19, 17, 11]
        for (last, _), twin in zip(found, twins, strict=True):
            torch.testing.assert_close(last, twin, rtol=1e-4, atol=1e-5)
        for row, ids in enumerate(texts):
            assert_rows_hold_the_same(recorded, plain, row, len(ids))
    [(last, end)] = recorded.prefill_chunks([PromptPart(1, text(27), 0, None)])
    assert end == 27
    torch.testing.assert_close(last, plain.prefill_chunk(1, text(27), 0, None)[0], rtol=1e-4, atol=1e-5)
    assert_rows_hold_the_same(recorded, plain, 1, 27)


def test_the_control_for_forks_in_recorded_steps() -> None:
    """Steps that accept the root alone are recorded apart, on kernels, and answer as plain steps do."""
    small, visits = DecodeConfig(beam_width=2, branching=3, draft_length=2, tree_size=6), few_visits(59, 1, tokens=6)
    backend = make("graph", cell="gru", context_state=True, exit_dim=24, num_blocks=1, draft_vocabulary=64)
    plain, drafted = (play(Engine(backend, shape, 3, prefix_reuse=False), visits) for shape in (PLAIN, small))
    before = backend.graphs
    with accepting_nothing(backend):
        assert backend.graphs == 0
        control = play(Engine(backend, small, 3, prefix_reuse=False), visits)
        assert backend.graphs == 1
    assert backend.graphs == before == 2, "what was recorded before is there again"
    assert [answer.ids for answer in control] == [answer.ids for answer in plain] == [answer.ids for answer in drafted]
    assert sum(drafted[0].statistics.accepted_at_depth) > 0, "there was something to cut"
    counts = control[0].statistics
    assert not any(counts.accepted_at_depth) and counts.tree_nodes == small.tree_size * counts.steps
    with backend.recorded_anew():
        backend.reserve(3, 300)
    assert backend.graphs == 0, "the cache moved: graphs that point to it must go"
