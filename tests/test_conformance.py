"""Our drafter, beam search, tree and acceptance against cases produced by the reference implementation (float32)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from redrafter.algorithm.accept import Choice, accept
from redrafter.algorithm.beam import Reading, beam_tokens, draft
from redrafter.algorithm.tree import TokenTree, keep_final_beams, pack, unmerged_tokens
from redrafter.backends.torch.checkpoint import load_apple
from redrafter.backends.torch.drafting import TorchDrafter
from redrafter.backends.torch.ops import TorchOps

FOLDER = Path(__file__).parents[2] / "shared" / "conformance"
CASES = [(d, c) for d in range(4) for c in range(6)]
OPS = TorchOps()
ROUNDING = 1e-5

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the reference's cases (../shared/conformance) are absent")


@pytest.fixture(scope="module")
def reference():
    return json.loads((FOLDER / "reference_cases.json").read_text()), load_file(FOLDER / "reference_cases.safetensors")


def load_drafter(reference, index: int, folder: Path) -> TorchDrafter:
    """Through the files, so that the Apple layout is part of what is checked."""
    listed, tensors = reference
    prefix = f"{listed[index]['name']}.weights."
    config = {k: listed[index][k] for k in ("exit_dim", "num_draft_layers", "rnn")}
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": listed[index]["hidden"]}))
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    save_file(weights, folder / "model.safetensors")
    drafter = load_apple(folder)
    embedding = tensors[f"{listed[index]['name']}.embedding"]
    return TorchDrafter(drafter, lambda ids: embedding[ids], drafter.head)


def run_case(reference, drafter_index: int, case_index: int, folder: Path):
    listed, tensors = reference
    settings = listed[drafter_index]["cases"][case_index]
    prefix = f"{listed[drafter_index]['name']}.case{case_index}."
    case = SimpleNamespace(**{k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    vocab = listed[drafter_index]["vocab"]
    # Every child of every beam is scored, as the reference does.
    shape = SimpleNamespace(
        beam_width=settings["width"], branching=vocab, draft_length=settings["draft_length"], prompt_lookup=0
    )
    ones = torch.ones_like(case.root)
    reading = Reading(case.context[:, None], case.root[:, None], first=7 * ones, count=ones)
    with torch.no_grad():
        beams = draft(OPS, load_drafter(reference, drafter_index, folder), reading, case.root, shape)
    paper = keep_final_beams(OPS, beams)
    tree = pack(OPS, paper, case.root, 1 + settings["width"] * settings["draft_length"])
    return case, settings, beams, tree


def path_of(tokens, ancestors) -> tuple[int, ...]:
    """The tokens of the nodes that a node attends to, in the order of the list (parents stand first)."""
    return tuple(tokens[j] for j, seen in enumerate(ancestors) if seen)


def paths(tokens, depth, mask, nodes) -> set[tuple[tuple[int, ...], int]]:
    return {(path_of(tokens.tolist(), mask[i].tolist()), int(depth[i])) for i in nodes}


@torch.no_grad()
@pytest.mark.parametrize(("drafter_index", "case_index"), CASES)
def test_beams_and_log_probabilities(reference, drafter_index, case_index, tmp_path):
    case, settings, beams, _ = run_case(reference, drafter_index, case_index, tmp_path)
    tokens, scores = beam_tokens(OPS, beams)
    assert settings["draft_length"] == case.beams.shape[2] - 1  # the reference counts the root
    assert tokens.shape == case.beams[:, :, 1:].shape
    expected = case.token_log_probs.cumsum(-1)
    torch.testing.assert_close(scores[:, :, -1], expected[:, :, -1], atol=ROUNDING, rtol=0)
    for row in range(tokens.shape[0]):
        ours = {tuple(b): s for b, s in zip(tokens[row].tolist(), scores[row], strict=True)}
        theirs = {tuple(b): s for b, s in zip(case.beams[row, :, 1:].tolist(), expected[row], strict=True)}
        assert set(ours) == set(theirs)
        for beam, score in theirs.items():  # sums of log-probabilities at every depth, hence every token's
            torch.testing.assert_close(ours[beam], score, atol=ROUNDING, rtol=0)
        final = expected[row, :, -1]
        for w, (a, b) in enumerate(zip(tokens[row].tolist(), case.beams[row, :, 1:].tolist(), strict=True)):
            tied = ((final - final[w]).abs() < 2 * ROUNDING).sum() > 1
            assert a == b or tied, f"beam {w} of row {row} is out of order"


@pytest.mark.parametrize(("drafter_index", "case_index"), CASES)
def test_packed_tree(reference, drafter_index, case_index, tmp_path):
    case, settings, _, tree = run_case(reference, drafter_index, case_index, tmp_path)
    assert torch.equal(tree.live.sum(1), case.packed_count)
    # The reference would verify every beam in full when it does not merge.
    assert bool((unmerged_tokens(OPS, tree) == settings["width"] * (settings["draft_length"] + 1)).all())
    for row in range(case.root.shape[0]):
        live = tree.live[row].nonzero().flatten().tolist()
        ours = paths(tree.tokens[row], tree.depth[row], tree.mask[row], live)
        count = int(case.packed_count[row])
        mask = case.packed_mask[row, :count, :count]
        assert ours == paths(case.packed_tokens[row], case.packed_depth[row], mask, range(count))
        for node in live:
            assert int(tree.mask[row, node].sum()) == int(tree.depth[row, node]) + 1


def chosen_by_path(case, row: int) -> dict[tuple[int, ...], int]:
    """The reference gives the target's choice per beam slot; it depends on the prefix only."""
    table: dict[tuple[int, ...], int] = {}
    for beam, chosen in zip(case.beams[row].tolist(), case.chosen[row].tolist(), strict=True):
        for slot, token in enumerate(chosen):
            assert table.setdefault(tuple(beam[: slot + 1]), token) == token
    return table


def choose_by_table(case, tree: TokenTree) -> Choice:
    token = torch.zeros_like(tree.tokens)
    for row in range(tree.tokens.shape[0]):
        table = chosen_by_path(case, row)
        for node in tree.live[row].nonzero().flatten().tolist():
            token[row, node] = table[path_of(tree.tokens[row].tolist(), tree.mask[row, node].tolist())]
    return Choice(token, torch.ones_like(tree.live))


@pytest.mark.parametrize(("drafter_index", "case_index"), CASES)
def test_accepted_length(reference, drafter_index, case_index, tmp_path):
    case, settings, _, tree = run_case(reference, drafter_index, case_index, tmp_path)
    accepted = accept(OPS, tree, choose_by_table(case, tree), settings["draft_length"] + 1)
    assert torch.equal(accepted.length, case.accepted_length)
    for row, length in enumerate(accepted.length.tolist()):
        beam = case.beams[row, int(case.accepted_beam[row])].tolist()
        chosen = case.chosen[row, int(case.accepted_beam[row])].tolist()
        assert accepted.tokens[row, : length + 1].tolist() == [*beam[1 : length + 1], chosen[length]]
        assert int(accepted.bonus[row]) == chosen[length]


def test_the_cases_exercise_acceptance(reference):
    """Cases that never accept anything, or never differ, would prove little."""
    _, tensors = reference
    lengths = torch.cat([v for k, v in tensors.items() if k.endswith("accepted_length")])
    assert len(lengths) >= 24
    assert lengths.unique().numel() >= 3
