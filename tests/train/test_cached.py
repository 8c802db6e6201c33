"""Hidden states on disk: the losses of those computed on line, whole or refused, and no pass through the layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from redrafter.errors import CorruptModel, InvalidRequest
from redrafter.files import sha256
from redrafter.train import cached
from redrafter.train.plan import estimate
from redrafter.train.run import Run
from redrafter.train.samples import Samples
from redrafter.train.settings import make_settings
from redrafter.train.target import OpenModel, TrainingTarget
from tests.model_folders import flip_bit
from tests.train.crashes import SMALL
from tests.train.test_run import QUIET, make_run


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def cached_run(model: Path, data: Path, out: Path, states: Path, **changes: Any) -> Run:
    return make_run(model, data, out, QUIET._replace(cached=states, log_every=1), **changes)


def test_cached_states_give_the_losses_of_states_on_line(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(cached, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(cached, "BATCH_TOKENS", 200)
    make_run(model_folder, data, tmp_path / "online", QUIET._replace(log_every=1)).fit()
    states = tmp_path / "states"
    cached_run(model_folder, data, tmp_path / "a", states).fit()
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "online"), rel=0.02)
    assert losses(tmp_path / "a") != losses(tmp_path / "online"), "bfloat16 is not float32"
    shards = sorted(states.glob("states-*"))
    assert len(shards) > 2
    plan = estimate(OpenModel(str(model_folder), "cpu", "float32"), Samples([data]), make_settings(SMALL))
    told = plan["cached_states_bytes"]
    assert told < sum(path.stat().st_size for path in shards) < told + 200 * len(shards)

    # A second run passes nothing but the held-out texts through the target.
    real, widths = TrainingTarget.features, []

    def counting(self: TrainingTarget, tokens: Any) -> Any:
        widths.append(len(tokens))
        return real(self, tokens)

    monkeypatch.setattr(TrainingTarget, "features", counting)
    before = {path: sha256(path) for path in shards}
    cached_run(model_folder, data, tmp_path / "b", states).fit()
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    assert max(widths) <= SMALL["eval_texts"], "a training batch has more rows"
    assert {path: sha256(path) for path in shards} == before


def test_an_interrupted_cache_goes_on_and_a_damaged_or_foreign_one_is_refused(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(cached, "SHARD_BYTES", 100_000)
    states = tmp_path / "states"
    real, calls = cached._states, 0

    def dying(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ZeroDivisionError
        return real(*args)

    monkeypatch.setattr(cached, "_states", dying)
    with pytest.raises(ZeroDivisionError):
        cached_run(model_folder, data, tmp_path / "a", states).fit()
    assert len(json.loads((states / "manifest.json").read_text())["shards"]) == 2
    cached_run(model_folder, data, tmp_path / "a", states).fit()
    names = sorted(path.name for path in states.glob("states-*"))
    assert names == sorted(json.loads((states / "manifest.json").read_text())["shards"]) and len(names) > 2
    assert calls == len(names) + 1, "no shard is written twice"

    with pytest.raises(InvalidRequest, match=r"holds hidden states of row_length"):
        cached_run(model_folder, data, tmp_path / "c", states, row_length=30).fit()
    with pytest.raises(InvalidRequest, match="was begun with cached=True"):
        make_run(model_folder, data, tmp_path / "a")
    flip_bit(states / names[1], -5)
    with pytest.raises(CorruptModel, match=names[1]):
        cached_run(model_folder, data, tmp_path / "d", states).fit()
