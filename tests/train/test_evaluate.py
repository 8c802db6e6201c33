"""Accepted lengths against a walk through a dictionary tree, and steps against decoding by hand."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AutoTokenizer

from redrafter.algorithm.beam import DraftBeams
from redrafter.algorithm.tree import pack
from redrafter.backends.torch.drafter import Drafter
from redrafter.backends.torch.load import TorchBackend, make_target
from redrafter.backends.torch.ops import TorchOps
from redrafter.engine import Engine
from redrafter.params import DecodeConfig, SamplingParams
from redrafter.train.evaluate import (
    AnswerText,
    Coupling,
    EvalOptions,
    Evaluation,
    Walk,
    acceptance,
    accepted_lengths,
    merged_share,
    noise_keys,
    steps,
    table,
    write_answers,
)
from redrafter.train.prompts import Prompt
from redrafter.train.target import ATTENTION, TrainingTarget, attend
from redrafter.train.writing import Writer, WritingConfig
from tests.tiny import drafter_config, make_model, run


def random_beams(seed: int) -> DraftBeams:
    generator = torch.Generator().manual_seed(seed)
    parent = torch.tensor([[-1, -1, 0, 0, 1, 2, 2, 4]])
    tokens = torch.tensor([[1, 2, 1, 2, 1, 1, 2, 2]])
    score = torch.zeros(1, 8)
    for i, up in enumerate(parent[0].tolist()):
        score[0, i] = (score[0, up] if up >= 0 else 0) - torch.rand(1, generator=generator)[0]
    depth = torch.tensor([[1, 1, 2, 2, 2, 3, 3, 3]])
    return DraftBeams(tokens, parent, depth, score, torch.tensor([[5]]), 3)


def test_accepted_length_equals_a_walk() -> None:
    lengths = set()
    for seed in range(20):
        tree = pack(TorchOps(), random_beams(seed), torch.tensor([3]), 9)
        follow = torch.randint(1, 3, (1, 4), generator=torch.Generator().manual_seed(seed))
        if seed % 3 == 0:
            follow[0, 2:] = -1
        got = accepted_lengths(tree, follow)[0].tolist()
        for nodes in range(1, 9):
            children = {
                (int(tree.parent[0, i]), int(tree.tokens[0, i])): i for i in range(1, min(nodes, tree.tokens.shape[1]))
            }
            node, length = 0, 0
            while (node, int(follow[0, length])) in children:
                node = children[(node, int(follow[0, length]))]
                length += 1
            assert got[nodes - 1] == length
            lengths.add(length)
    assert lengths >= {0, 1, 2, 3}


def test_steps_walk_the_text() -> None:
    assert steps(np.array([2, 0, 0, 1, 0, 0])) == 3  # tokens 0 1 2, then 3 4, then 5
    assert steps(np.zeros(6, dtype=np.int8)) == 6


def test_steps_equal_those_of_the_engine() -> None:
    prompt = [5, 17, 33, 8, 90, 41, 41, 12]
    torch.manual_seed(1)
    drafter = Drafter(drafter_config())
    backend = TorchBackend(make_target(make_model(), (0, 2)), copy.deepcopy(drafter), 200, eos_ids=[])
    AttentionInterface.register(ATTENTION, attend)
    target = TrainingTarget(make_model(attention=ATTENTION), (0, 2))
    evaluation = Evaluation(target, drafter)
    counts = set()
    for width, size in ((8, 64), (3, 12), (1, 5)):
        shape = DecodeConfig(beam_width=width, branching=8, draft_length=4, tree_size=size)
        ids, statistics = run(Engine(backend, shape), prompt, SamplingParams(max_new_tokens=60))
        text = AnswerText(np.array(prompt + ids), len(prompt))
        lengths = evaluation.lengths([text], evaluation.contexts([text]), Walk(shape, rows=16)).lengths
        assert steps(lengths[0][:, -1]) == statistics.steps
        found = table([text], lengths, (size,))[str(size)]["tokens_per_step"]
        assert found == pytest.approx(statistics.tokens_per_step, abs=1e-3)
        counts.add(statistics.steps)
    assert min(counts) < 60, "some draft must be accepted for this to mean anything"


def test_sampled_texts_and_steps_equal_those_of_the_engine() -> None:
    """At T = 1 with a seed: the same tokens as the engine, and the same steps, with and without coupled beams."""
    prompts = [[5, 17, 33, 8, 90, 41, 41, 12], [3, 9, 77]]
    torch.manual_seed(1)
    drafter = Drafter(drafter_config())
    backend = TorchBackend(make_target(make_model(), (0, 2)), copy.deepcopy(drafter), 200, eos_ids=[])
    AttentionInterface.register(ATTENTION, attend)
    target = TrainingTarget(make_model(attention=ATTENTION), (0, 2))
    keys = noise_keys(7, 2)
    settings = WritingConfig(max_new=40, temperature=0.8, drop_loops=False)
    written = Writer(target, set(), cache_tokens=200).write([np.array(p) for p in prompts], settings, keys)
    evaluation = Evaluation(target, drafter)
    taken = {}
    for coupled in (True, False):
        shape = DecodeConfig(beam_width=6, branching=6, draft_length=4, tree_size=24, seed_coupled=coupled)
        found = []
        for row, prompt in enumerate(prompts):
            params = SamplingParams(max_new_tokens=40, temperature=0.8, seed=7 + row)
            found.append(run(Engine(backend, shape), prompt, params))
        assert [ids for ids, _ in found] == [t.tokens.tolist() for t in sorted(written, key=lambda t: t.row)]
        texts = [AnswerText(np.array(p + ids), len(p)) for p, (ids, _) in zip(prompts, found, strict=True)]
        walk = Walk(shape, rows=16, coupling=Coupling(0.8, keys) if coupled else None)
        lengths = evaluation.lengths(texts, evaluation.contexts(texts), walk).lengths
        taken[coupled] = [steps(x[:, -1]) for x in lengths]
        assert taken[coupled] == [statistics.steps for _, statistics in found]
    assert sum(taken[True]) < sum(taken[False])


def test_a_drafter_that_knows_nothing_makes_one_token_per_step_and_tables_say_so(
    model_folder: Path, target: TrainingTarget, tiny_drafter: Drafter
) -> None:
    prompts = [Prompt([{"role": "user", "content": f"w{i} w{i + 2}"}], "c") for i in range(5)]
    texts = write_answers(target, AutoTokenizer.from_pretrained(model_folder), prompts, EvalOptions(max_new=20))
    assert len(texts) == 5 and all(isinstance(t, AnswerText) and 1 <= len(t.tokens) - t.start <= 20 for t in texts)
    evaluation = Evaluation(target, tiny_drafter)
    contexts = evaluation.contexts(texts, batch_tokens=64)
    shape = DecodeConfig(beam_width=4, branching=4, draft_length=4, tree_size=16)
    measured = evaluation.lengths(texts, contexts, Walk(shape, rows=7))
    lengths = measured.lengths
    assert 0 < measured.merged < 1
    assert [len(x) for x in lengths] == [len(t.tokens) - t.start for t in texts]
    found = table(texts, lengths, (1, 16))
    assert found["1"]["tokens_per_step"] == 1
    assert 1 <= found["16"]["tokens_per_step"] < 3


def test_merged_share_equals_a_count_of_distinct_prefixes() -> None:
    for seed in range(5):
        beams = random_beams(seed)._replace(final=torch.tensor([[5, 6]]))  # 0 -> 2 -> 5 and 1 -> 4 -> ..
        distinct = set()
        for slot in beams.final[0].tolist():
            while slot >= 0:
                distinct.add(slot)
                slot = int(beams.parent[0, slot])
        assert merged_share(beams).item() == pytest.approx(1 - len(distinct) / 6)


def test_acceptance_counts_steps_that_came_that_far() -> None:
    # Steps at tokens 0 (2 accepted), 3 (0 accepted) and 4 (1 accepted).
    lengths = [np.array([[2], [9], [9], [0], [1], [9]])]
    assert acceptance(lengths, 3) == [0.6667, 0.5, 0.0]
