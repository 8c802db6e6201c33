"""Texts are what transformers would write; prompts and answers end up where they belong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from redrafter.errors import UnsupportedModel
from redrafter.train.chat import chat_frame
from redrafter.train.data import group_by_length
from redrafter.train.target import ATTENTION, TrainingTarget, attend
from redrafter.train.writing import Draw, Writer, WritingConfig, distinct_share, loops, pick
from tests.tiny import make_model


@pytest.mark.parametrize("lengths", [(5, 5, 5, 5), (3, 9, 6, 1)])
def test_greedy_texts_equal_generate(model_folder: Path, target: TrainingTarget, lengths: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, 64, n) for n in lengths]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    plain = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt)[None]
        mask = torch.ones_like(ids)
        plain.append(model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24)[0, len(prompt) :])
    # A token that ends only some of the texts, half-way, makes rows leave at different times.
    end = {0, int(plain[0][9])}
    settings = WritingConfig(max_new=24, check_every=4, drop_loops=False)
    texts = Writer(target, end, cache_tokens=400).write(prompts, settings)
    assert sorted(t.row for t in texts) == [0, 1, 2, 3]
    for text in texts:
        expected = plain[text.row].tolist()
        stop = min((i for i, t in enumerate(expected) if t in end), default=23)
        assert text.tokens.tolist() == expected[: stop + 1]
        assert text.ended == (expected[stop] in end)


def test_a_model_with_softcapped_attention_is_written_and_read_as_transformers_does() -> None:
    changes = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 1}
    plain, without = make_model("gemma2", "eager", **changes), make_model("gemma2", "eager", **changes)
    without.config.attn_logit_softcapping = None
    for layer in without.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    AttentionInterface.register(ATTENTION, attend)
    target = TrainingTarget(make_model("gemma2", ATTENTION, **changes))
    tokens = torch.from_numpy(np.random.default_rng(2).integers(3, 96, (3, 17)))
    expected = plain.model(tokens).last_hidden_state
    assert torch.allclose(target.features(tokens), expected, atol=1e-4)
    assert not torch.allclose(without.model(tokens).last_hidden_state, expected, atol=1e-2), "the cap does something"
    prompts = [tokens[0, :9].numpy(), tokens[1, :4].numpy()]
    config = WritingConfig(max_new=12, drop_loops=False)
    for text in Writer(target, {2}, cache_tokens=100).write(prompts, config):
        ids = torch.from_numpy(prompts[text.row])[None]
        made = plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert text.tokens.tolist() == made[0, ids.shape[1] :].tolist()


def test_pick_draws_from_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    hidden = torch.eye(1).expand(40_000, 1)
    counts = pick(hidden, logits[:, None], Draw(0.5, torch.Generator().manual_seed(0))).bincount(minlength=4) / 40_000
    assert torch.allclose(counts, torch.softmax(logits / 0.5, 0), atol=0.01)


def test_distinct_share_counts_four_grams() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, (5, 40))
    for row, share in zip(tokens, distinct_share(torch.from_numpy(tokens)).tolist(), strict=True):
        grams = [tuple(row[i : i + 4]) for i in range(37)]
        assert share == pytest.approx(len(set(grams)) / 37)
    assert loops(np.array([1, 2, 3] * 20)) and not loops(np.arange(60))


def test_looping_rows_stop_early(target: TrainingTarget) -> None:
    prompts = [np.array([1, 2, i]) for i in range(3, 11)]
    settings = WritingConfig(max_new=200, check_every=16)
    texts = Writer(target, {0}, cache_tokens=8 * 203).write(prompts, settings)
    stopped = [t for t in texts if t.looped]
    assert stopped, "a random model that is decoded greedily loops"
    assert all(96 <= len(t.tokens) < 200 and not t.ended for t in stopped)


def test_groups_hold_everyone_once_and_like_lengths_together() -> None:
    lengths = [3] * 50 + [4] * 5 + [5] * 5 + [9] * 30
    groups = group_by_length(lengths, lambda n: 16)
    assert sorted(np.concatenate(groups).tolist()) == list(range(90))
    assert max(len(g) for g in groups) == 16
    assert sum(len({lengths[i] for i in g}) == 1 for g in groups) >= 4


def test_frame_renders_what_the_template_renders(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    frame = chat_frame(tokenizer)
    message = [{"role": "user", "content": "w3 w4"}]
    assert frame.render(" w3 w4 ") == tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UnsupportedModel, match="2 times"):
        chat_frame(tokenizer)
