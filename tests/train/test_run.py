"""Runs: bit-exact resumption however they are interrupted, what stops them, and every variant of the drafter."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from redrafter.backends.torch.checkpoint import load_drafter, read_metadata
from redrafter.cli import main
from redrafter.errors import InvalidRequest, TrainingDiverged
from redrafter.files import sha256
from redrafter.load import known_shapes
from redrafter.train import plan as plans
from redrafter.train.conduct import Conduct
from redrafter.train.learner import Learner
from redrafter.train.plan import estimate
from redrafter.train.run import Run
from redrafter.train.samples import Samples
from redrafter.train.settings import default_layers, drafter_bytes, drafter_config, make_settings
from redrafter.train.target import OpenModel
from tests.model_folders import flip_bit
from tests.train.crashes import SMALL, command, environment, final, kill_at_random, kill_runs

ROOT = Path(__file__).resolve().parents[2]
QUIET = Conduct(save_every=2, log_every=5, quiet=True)


def make_run(model: Path, data: Path, out: Path, conduct: Conduct = QUIET, **changes: Any) -> Run:
    opened = OpenModel(str(model), "cpu", "float32")
    return Run(opened, Samples([data]), out, make_settings(SMALL | changes), conduct)


@pytest.fixture(scope="module")
def whole(model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruptions."""
    out = tmp_path_factory.mktemp("whole") / "run"
    make_run(model_folder, data, out).fit()
    return out


def test_a_run_leaves_checkpoints_log_and_the_best_drafter(whole: Path) -> None:
    assert sorted(p.name for p in (whole / "checkpoints").glob("step-*")) == [
        "step-00000008",
        "step-00000010",
        "step-00000012",
    ]
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 5, 10, 12]
    measured = {line["step"]: line["tokens_per_step"] for line in lines if "by_tree_size" in line}
    assert sorted(measured) == [6, 12]
    state = json.loads((whole / "checkpoints" / "step-00000012" / "state.json").read_text())["progress"]
    assert state["best"] == max(measured.values()) and state["batch"] == 24
    assert load_drafter(whole / "drafter").config.draft_vocabulary == 40
    shapes = known_shapes(read_metadata(whole / "drafter"))
    assert [s.config.draft_length for s in shapes] == [1, 2, 3], "no longer than it was trained for"
    assert shapes[0].tokens_per_step >= 1


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_going_on_is_bit_exact(
    model_folder: Path, data: Path, whole: Path, tmp_path: Path, monkeypatch, cut: int
) -> None:
    """Killed in mid-step ``cut``, between its two batches: what came after the last checkpoint is done again."""
    from redrafter.train.trainer import Distiller

    real, calls = Distiller.forward, 0

    def dying(self: Distiller, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 * cut:
            raise ZeroDivisionError
        return real(self, batch)

    monkeypatch.setattr(Distiller, "forward", dying)
    with pytest.raises(ZeroDivisionError):
        make_run(model_folder, data, tmp_path / "run").fit()
    assert calls == 2 * cut
    torch.manual_seed(99)  # another process has another RNG state
    make_run(model_folder, data, tmp_path / "run").fit()
    assert final(tmp_path / "run") == final(whole)
    assert sha256(tmp_path / "run" / "drafter" / "model.safetensors") == sha256(whole / "drafter" / "model.safetensors")
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps), "the log says every step once"


def test_a_damaged_checkpoint_is_skipped_aloud(
    model_folder: Path, data: Path, whole: Path, tmp_path: Path, capsys
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    flip_bit(tmp_path / "run" / "checkpoints" / "step-00000012" / "tensors.safetensors", -3)
    make_run(model_folder, data, tmp_path / "run", QUIET._replace(quiet=False)).fit()
    said = capsys.readouterr().err
    assert "skipping the checkpoint step-00000012" in said and "going on at step 10" in said
    assert final(tmp_path / "run") == final(whole)


def test_random_kills_change_nothing(model_folder: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    arguments = command(model_folder, data, tmp_path / "run")
    assert kill_at_random(arguments, random.Random(1), 2) >= 1
    assert subprocess.run(arguments, env=environment(), capture_output=True, timeout=120).returncode == 0
    assert final(tmp_path / "run") == final(whole)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_hundred_kills(model_folder: Path, data: Path, tmp_path: Path) -> None:
    found = kill_runs(model_folder, data, tmp_path, 200)
    assert found["kills"] == found["kills_survived"] == 200


def test_a_signal_saves_and_exits_with_130(model_folder: Path, data: Path, tmp_path: Path) -> None:
    arguments = [*command(model_folder, data, tmp_path / "run"), "--set", "steps=100000", "--save-every", "100000"]
    child = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, limit = tmp_path / "run" / "log.jsonl", time.monotonic() + 60
    while (not log.is_file() or not log.read_text()) and time.monotonic() < limit and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert errors.splitlines()[-1] == "interrupted"
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1


def test_a_loss_that_is_no_number_names_the_batch(model_folder: Path, data: Path, tmp_path: Path, monkeypatch) -> None:
    real = Learner.update

    def broken(self: Learner, batches: Any, step: int, fraction: float) -> Any:
        report = real(self, batches, step, fraction)
        return report._replace(loss=report.loss * float("nan")) if step == 7 else report

    monkeypatch.setattr(Learner, "update", broken)
    with pytest.raises(TrainingDiverged, match=r"batches 14 to 15 .*lower lr"):
        make_run(model_folder, data, tmp_path / "run").fit()
    monkeypatch.undo()
    run = make_run(model_folder, data, tmp_path / "run")
    run.resume(lambda line: None)
    assert run.progress.step == 6
    assert all(torch.isfinite(w).all() for w in run.learner.weights)


VARIANTS = {
    "gru": {},
    "rnn of the paper": {
        "cell": "rnn",
        "head": "own",
        "features": "last",
        "context_state": False,
        "draft_vocabulary": 0,
    },
    "rnn, own reduced head": {"cell": "rnn", "head": "own"},
    "medusa": {"cell": "medusa", "features": "last"},
    "sum": {"cell": "sum"},
    "narrow": {"width": 24},
    "narrow, last": {"width": 40, "features": "last", "head": "own"},
    "whole vocabulary": {"draft_vocabulary": 0, "loss": "kl"},
    "tv": {"loss": "tv"},
    "ce": {"loss": "ce"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns(model_folder: Path, data: Path, tmp_path: Path, name: str) -> None:
    changes = {"steps": 40, "eval_every": 40, "anchors": 1.0, "batches_per_step": 1, **VARIANTS[name]}
    run = make_run(model_folder, data, tmp_path / "run", QUIET._replace(save_every=100, log_every=1), **changes)
    run.fit()
    hits = [json.loads(line).get("hit") for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    hits = [hit[0] for hit in hits if hit]
    assert sum(hits[-5:]) > sum(hits[:5]) + 0.1, f"{hits[:5]} -> {hits[-5:]}"
    assert load_drafter(tmp_path / "run" / "drafter").config == run.config


def test_a_drafter_learns_and_patience_ends_the_run(model_folder: Path, data: Path, tmp_path: Path) -> None:
    changes = {"steps": 400, "eval_every": 20, "patience": 2, "anchors": 1.0, "draft_vocabulary": 0, "eval_texts": 20}
    summary = make_run(model_folder, data, tmp_path / "run", QUIET._replace(save_every=100), **changes).fit()
    assert summary["best_tokens_per_step"] > 2
    assert summary["steps"] < 400 or summary["best_step"] > 360
    assert summary["finished"]


def test_minutes_follow_the_clock_over_several_calls(model_folder: Path, data: Path, tmp_path: Path) -> None:
    changes = {"steps": 0, "minutes": 0.02, "eval_every": 1000}
    first = make_run(model_folder, data, tmp_path / "run", QUIET._replace(stop_after=0.0), **changes).fit()
    assert (first["steps"], first["finished"]) == (1, False)
    second = make_run(model_folder, data, tmp_path / "run", **changes)
    assert second.fit()["finished"] and second.progress.step > 1
    assert second.learner.optimizer.param_groups[0]["lr"] == pytest.approx(5e-3 * 0.05, rel=0.5)


def test_tensorboard_has_what_the_log_has_once(model_folder: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed (extra: train)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = QUIET._replace(tensorboard=tmp_path / "board", log_every=1)
    make_run(model_folder, data, tmp_path / "run", board._replace(stop_after=0.0)).fit()
    make_run(model_folder, data, tmp_path / "run", board).fit()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    found = {e.step: e.value for e in events.Scalars("loss")}
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    expected = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert found == pytest.approx(expected) and sorted(found) == list(range(1, 13))
    assert len(events.Scalars("hit/1")) == 12 and [e.step for e in events.Scalars("tokens_per_step")] == [6, 12]


@pytest.mark.parametrize("option", [[], ["--shard-teacher"]], ids=["whole teacher", "sharded teacher"])
def test_two_processes_give_the_result_of_one(
    model_folder: Path, data: Path, whole: Path, tmp_path: Path, option: list[str]
) -> None:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    arguments = command(model_folder, data, tmp_path / "run")
    done = subprocess.run(
        [arguments[0], *launch, *arguments[2:], *option], env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert final(tmp_path / "run") == final(whole)
    said = re.search(r"holds ([\d,]+) of ([\d,]+) bytes", done.stderr)
    assert bool(said) == bool(option)
    if said:
        held, total = (int(x.replace(",", "")) for x in said.groups())
        assert 2 * held == total
    for name in ("model.safetensors", "config.json"):
        assert sha256(tmp_path / "run" / "drafter" / name) == sha256(whole / "drafter" / name)


def test_sharding_needs_several_processes(model_folder: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="torchrun"):
        make_run(model_folder, data, tmp_path / "run", QUIET._replace(shard_teacher=True))


def test_settings_are_checked_and_kept(model_folder: Path, data: Path, whole: Path, tmp_path: Path, capsys) -> None:
    for values, says in (
        ({"stepz": 3}, "'stepz' is no setting"),
        ({"steps": 3, "epochs": 1.0}, "exactly one"),
        ({"steps": "many"}, "must be of type int"),
        ({"steps": 3, "loss": "mse"}, "use ce, kl, tv, mix"),
        ({"steps": 3, "features": "last", "feature_layers": [1]}, "need features='fused'"),
    ):
        with pytest.raises(InvalidRequest, match=says):
            make_settings(values)
    config = tmp_path / "settings.yaml"
    config.write_text("steps: 9\nlr: 0.001\nfeature_layers: [0, 2]\n")
    where = ["--model", str(model_folder), "--data", str(data), "--out", str(tmp_path / "r"), "--device", "cpu"]
    assert main(["train", *where, "--config", str(config), "--set", "steps=7", "--plan"]) == 0
    out = capsys.readouterr().out
    assert "steps                    7" in out and "feature_layers=(0, 2)" in out and "memory bytes" in out
    assert not (tmp_path / "r").exists()
    assert main(["train", *where, "--set", "speed=9"]) == 2
    assert "'speed' is no setting" in capsys.readouterr().err
    with pytest.raises(InvalidRequest, match=r"was begun with lr=0\.005, not 0\.1"):
        make_run(model_folder, data, whole, lr=0.1)


def test_defaults_fit_any_model_and_bytes_are_those_of_the_file(whole: Path) -> None:
    assert default_layers(30) == (2, 14, 24) and default_layers(1) == (0,) and default_layers(2) == (0, 1)
    shapes = [(576, 30, 9, 3), (896, 24, 14, 2), (2048, 16, 32, 8), (2560, 36, 32, 8), (30, 3, 4, 4), (33, 2, 1, 1)]
    for width, layers, heads, kv_heads in shapes:
        model = {"hidden_size": width, "num_hidden_layers": layers, "vocab_size": 50000}
        model |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
        config = drafter_config(make_settings({"steps": 1}), model)
        assert config.draft_vocabulary == 16384 and len(config.feature_layers) <= 3
        narrow = drafter_config(make_settings({"steps": 1, "width": "24"}), model)
        assert (narrow.width, narrow.state_size, narrow.exit_dim, narrow.hidden_size) == (24, 24, 24, width)
    drafter = load_drafter(whole / "drafter")
    stored = sum(t.numel() * t.element_size() for t in drafter.state_dict().values())
    assert drafter_bytes(drafter.config).stored == stored


def test_the_plan_takes_longer_for_more_steps_and_a_slower_device(model_folder: Path, data: Path, monkeypatch) -> None:
    opened, samples = OpenModel(str(model_folder), "cpu", "float32"), Samples([data])

    def seconds(rate: float, **changes: Any) -> int:
        monkeypatch.setattr(plans, "product_rate", lambda device, dtype: rate)
        return estimate(opened, samples, make_settings(SMALL | changes))["seconds"]

    once = seconds(1e6)
    assert once > 100
    assert seconds(1e6, steps=24) == pytest.approx(2 * once, rel=0.02)
    assert seconds(5e5) == pytest.approx(2 * once, rel=0.02)
    assert seconds(1e6, draft_length=6) > 1.2 * once
    assert seconds(1e6, steps=0, minutes=2.0) == 120


def test_the_plan_counts_steps(model_folder: Path, data: Path) -> None:
    settings = make_settings({**SMALL, "steps": 0, "epochs": 2.0})
    plan = estimate(OpenModel(str(model_folder), "cpu", "float32"), Samples([data]), settings)
    assert plan["steps"] == plan["batches_per_epoch"] > 3
    assert plan["tokens"] == plan["steps"] * 1400
    assert plan["seconds"] >= 1
    assert plan["drafter"] == asdict(drafter_config(settings, json.loads((model_folder / "config.json").read_text())))
