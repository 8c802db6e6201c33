"""``python -m redrafter.bench.mlx_equal`` on a tiny model: what it counts, writes, resumes and refuses."""
# ruff: noqa: E402 - nothing below may be imported where MLX is absent

from __future__ import annotations

import json
from pathlib import Path

import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed: pip install 'redrafter[mlx]'")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'redrafter[mlx]'")

from redrafter.bench import mlx_equal, provenance
from redrafter.errors import InvalidRequest
from tests import fakes
from tests.mlx_backend.tiny import write_drafter, write_model

TEXTS = ["why?", "and what came of it then?", "who", "when did they leave?"]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mlx_equal, "checkout", lambda: None)
    monkeypatch.setattr(provenance, "checkout", lambda: None)
    monkeypatch.setenv(provenance.COMMIT_VARIABLE, "0123abc")
    write_model(Path("model"), "llama", vocab_size=280, eos_token_id=279)
    fakes.byte_level().save_pretrained("model")
    write_drafter(Path("drafter"), vocab_size=280)
    Path("q.jsonl").write_text("\n".join(json.dumps({"id": t, "prompt": t}) for t in TEXTS), encoding="utf-8")
    return ["q.jsonl", "--count", "3", "--tokens", "10", "--model", "model", "--drafter", "drafter"]


def test_it_counts_and_writes_a_figure(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    mlx_equal.main([*asked, "--figure", "mlx_cpu_equal_prompts"])
    summary = json.loads(capsys.readouterr().out)
    assert summary == {"prompts": 3, "equal_prompts": 3, "ties": 0, "answer_tokens": 30}
    result = json.loads(mlx_equal.OUT.read_text())
    assert [r["id"] for r in result["prompts"]] == ["who", "why?", "when did they leave?"]
    assert [r["temperature"] for r in result["prompts"]] == [0.0, 0.7, 0.0]
    figure = json.loads(Path("benchmarks/figures.json").read_text())["mlx_cpu_equal_prompts"]
    assert (figure["value"], figure["unit"], figure["commit"]) == (3, "prompts", "0123abc")
    assert not mlx_equal.OUT.with_suffix(".partial.json").exists()


def test_it_goes_on_where_it_stopped(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    one, numbers = mlx_equal.compare_one, []

    def interrupted(ours, theirs, prompt, number, tokens) -> dict:
        numbers.append(number)
        if numbers == [0, 1]:
            raise KeyboardInterrupt
        return one(ours, theirs, prompt, number, tokens)

    monkeypatch.setattr(mlx_equal, "compare_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mlx_equal.main(asked)
    partial = mlx_equal.OUT.with_suffix(".partial.json")
    assert json.loads(partial.read_text())["summary"]["prompts"] == 1
    with pytest.raises(InvalidRequest, match="delete it or use another --out"):
        mlx_equal.main([*asked, "--tokens", "11"])
    mlx_equal.main(asked)
    assert numbers == [0, 1, 1, 2]
    assert json.loads(mlx_equal.OUT.read_text())["summary"]["equal_prompts"] == 3 and not partial.exists()


def test_a_difference_beyond_rounding_is_no_tie() -> None:
    def record(equal: bool, difference: float) -> dict:
        return {"equal": equal, "answer_tokens": 5, "largest_logit_difference": difference}

    found = mlx_equal.summarise([record(True, 0), record(False, 1e-5), record(False, 0.1)])
    assert found == {"prompts": 3, "equal_prompts": 1, "ties": 1, "answer_tokens": 15}


def test_a_fork_is_recorded_with_the_logits_difference(asked: list[str], tmp_path: Path) -> None:
    write_model(Path("other"), "llama", vocab_size=280, eos_token_id=279, rms_norm_eps=0.3)
    fakes.byte_level().save_pretrained("other")
    ours, _ = mlx_equal.open_both("other", "none")
    _, theirs = mlx_equal.open_both("model", "none")
    prompt = mlx_equal.shortest(mlx_equal.load_prompts(Path("q.jsonl")), 1)[0]
    record = mlx_equal.compare_one(ours, theirs, prompt, 0, 10)
    assert not record["equal"] and 0 <= record["position"] < 10 and record["largest_logit_difference"] > 1e-3
