"""The drafter on MLX: torch's numbers from torch's files, and the reference's cases through Apple's layout."""
# ruff: noqa: E402 - nothing below may be imported where MLX is absent

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed: pip install 'redrafter[mlx]'")

import mlx.nn as nn
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from redrafter.algorithm.beam import Reading, beam_tokens, draft
from redrafter.algorithm.tree import keep_final_beams, pack
from redrafter.backends.mlx.drafter import load_drafter
from redrafter.backends.mlx.drafting import MLXDrafter
from redrafter.backends.mlx.load import bind, head_of
from redrafter.backends.mlx.ops import MLXOps
from redrafter.backends.torch.checkpoint import save_drafter
from redrafter.backends.torch.drafter import CELLS, HEADS, Drafter, DrafterConfig
from redrafter.backends.torch.drafting import TorchDrafter
from redrafter.errors import CorruptModel
from redrafter.params import DecodeConfig
from tests.mlx_backend.tiny import open_target, write_drafter, write_model, write_quantised

V, D, ROWS, TEXT = 29, 16, 3, 40
TRUNKS = [{}, {"trunk_layers": 1}, {"trunk_layers": 2, "trunk_heads": 4, "trunk_kv_heads": 2, "trunk_window": 9}]
VARIANTS = [
    {"cell": cell, "head": head, "feature_layers": layers, **trunk}
    for cell, head, layers, trunk in itertools.product(CELLS, HEADS, [(), (0, 2)], TRUNKS)
] + [
    {"cell": "rnn", "state_size": 24},
    {"cell": "gru", "context_state": True, "trunk_layers": 1, "trunk_heads": 4},
    {"cell": "gru", "state_size": 8, "exit_dim": 20, "num_blocks": 0, "feature_layers": (1,)},
    {"cell": "gru", "draft_vocabulary": 11, "trunk_layers": 1, "trunk_heads": 2},
    {"cell": "gru", "head": "tied", "draft_vocabulary": 11},
    {"cell": "gru", "head": "tied", "width": 8, "context_state": True, "trunk_layers": 1, "trunk_heads": 2},
    *({"cell": cell, "width": 8} for cell in CELLS),
]
CASES_FOLDER = Path(__file__).parents[3] / "shared" / "conformance"


def write(folder: Path, variant: dict) -> Drafter:
    torch.manual_seed(3)
    config = DrafterConfig(vocab_size=V, hidden_size=D, num_target_layers=4, draft_length=4, **variant)
    drafter = Drafter(config)
    if config.draft_vocabulary:
        drafter.token_ids.copy_(torch.randperm(V)[: config.draft_vocabulary])
    for parameter in drafter.parameters():  # larger than the usual start, so that every part shows in the logits
        parameter.data.mul_(2)
    save_drafter(drafter, folder, {})
    return drafter


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_logits_are_torch_s_at_every_depth(variant: dict, tmp_path: Path) -> None:
    """Two readings, so that the second looks at the trunk's stored keys, then three drafted tokens in two beams."""
    theirs = write(tmp_path, variant)
    ours, token_ids = load_drafter(tmp_path)
    torch.manual_seed(4)
    embedding = torch.randn(V, D)
    features, tokens = torch.randn(ROWS, TEXT, theirs.config.feature_size), torch.randint(V, (ROWS, TEXT))
    rows = embedding[theirs.token_ids]
    embedding_mlx, rows_mlx = mx.array(embedding.numpy()), mx.array(rows.numpy())
    tied = theirs.config.head == "tied"
    t = TorchDrafter(theirs, lambda ids: embedding[ids], (lambda x: x @ rows.T) if tied else theirs.head)
    m = MLXDrafter(ours, lambda i: embedding_mlx[i], (lambda x: x @ rows_mlx.T) if tied else ours.head, token_ids)
    assert (t.token_ids is None) == (m.token_ids is None)
    if t.token_ids is not None:
        assert m.token_ids.tolist() == t.token_ids.tolist()
    t.allocate(ROWS, TEXT)
    m.allocate(ROWS, TEXT)

    def mlx(reading: Reading) -> Reading:
        return Reading(*(mx.array(x.numpy()) for x in reading))

    zero, count = torch.zeros(ROWS, dtype=torch.int64), torch.tensor([30, 31, 32])
    first = Reading(features[:, :32], tokens[:, :32], zero, count)
    start = count[:, None] + torch.arange(5)
    row = torch.arange(ROWS)[:, None]
    second = Reading(features[row, start], tokens[row, start], count, torch.tensor([5, 1, 3]))
    t.read(first)
    m.read(mlx(first))
    a, b = t.begin(second), m.begin(mlx(second))
    assert_close(b, a, m, t)
    for beams in ([[0, 0]] * ROWS, [[1, 0]] * ROWS, [[1, 1]] * ROWS):
        beam, token = torch.tensor(beams), torch.randint(V, (ROWS, 2))
        a, b = t.extend(a, beam, token), m.extend(b, mx.array(beam.numpy()), mx.array(token.numpy()))
        assert_close(b, a, m, t)


@torch.no_grad()
@pytest.mark.parametrize(("cell", "width", "quantised"), [("gru", 0, False), ("rnn", 16, False), ("gru", 16, True)])
def test_folding_and_a_table_change_no_draft(cell: str, width: int, quantised: bool, tmp_path: Path) -> None:
    """A quantised head stays as it is: its rows are fewer bytes than the product. The table has a row per token."""
    model = write_model(tmp_path / "model", "llama")
    if quantised:
        model = write_quantised(tmp_path / "quantised", model)
    where = write_drafter(tmp_path / "drafter", cell=cell, width=width, draft_vocabulary=40)
    target = open_target(model)
    drafter, token_ids = load_drafter(where)
    plain = MLXDrafter(drafter, target.embed, head_of(target.head, token_ids), token_ids)
    bound = bind(target, *load_drafter(where))
    assert isinstance(bound.drafter.exit, nn.Identity) != quantised
    torch.manual_seed(4)
    tokens = mx.array(torch.randint(96, (4, 10)).numpy())
    first = mx.zeros(4, dtype=mx.int32)
    reading = Reading(mx.array(torch.randn(4, 10, 96).numpy()), tokens, first, first + 10)
    shape = DecodeConfig(beam_width=4, branching=4, draft_length=4, tree_size=24)
    found = []
    tabled = bind(target, *load_drafter(where), table=True)
    assert plain._table is bound._table is None and tabled._table.shape[0] == target.vocab_size
    for worker in (plain, bound, tabled):
        worker.allocate(4, 32)
        found.append(draft(MLXOps(), worker, reading, tokens[:, -1], shape))
    for other in found[1:]:
        assert other.tokens.tolist() == found[0].tokens.tolist()
        np.testing.assert_allclose(np.array(other.score), np.array(found[0].score), atol=1e-4)


def assert_close(ours, theirs, m: MLXDrafter, t: TorchDrafter) -> None:
    expected = t.logits(theirs)
    assert expected.std() > 0.05
    # Rounding errors are as large as the largest summand makes them.
    tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
    np.testing.assert_allclose(np.array(m.logits(ours)), expected.numpy(), rtol=0, atol=tolerance)


def damage_weight(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(data))


def drop_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def rewrite(change) -> object:
    """Other tensors under a manifest that fits them."""

    def damage(folder: Path) -> None:
        from redrafter.files import sha256

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        manifest = json.loads((folder / "manifest.json").read_text())
        path = folder / "model.safetensors"
        manifest["files"]["model.safetensors"] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_weight, "SHA-256 is not the manifest's"),
        (drop_manifest, "manifest.json is missing"),
        (rewrite(lambda t: t.pop("gru_u.bias")), "gru_u"),
        (rewrite(lambda t: t.update(more=torch.zeros(1))), "more"),
        (rewrite(lambda t: t.update({"gru_u.bias": torch.zeros(2)})), "gru_u.bias"),
        (rewrite(lambda t: t["gru_u.bias"].fill_(torch.nan)), "gru_u.bias holds numbers that are not finite"),
        (rewrite(lambda t: t.update({"gru_u.bias": t["gru_u.bias"].half()})), "weights of type"),
        (rewrite(lambda t: t["token_ids"].fill_(3)), "distinct token ids"),
        (rewrite(lambda t: t["token_ids"].add_(V)), "below vocab_size=29"),
        (rewrite(lambda t: t.pop("token_ids")), "distinct token ids"),
    ],
)
def test_damaged_files_are_named(damage, message: str, tmp_path: Path) -> None:
    write(tmp_path, {"cell": "gru", "draft_vocabulary": 11})
    load_drafter(tmp_path)
    damage(tmp_path)
    with pytest.raises(CorruptModel, match=message) as raised:
        load_drafter(tmp_path)
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.skipif(not CASES_FOLDER.is_dir(), reason="the reference's cases (../shared/conformance) are absent")
@pytest.mark.parametrize(("index", "case_index"), [(d, c) for d in range(4) for c in range(6)])
def test_the_reference_s_beams_and_packed_tokens(index: int, case_index: int, tmp_path: Path) -> None:
    listed = json.loads((CASES_FOLDER / "reference_cases.json").read_text())[index]
    tensors = load_file(CASES_FOLDER / "reference_cases.safetensors")
    config = {k: listed[k] for k in ("exit_dim", "num_draft_layers", "rnn")}
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": listed["hidden"]}))
    prefix = f"{listed['name']}.weights."
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    save_file(weights, tmp_path / "model.safetensors")
    drafter, token_ids = load_drafter(tmp_path)
    embedding = mx.array(tensors[f"{listed['name']}.embedding"].numpy())
    prefix = f"{listed['name']}.case{case_index}."
    case = SimpleNamespace(**{k.removeprefix(prefix): v.numpy() for k, v in tensors.items() if k.startswith(prefix)})
    settings = listed["cases"][case_index]
    ops, root = MLXOps(), mx.array(case.root)
    shape = SimpleNamespace(
        beam_width=settings["width"], branching=listed["vocab"], draft_length=settings["draft_length"], prompt_lookup=0
    )
    ones = mx.ones_like(root)
    reading = Reading(mx.array(case.context)[:, None], root[:, None], 7 * ones, ones)
    beams = draft(ops, MLXDrafter(drafter, lambda ids: embedding[ids], drafter.head, token_ids), reading, root, shape)
    tokens, scores = beam_tokens(ops, beams)
    expected = case.token_log_probs.cumsum(-1)
    np.testing.assert_allclose(np.array(scores)[:, :, -1], expected[:, :, -1], atol=1e-5, rtol=0)
    for row in range(tokens.shape[0]):
        assert {tuple(b) for b in tokens[row].tolist()} == {tuple(b) for b in case.beams[row, :, 1:].tolist()}
    tree = pack(ops, keep_final_beams(ops, beams), root, 1 + settings["width"] * settings["draft_length"])
    assert ops.sum(tree.live).tolist() == case.packed_count.tolist()
