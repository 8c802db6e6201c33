"""Offsets against a loop over single anchors, gradients against autograd, and a drafter that learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from redrafter.algorithm.beam import Reading, draft
from redrafter.backends.torch.drafter import Drafter
from redrafter.backends.torch.drafting import TorchDrafter
from redrafter.backends.torch.ops import TorchOps
from redrafter.errors import CorruptModel, InvalidRequest
from redrafter.files import sha256
from redrafter.params import DecodeConfig
from redrafter.train.losses import HeadLoss, Teaching, chunk_loss, survival_weights, teach
from redrafter.train.samples import Loader, Samples, ShardWriter, frequent_tokens, make_batch, write_manifest
from redrafter.train.target import TrainingTarget
from redrafter.train.trainer import Distiller, unroll
from redrafter.train.writing import Writer, WritingConfig
from tests.model_folders import flip_bit

DEPTHS = 4


def texts_of(target: TrainingTarget, count: int, length: int) -> list[np.ndarray]:
    prompts = [np.random.default_rng(i).integers(1, 64, 4) for i in range(count)]
    writer = Writer(target, {0}, cache_tokens=count * (4 + length))
    settings = WritingConfig(max_new=length, temperature=0.7, drop_loops=False)
    return [np.concatenate([prompts[t.row], t.tokens]) for t in writer.write(prompts, settings)]


def test_anchors_and_teachers_equal_a_loop_over_single_anchors(target: TrainingTarget, tiny_drafter: Drafter) -> None:
    rng = np.random.default_rng(0)
    texts, starts = [rng.integers(0, 64, n) for n in (12, 7, 9, 6)], [4, 5, 3, 5]
    drafter = tiny_drafter
    distiller = Distiller(target, drafter, HeadLoss("kl", 0.0, 3.0, 8, False), 0.1)
    batch = make_batch(texts, starts, DEPTHS, chunk=8)
    tokens, taught, anchor, teacher, depths = (torch.from_numpy(x) for x in batch[:5])
    features = target.features(tokens)
    context = distiller.context(features, tokens).flatten(0, 1)[anchor]
    teaching = teach(features[..., :32].flatten(0, 1)[taught], distiller.teacher_head, 40)
    seen = {}
    for level in unroll(drafter, context, target.embedding, tokens.flatten(), anchor, depths):
        for i in level.exists_A.nonzero()[:, 0].tolist():
            position = divmod(int(anchor[i]), tokens.shape[1])
            row = int(teacher[i]) + level.depth - 1
            seen[(*position, level.depth)] = (level.exit_AD[i], teaching.probability[row])
    expected = 0
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        ids = torch.from_numpy(text)
        logits = target.hidden(ids[None], torch.arange(len(ids))[None])[0] @ target.head.T
        for root in range(start - 1, len(text) - 1):  # the root's index; the anchor is the pair before it
            pairs = target.features(ids[None, :root])
            position = torch.arange(root)[None]
            c = drafter.context(pairs, target.embedding[ids[None, 1 : root + 1]], position)[0, -1]
            state = drafter.first_state(c, target.embedding[ids[root]])
            for depth in range(1, min(DEPTHS, len(text) - 1 - root) + 1):
                if depth > 1:
                    state = drafter.next_state(state, target.embedding[ids[root + depth - 1]], depth - 1)
                exit_hidden, probability = seen[(row, root - 1, depth)]
                assert torch.allclose(exit_hidden, drafter.exit_hidden(c, state), atol=1e-4)
                # What teaches depth k is the target's law of the token k after the root.
                law = logits[root + depth - 1].softmax(-1)[drafter.token_ids]
                assert torch.allclose(probability, law, atol=1e-5)
                expected += 1
    assert len(seen) == expected > 30


def test_unrolled_chain_equals_beam_search_of_width_one(target: TrainingTarget, tiny_drafter: Drafter) -> None:
    drafter = tiny_drafter.requires_grad_(False)
    text = torch.from_numpy(texts_of(target, 1, 12)[0][:10])
    worker = TorchDrafter(drafter, lambda ids: target.embedding[ids], lambda x: x @ target.head[drafter.token_ids].T)
    worker.allocate(1, 32)
    pairs = len(text) - 1
    first = torch.zeros(1, dtype=torch.int64)
    reading = Reading(target.features(text[None, :-1]), text[None, 1:], first, first + pairs)
    shape = DecodeConfig(beam_width=1, branching=1, draft_length=DEPTHS, tree_size=DEPTHS + 1)
    beams = draft(TorchOps(), worker, reading, text[-1:], shape)
    drafted = torch.cat([text, beams.tokens[0]])
    features = target.features(drafted[None])
    distiller = Distiller(target, drafter, HeadLoss("kl", 0.0, 3.0, 8, False), 0.1)
    anchor = torch.tensor([pairs - 1])
    context = distiller.context(features, drafted[None])[0, anchor]
    score = 0.0
    for level in unroll(drafter, context, target.embedding, drafted, anchor, torch.tensor([DEPTHS])):
        log_q = (level.exit_AD[0] @ target.head[drafter.token_ids].T).log_softmax(-1)
        assert drafter.token_ids[log_q.argmax()] == drafted[pairs + level.depth]
        score += float(log_q.max())
        assert beams.score[0, level.depth - 1] == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize(("share", "soft_ce"), [(1.0, (1.0, 0.0)), (0.3, (1.0, 0.2)), (1.0, (0.0, 1.0))])
def test_gradient_equals_autograd(share: float, soft_ce: tuple[float, float]) -> None:
    torch.manual_seed(0)
    z = torch.randn(6, 20, requires_grad=True)
    p = (torch.randn(6, 30) * 2).softmax(-1)[:, :20]
    choice, weight = torch.tensor([0, 5, -1, 19, 7, -1]), torch.rand(6)
    out = chunk_loss(z, p, choice, weight, torch.tensor(share), soft_ce)
    q = z.softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1)
    ce = torch.where(choice >= 0, -q.log().gather(1, choice.clamp(min=0)[:, None])[:, 0], 0.0)
    far = 1 - torch.minimum(p, q).sum(-1)
    loss = (weight * (soft_ce[0] * (share * kl + (1 - share) * far) + soft_ce[1] * ce)).sum()
    loss.backward()
    assert torch.allclose(out.loss, loss, atol=1e-5)
    assert torch.allclose(out.gradient, z.grad, atol=1e-6)


@pytest.mark.parametrize("kind", ["kl", "tv", "mix", "ce"])
def test_head_loss_does_not_depend_on_the_chunk(kind: str) -> None:
    torch.manual_seed(0)
    head, exit_hidden = torch.randn(20, 8), torch.randn(12, 8)
    teaching = Teaching(torch.randn(15, 20).softmax(-1), torch.randint(0, 20, (15,)))
    row, weight = torch.arange(12) + 2, torch.rand(12)
    results = []
    for chunk in (4, 12):
        x = exit_hidden.clone().requires_grad_(True)
        loss = HeadLoss(kind, 0.1, 3.0, chunk, False)
        value, overlap, _ = loss(x, head, teaching, row, weight, loss.kl_share(torch.tensor(0.4)))
        value.backward()
        results.append((value.detach(), overlap, x.grad))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))
    assert results[0][2].abs().sum() > 0


def test_survival_weights_are_the_gradient_of_the_expected_length() -> None:
    a = torch.tensor([0.7, 0.5, 0.4], requires_grad=True)
    expected = torch.autograd.grad(torch.cumprod(a, 0).sum(), a)[0] * a.detach()  # per relative change of a
    got = survival_weights(a.detach(), 0.0)
    assert torch.allclose(got, expected / expected.sum(), atol=1e-6)


def test_an_own_head_gets_the_gradient_of_autograd() -> None:
    torch.manual_seed(0)
    head, exit_hidden = torch.randn(20, 8, requires_grad=True), torch.randn(12, 8)
    teaching = Teaching(torch.randn(15, 20).softmax(-1), torch.randint(0, 20, (15,)))
    row, weight = torch.arange(12) + 2, torch.rand(12)
    loss = HeadLoss("kl", 0.0, 1.0, 5, False)
    loss(exit_hidden, head, teaching, row, weight, torch.tensor(1.0))[0].backward()
    got, head.grad = head.grad, None
    p = teaching.probability[row]
    kl = (p * (p.log() - (exit_hidden @ head.T).log_softmax(-1))).sum(-1)
    (weight * kl).sum().backward()
    assert torch.allclose(got, head.grad, atol=1e-5)


def test_cross_entropy_learns_the_labels_of_the_text(target: TrainingTarget, tiny_drafter: Drafter) -> None:
    text = np.random.default_rng(0).integers(0, 64, 12)
    distiller = Distiller(target, tiny_drafter, HeadLoss("ce", 0.0, 1.0, 8, False), 0.1)
    batch = make_batch([text], [4], DEPTHS, chunk=8)
    tokens, taught = torch.from_numpy(batch.tokens), torch.from_numpy(batch.taught)
    choice = distiller.teach(target.features(tokens), tokens.flatten(), taught).choice
    for position, index in zip(taught.tolist(), choice.tolist(), strict=True):
        following = int(text[position + 1])
        known = following in tiny_drafter.token_ids.tolist()
        assert (int(tiny_drafter.token_ids[index]) == following) if known else index == -1


def test_frequent_tokens_are_sorted_and_counted_in_answers_only(tmp_path: Path) -> None:
    writer = ShardWriter(64)
    writer.add(np.array([9, 9, 9]), np.array([5, 5, 6]), sampled=False, ended=True, heldout=False)
    writer.add(np.array([9]), np.array([7, 7, 7, 7]), sampled=False, ended=True, heldout=True)
    writer.write(tmp_path / "shard-00000.safetensors", {})
    with pytest.raises(InvalidRequest, match="it is no data folder"):
        Samples([tmp_path])
    write_manifest(tmp_path, {"shard-00000.safetensors": sha256(tmp_path / "shard-00000.safetensors")}, {})
    samples = Samples([tmp_path])
    assert frequent_tokens(samples.token_counts(64, heldout=False), 3).tolist() == [5, 6, 0]
    assert frequent_tokens(samples.token_counts(64, heldout=True), 1).tolist() == [7]
    flip_bit(tmp_path / "shard-00000.safetensors", -1)
    with pytest.raises(CorruptModel, match="was changed"):
        Samples([tmp_path])


def test_an_epoch_holds_every_training_sample_once(data: Path) -> None:
    samples = Samples([data])
    loader = Loader(samples, 512, 500, seed=1)
    count = loader.epoch_batches
    rows = [loader.rows(n)[0] for n in range(2 * count)]
    wanted = sorted(samples.text(i).tobytes() for i in range(len(samples)) if not samples.heldout[i])
    for epoch in (rows[:count], rows[count:]):
        assert sorted(t.tobytes() for texts in epoch for t in texts) == wanted
    assert all(len(t) * max(map(len, t)) <= 500 for t in rows)
    assert [t.tobytes() for t in rows[0]] != [t.tobytes() for t in rows[count]]
    again = Loader(samples, 512, 500, seed=1)
    number = count + 1
    assert [t.tobytes() for t in again.rows(number)[0]] == [t.tobytes() for t in rows[number]]
