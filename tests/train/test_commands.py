"""The three commands of the README, from an empty folder, on a tiny model; then eval and card."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from redrafter.backends.torch.checkpoint import load_drafter, read_metadata
from redrafter.bench.results import read_result
from redrafter.cli import main
from redrafter.cli.data import DEFAULT_TOKENS
from redrafter.load import known_shapes
from tests import fakes
from tests.tiny import make_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("empty")
    model = make_model("llama", attention="eager", vocab_size=280, eos_token_id=270)
    with torch.no_grad():
        # A random model hardly ever ends; this one does after some twenty tokens.
        model.get_output_embeddings().weight[270] *= 3
    model.save_pretrained(base / "my-model")
    tokenizer = fakes.byte_level()
    tokenizer.save_pretrained(base / "my-model")
    return base


def commands() -> list[list[str]]:
    text = (ROOT / "docs" / "training.md").read_text()
    block = re.search(r"```\n(redrafter data .*?)```", text, re.DOTALL)
    assert block, "docs/training.md begins with the three commands"
    return [shlex.split(line)[1:] for line in block[1].strip().splitlines()]


@pytest.mark.timeout(240)
def test_the_three_commands_work_from_an_empty_folder(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setitem(DEFAULT_TOKENS, "cpu", 8_000)  # of the default's 20,000: it learns enough
    three = commands()
    assert [c[0] for c in three] == ["data", "train", "generate"]
    three[0] += ["--json-out", "datagen.json"]
    for arguments in three:
        assert main([*arguments, "--device", "cpu"]) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert "tokens per step" in err
    assert json.loads(out.splitlines()[1])["best_tokens_per_step"] >= 1
    load_drafter(folder / "run" / "drafter")
    made = read_result(folder / "datagen.json")
    assert made["summary"]["kept_answer_tokens"] == made["counts"]["kept_answer_tokens"] > 7_000
    assert made["summary"]["kept_answer_tokens_per_second"] > 0
    # On a model this small plain decoding may be what pays; a shape that is asked for is used.
    assert main([*three[2], "--device", "cpu", "--tree-size", "8"]) == 0
    again = capsys.readouterr()
    assert "no speculation" not in again.err and "tokens per step" in again.err
    assert again.out.strip() == "\n".join(out.splitlines()[2:]).strip(), "the same text"

    questions = folder / "questions.jsonl"
    questions.write_text('{"turns": ["why?"], "category": "mt_bench/a"}\n{"prompt": "how?", "category": "qa"}\n')
    where = ["--model", "my-model", "--drafter", "run", "--prompts", "questions.jsonl", "--device", "cpu"]
    assert main(["eval", *where, "--max-new-tokens", "30", "--json-out", "e.json"]) == 0
    said = capsys.readouterr().out
    assert "mt_bench" in said and "acceptance per depth" in said and "tree savings" in said
    result = read_result(folder / "e.json")
    assert set(result["categories"]) == {"all", "mt_bench", "qa"}
    file = folder / "run" / "drafter" / "model.safetensors"
    assert result["summary"]["drafter_megabytes"] == pytest.approx(file.stat().st_size / 1e6, abs=0.01)
    assert result["summary"]["draft_bytes_per_depth"] == result["bytes"]["per_depth"] > 0
    by_group = [result["summary"][f"tokens_per_step.{group}"] for group in ("mt_bench", "other")]
    assert min(by_group) <= result["summary"]["tokens_per_step"] <= max(by_group)
    before = read_metadata(folder / "run" / "drafter")
    assert main(["eval", *where, "--max-new-tokens", "30", "--save-shapes"]) == 0
    assert "beam shapes" in capsys.readouterr().out
    after = read_metadata(folder / "run" / "drafter")
    assert "to 2 prompts" in after["tokens_per_step_of"] and len(known_shapes(after)) == len(known_shapes(before))
    assert {k: v for k, v in after.items() if "tokens_per_step" not in k} == {
        k: v for k, v in before.items() if "tokens_per_step" not in k
    }
    load_drafter(folder / "run" / "drafter")  # its manifest fits
    assert main(["eval", *where, "--save-shapes", "--temperature", "1"]) == 2
    assert "--save-shapes" in capsys.readouterr().err
    sampled = ["--temperature", "1", "--seed", "5", "--max-new-tokens", "30", "--json-out"]
    assert main(["eval", *where, *sampled, "t1.json"]) == 0
    assert main(["eval", *where, *sampled, "t1-plain.json", "--no-seed-coupled"]) == 0
    coupled, plain = (read_result(folder / name) for name in ("t1.json", "t1-plain.json"))
    tokens = [[r["categories"][g]["tokens"] for g in ("mt_bench", "qa")] for r in (coupled, plain)]
    assert tokens[0] == tokens[1], "the same answers"
    assert coupled["summary"]["tokens_per_step"] > plain["summary"]["tokens_per_step"]
    assert main(["card", "run", "--eval", "e.json", "--eval", "t1.json", "--generation", "data/manifest.json"]) == 0
    card = (folder / "run" / "drafter" / "README.md").read_text()
    assert card.startswith("# A drafter for my-model")
    said = ("mt_bench", "## Data", "kept answer tokens", "## Training", "model_sha256", "## Limits", "N=64")
    for words in (*said, "temperature 1, seed-coupled"):
        assert words in card
    assert main(["eval", *where, "--category", "math"]) == 2
