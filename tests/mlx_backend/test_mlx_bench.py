"""``bench --backend mlx`` with mlx-lm's own generation as a third way."""
# ruff: noqa: E402 - nothing below may be imported where MLX is absent

from __future__ import annotations

import json
from pathlib import Path

import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed: pip install 'redrafter[mlx]'")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'redrafter[mlx]'")

from redrafter.bench.mlx_lm_baseline import against
from redrafter.cli import main
from tests import fakes
from tests.mlx_backend.tiny import write_drafter, write_model

SHAPE = ["--beam-width", "2", "--branching", "2", "--draft-length", "3", "--tree-size", "6"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("spoken")
    write_model(root / "model", "llama", vocab_size=280, eos_token_id=279)
    fakes.byte_level().save_pretrained(root / "model")
    write_drafter(root / "drafter", vocab_size=280)
    (root / "prompts.jsonl").write_text('{"prompt": "why?"}\n{"prompt": "and then what?"}\n')
    command = ["bench", "--model", str(root / "model"), "--drafter", str(root / "drafter"), "-q", *SHAPE]
    return [*command, "--prompts", str(root / "prompts.jsonl"), "--max-new-tokens", "12", "--device", "cpu"]


def test_three_ways_give_the_same_answers_and_one_result(asked: list[str], tmp_path: Path) -> None:
    how = ["--backend", "mlx", "--baseline", "mlx-lm", "--repeat", "2", "--out", str(tmp_path), "--name", "three"]
    assert main([*asked, *how]) == 0
    result = json.loads((tmp_path / "three.json").read_text())
    summary = result["summary"]
    assert summary["forks"] == 0 and summary["mlxlm_equal_prompts"] == 2
    assert summary["speedup"] > 0 and summary["plain_vs_mlxlm"] > 0
    assert result["units"]["plain_vs_mlxlm"] == "x" and result["settings"]["baseline"] == "mlx-lm"
    assert [r["mlxlm_tokens_after_first"] for r in result["prompts"]] == [11, 11]
    assert all(r["mlxlm_seconds_after_first"] > 0 and r["plain_seconds_after_first"] > 0 for r in result["prompts"])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (["--backend", "torch"], "add --backend mlx"),
        (["--backend", "mlx", "--batch", "2"], "one prompt at a time"),
        (["--backend", "mlx", "--temperature", "0.5"], "must be 1 and 0"),
        (["--backend", "mlx", "--no-plain"], "drop --no-plain"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    asked: list[str], how: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*asked, *how, "--baseline", "mlx-lm", "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_baseline_is_refused(asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*asked, "--backend", "mlx", "--baseline", "vllm", "--out", str(tmp_path)]) == 2
    assert "--baseline 'vllm' is unknown: use mlx-lm" in capsys.readouterr().err


def test_rates_are_sums_over_sums() -> None:
    def record(ours: float, theirs: float, equal: bool) -> dict:
        tokens = {"plain_tokens_after_first": 10, "mlxlm_tokens_after_first": 10, "mlxlm_equal": equal}
        return {**tokens, "plain_seconds_after_first": ours, "mlxlm_seconds_after_first": theirs}

    found = against([record(1.0, 3.0, True), record(1.0, 1.0, False)])
    assert found == {"mlxlm_tokens_per_second": 5.0, "mlxlm_equal_prompts": 1, "plain_vs_mlxlm": 2.0}
    assert against([])["plain_vs_mlxlm"] is None
