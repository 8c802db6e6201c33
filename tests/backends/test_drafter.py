"""One forward serves training and decoding: whatever way the text was read, the logits are the training forward's."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from redrafter.algorithm.beam import Reading, draft
from redrafter.backends.torch.drafter import CELLS, HEADS, Drafter, DrafterConfig
from redrafter.backends.torch.drafting import TorchDrafter
from redrafter.backends.torch.ops import TorchOps
from redrafter.errors import CorruptModel
from redrafter.params import DecodeConfig

V, D, ROWS, TEXT = 29, 16, 3, 40
FEATURES = [(), (0, 2)]
TRUNKS = [
    {},
    {"trunk_layers": 1},
    {"trunk_layers": 1, "trunk_heads": 4},
    {"trunk_layers": 2, "trunk_heads": 4, "trunk_kv_heads": 2, "trunk_window": 9},
]
VARIANTS = [
    {"cell": cell, "head": head, "feature_layers": layers, **trunk}
    for cell, head, layers, trunk in itertools.product(CELLS, HEADS, FEATURES, TRUNKS)
] + [
    {"cell": "rnn", "state_size": 24},
    {"cell": "gru", "context_state": True, "trunk_layers": 1, "trunk_heads": 4},
    {"cell": "sum", "context_state": True},
    {"cell": "gru", "state_size": 8, "exit_dim": 20, "num_blocks": 0, "feature_layers": (1,)},
    {"cell": "rnn", "exit_dim": 40, "num_blocks": 3},
    {"cell": "gru", "draft_vocabulary": 11, "trunk_layers": 1, "trunk_heads": 2},
    {"cell": "gru", "head": "tied", "draft_vocabulary": 11},
    {"cell": "gru", "head": "tied", "width": 8, "context_state": True, "trunk_layers": 1, "trunk_heads": 2},
    {"cell": "gru", "width": 24, "feature_layers": (1,), "draft_vocabulary": 11, "exit_dim": 20},
    *({"cell": cell, "width": 8} for cell in CELLS),
]


def name_of(variant: dict) -> str:
    return "-".join(f"{v}" if k in ("cell", "head") else f"{k}={v}" for k, v in variant.items())


def build(variant: dict, dtype: torch.dtype = torch.float32) -> tuple[Drafter, torch.Tensor, TorchDrafter]:
    torch.manual_seed(3)
    drafter = Drafter(DrafterConfig(vocab_size=V, hidden_size=D, num_target_layers=4, draft_length=4, **variant)).to(
        dtype
    )
    if drafter.config.draft_vocabulary:
        drafter.token_ids.copy_(torch.randperm(V)[: drafter.config.draft_vocabulary])
    for parameter in drafter.parameters():  # larger than the usual start, so that every part shows in the logits
        parameter.data.mul_(2)
    embedding = torch.randn(V, D).to(dtype)
    output = embedding[drafter.token_ids].T
    head = drafter.head if drafter.config.head == "own" else lambda x: x @ output
    return drafter, embedding, TorchDrafter(drafter, lambda ids: embedding[ids], head)


def text(config: DrafterConfig, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    return torch.randn(ROWS, TEXT, config.feature_size).to(dtype), torch.randint(V, (ROWS, TEXT + 1))


def training_logits(drafter, embedding, head, features, tokens, depths: int) -> list[torch.Tensor]:
    """[B, T, V_d] for each depth k: pair t read, then tokens t + 2 .. t + k + 1 fed (teacher forcing)."""
    following = embedding[tokens[:, 1:]]
    position = torch.arange(TEXT).expand(ROWS, TEXT)
    context = drafter.context(features, following, position)
    state = drafter.first_state(context, following)
    out = [head(drafter.exit_hidden(context, state)).float()]
    for depth in range(1, depths):
        state = drafter.next_state(state[:, :-1], following[:, depth:], depth)
        out.append(head(drafter.exit_hidden(context[:, :-depth], state)).float())
    return out


def readings(features, tokens, seed: int):
    """The text cut at random into readings, each row by itself; pairs past a row's count repeat its last one. The
    second item says which pair is each row's last."""
    rng = random.Random(seed)
    done = [0] * ROWS
    while min(done) < TEXT - 4:
        most = rng.randint(1, 6)
        # A row that has reached the end reads its last pairs again, as an idle slot would.
        first = [min(d, TEXT - 1) for d in done]
        count = [min(rng.randint(1, most), TEXT - f) for f in first]
        index = torch.tensor([[f + min(i, c - 1) for i in range(most)] for f, c in zip(first, count, strict=True)])
        rows = torch.arange(ROWS)[:, None]
        done = [f + c for f, c in zip(first, count, strict=True)]
        yield (
            Reading(features[rows, index], tokens[rows, index + 1], torch.tensor(first), torch.tensor(count)),
            torch.tensor(done) - 1,
        )


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_decoding_is_the_training_forward(variant):
    drafter, embedding, decoder = build(variant)
    decoder.allocate(ROWS, TEXT + 1)
    features, tokens = text(drafter.config)
    expected = training_logits(drafter, embedding, decoder._head, features, tokens, 4)
    rows = torch.arange(ROWS)
    for reading, last in readings(features, tokens, seed=len(name_of(variant))):
        state = decoder.begin(reading)
        torch.testing.assert_close(decoder.logits(state)[:, 0], expected[0][rows, last], atol=3e-5, rtol=1e-5)
        beams = torch.zeros(ROWS, 3, dtype=torch.int64)
        for depth in range(1, 4):
            usable = last + depth < TEXT  # the training forward ends with the text
            fed = tokens[rows, (last + 1 + depth).clamp(max=TEXT)]
            # Three beams, of which the middle one follows the text.
            state = decoder.extend(state, beams, torch.stack([(fed + 1) % V, fed, (fed + 2) % V], 1))
            beams = torch.ones_like(beams)
            logits = decoder.logits(state)[:, 1]
            wanted = expected[depth][rows, last.clamp(max=TEXT - 1 - depth)]
            torch.testing.assert_close(logits[usable], wanted[usable], atol=3e-5, rtol=1e-5)


@torch.no_grad()
def test_the_window_is_what_limits_the_trunk():
    """A token inside the window changes the context and one outside it does not, in training and decoding alike."""
    drafter, embedding, decoder = build({"trunk_layers": 1, "trunk_heads": 4, "trunk_window": 9})
    features, tokens = text(drafter.config)
    before = training_logits(drafter, embedding, decoder._head, features, tokens, 1)[0]
    changed = features.clone()
    changed[:, 10] += 1
    difference = (training_logits(drafter, embedding, decoder._head, changed, tokens, 1)[0] - before).abs().amax((0, 2))
    assert bool((difference[:10] == 0).all()), "the trunk is causal"
    assert bool((difference[10:19] > 0).all())
    assert bool((difference[19:] == 0).all())


@torch.no_grad()
def test_rows_may_be_read_one_by_one_and_moved():
    """As the engine does: prefill a text into one row of the store, later move it to another."""
    drafter, embedding, decoder = build({"trunk_layers": 2, "trunk_heads": 4})
    decoder.allocate(ROWS, TEXT + 1)
    features, tokens = text(drafter.config)
    position = torch.arange(TEXT).expand(ROWS, TEXT)
    expected = drafter.context(features, embedding[tokens[:, 1:]], position)
    half = TEXT // 2
    for row in range(ROWS):
        one = slice(row, row + 1)
        zero, count = torch.tensor([0]), torch.tensor([half])
        context = decoder.read(Reading(features[one, :half], tokens[one, 1 : half + 1], zero, count), row)
        torch.testing.assert_close(context, expected[one, :half], atol=3e-5, rtol=1e-5)
    decoder.copy_prefix(2, 0, half)
    last = slice(2, 3)
    rest = Reading(features[last, half:], tokens[last, half + 1 :], torch.tensor([half]), torch.tensor([TEXT - half]))
    torch.testing.assert_close(decoder.read(rest, 0), expected[last, half:], atol=3e-5, rtol=1e-5)


def test_reading_without_room_is_a_programming_error():
    _, _, decoder = build({"trunk_layers": 1, "trunk_heads": 4})
    one = torch.ones(1, dtype=torch.int64)
    with pytest.raises(AssertionError, match="allocate"):
        decoder.read(Reading(torch.zeros(1, 1, D), one[:, None], one, one))


@torch.no_grad()
@pytest.mark.parametrize("kept", [0, 5])
@pytest.mark.parametrize("head", HEADS)
def test_drafts_come_from_the_draft_vocabulary(head, kept):
    drafter, embedding, full = build({"cell": "gru", "head": head, "draft_vocabulary": 11})
    cut = (lambda x: full._head(x)[..., :kept]) if kept else full._head
    decoder = TorchDrafter(drafter, lambda ids: embedding[ids], cut, vocabulary=kept)
    features, tokens = text(drafter.config)
    one = torch.ones(ROWS, dtype=torch.int64)
    reading = Reading(features[:, :1], tokens[:, 1:2], one, one)
    shape = DecodeConfig(beam_width=4, branching=20, draft_length=3)
    beams = draft(TorchOps(), decoder, reading, tokens[:, 1], shape)
    allowed = drafter.token_ids[: kept or None].tolist()
    assert set(beams.tokens.flatten().tolist()) == set(allowed)
    logits = decoder.logits(decoder.begin(reading))[:, 0]
    best = drafter.token_ids[logits.argmax(-1)]
    assert torch.equal(beams.tokens[:, 0], best), "the best child of the root stands first"


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_bf16_runs(variant):
    drafter, _, decoder = build(variant, torch.bfloat16)
    decoder.allocate(ROWS, TEXT + 1)
    features, tokens = text(drafter.config, torch.bfloat16)
    one = torch.ones(ROWS, dtype=torch.int64)
    reading = Reading(features, tokens[:, 1:], 0 * one, TEXT * one)
    beams = draft(TorchOps(), decoder, reading, tokens[:, -1], DecodeConfig(beam_width=3, draft_length=3))
    assert beams.score.dtype == torch.float32
    assert bool(torch.isfinite(beams.score).all())
    assert bool((beams.score < 0).all())


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_every_weight_is_used(variant):
    """A parameter without a gradient is dead weight in the checkpoint."""
    drafter, embedding, decoder = build(variant)
    features, tokens = text(drafter.config)
    sum(
        logits.square().mean() for logits in training_logits(drafter, embedding, decoder._head, features, tokens, 4)
    ).backward()
    unused = [n for n, p in drafter.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert unused == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cell": "lstm"}, "cell='lstm'"),
        ({"head": "shared"}, "head='shared'"),
        ({"cell": "sum", "state_size": 8}, "state_size=16"),
        ({"cell": "medusa", "state_size": 8}, "state_size=16"),
        ({"context_state": True, "state_size": 8}, "state_size=16"),
        ({"trunk_layers": 1, "trunk_heads": 3}, "trunk_heads=3"),
        ({"width": 12, "trunk_layers": 1, "trunk_heads": 4}, "width=12"),
        ({"width": 8, "context_state": True, "state_size": 16}, "state_size=8, the drafter's width"),
        ({"trunk_layers": 1, "trunk_heads": 4, "trunk_kv_heads": 3}, "trunk_kv_heads=3"),
        ({"draft_vocabulary": V + 1}, f"draft_vocabulary={V + 1}"),
        ({"feature_layers": (4,)}, "feature_layers"),
    ],
)
def test_impossible_configurations(wrong, message):
    with pytest.raises(CorruptModel, match=message):
        DrafterConfig(vocab_size=V, hidden_size=D, num_target_layers=4, **wrong)
