"""The scripts that compare drafters on GPUs, on a tiny model: their table, their ratios, going on, figures."""

from __future__ import annotations

import importlib.util
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import ablations, scaling
from redrafter.bench.results import figures_of, parse_figures, read_result
from redrafter.cli import main
from redrafter.train.evaluate import TREE_SIZES

ROOT = Path(__file__).resolve().parents[2]
SHARED = {"draft_length": 3, "batch_tokens": 700, "chunk": 128, "draft_vocabulary": 40, "warmup_steps": 4, "lr": 5e-3}
SHARED |= {"eval_texts": 6}


@pytest.fixture
def arguments(model_folder: Path, data: Path, tmp_path: Path) -> list[str]:
    questions = tmp_path / "questions.jsonl"
    rows = [("mt_bench/a", "w1 w2"), ("mt_bench/b", "w5"), ("qa", "w9 w3")]
    questions.write_text("".join(json.dumps({"category": c, "turns": [t]}) + "\n" for c, t in rows))
    where = ["--model", str(model_folder), "--data", str(data), "--questions", str(questions), "--device", "cpu"]
    where += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json"), "--steps", "8", "--max-new", "12"]
    return [*where, "--no-compile", *(x for k, v in SHARED.items() for x in ("--set", f"{k}={v}"))]


def test_the_most_important_come_first() -> None:
    order = [(j.variant, j.seed) for j in ablations.jobs(list(ablations.VARIANTS))]
    pairs = [(v, s) for s in (0, 1, 2) for v in ("shipped", "no distillation", "medusa")]
    assert order[:9] == pairs
    assert len(order) == 9 + len(ablations.VARIANTS) - 3 == len(set(order))


def test_runs_become_a_table_ratios_and_figures(arguments: list[str], tmp_path: Path, capsys: Any) -> None:
    for job in ablations.jobs(["shipped", "no distillation", "medusa"], seeds=(0, 1)):
        assert ablations.main([*arguments, "--job", job.name]) == 0
    assert ablations.main([*arguments, "--variants", "shipped", "--minutes", "0"]) == 0
    assert "still to do: shipped-s2" in capsys.readouterr().out
    result = ablations.report(ablations.parse(arguments))
    assert result["partial"], "seed 2 is missing"
    rows = {row["variant"]: row for row in result["variants"]}
    assert rows["shipped"]["seeds"] == [0, 1] and rows["medusa"]["changes"] == {"cell": "medusa"}
    assert all(len(row["questions_each"]) == 2 and row["seconds"] > 0 for row in rows.values())
    each = {name: row["questions_each"] for name, row in rows.items()}
    assert each["shipped"] != each["no distillation"]
    wanted = [a / b for a, b in zip(each["shipped"], each["medusa"], strict=True)]
    summary = result["summary"]
    assert summary["gain_recurrent_over_medusa"] == pytest.approx(sum(wanted) / 2, abs=1e-4)
    assert summary["gain_recurrent_over_medusa_lowest"] == pytest.approx(min(wanted), abs=1e-4)
    assert summary["gain_distillation_seeds"] == 2 and summary["gain_distillation_heldout_spread"] >= 0
    assert summary["shipped_t1_uncoupled"] >= 1 and summary["shipped_t1_coupled"] >= 1
    assert all(run["steps"] == 8 and str(max(TREE_SIZES)) == ablations.TREE for run in result["runs"])

    result["partial"] = False
    result["provenance"]["source"]["commit"] = "0" * 40
    (tmp_path / "whole.json").write_text(json.dumps(result))
    read = read_result(tmp_path / "whole.json")
    keys = parse_figures(["gain_distillation=gain_distillation"], read["units"], plain=True)
    found = figures_of(read, keys, tmp_path / "whole.json", tmp_path)["gain_distillation"]
    assert found["value"] == summary["gain_distillation"] and found["unit"] == "x"
    assert found["command"].startswith("python benchmarks/gpu/ablations.py") and "/" not in found["result"]
    assert main(["bench", "--report", str(tmp_path / "whole.json"), "-o", str(tmp_path / "page.html")]) == 2
    assert "no result of bench" in capsys.readouterr().err


def test_the_pool_runs_everything_in_order_and_ends_at_the_deadline(tmp_path: Path) -> None:
    def command(text: str) -> list[str]:
        return [sys.executable, "-c", text]

    done = tmp_path / "done"
    note = f"open({str(done)!r}, 'a').write"
    pool = ablations.Pool([""], 1, 60, tmp_path / "logs")
    pool.run([("a", command(f"{note}('a')")), ("b", command("raise SystemExit(3)")), ("c", command(f"{note}('c')"))])
    assert done.read_text() == "ac"
    assert len(pool.failed) == 1 and pool.failed[0].startswith("b (exit 3")
    pool = ablations.Pool([""], 2, 0.5, tmp_path / "logs")
    pool.run([(str(i), command("import time; time.sleep(60)")) for i in range(3)])
    assert pool.failed == [] and not pool.children


def test_a_rate_is_that_of_the_later_steps(tmp_path: Path) -> None:
    lines = [{"step": 10, "anchors": 100, "anchors_per_second": 1}, {"step": 20, "tokens_per_step": 2.0}]
    lines += [{"step": s, "anchors": 10 * s, "anchors_per_second": r} for s, r in ((20, 5), (30, 100), (40, 50))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert scaling.rate(tmp_path / "log.jsonl", 20) == pytest.approx(200 / 3)
    with pytest.raises(SystemExit, match="raise --steps"):
        scaling.rate(tmp_path / "log.jsonl", 40)


def drawing() -> Any:
    spec = importlib.util.spec_from_file_location("drawing", ROOT / "docs" / "ablations.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_not_stale() -> None:
    assert drawing().main(["--check"]) == 0, "run python docs/ablations.py"


def test_the_picture_shows_every_variant_and_follows_the_figure(tmp_path: Path) -> None:
    row = {"seconds": 61.2, "bytes_per_depth": 21.5e6}
    rows = [row | {"variant": "<medusa>", "questions": 2.5, "questions_each": [2.5], "seeds": [0]}]
    rows += [row | {"variant": "shipped", "questions": 3.25, "questions_each": [3.0, 3.5], "seeds": [0, 1]}]
    settings = {"group": "mt_bench", "tree_size": 64, "steps": 9}
    result = {"variants": rows, "settings": settings, "provenance": {"machine": {"device": "a GPU"}}}
    for folder in ("docs", "benchmarks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "benchmarks" / "figures.json").write_text(json.dumps({"gain_distillation": {"result": "r.json"}}))
    (tmp_path / "r.json").write_text(json.dumps(result))
    draw = drawing()
    assert draw.main(["--check"], tmp_path) == 1
    assert draw.main([], tmp_path) == 0 and draw.main(["--check"], tmp_path) == 0
    text = (tmp_path / "docs" / "ablations.svg").read_text()
    svg = "{http://www.w3.org/2000/svg}"
    picture = ElementTree.fromstring(text)
    words = [x.text for x in picture.iter(f"{svg}text")]
    assert words.index("shipped") < words.index("<medusa>") and "3.25" in words and "61 s, 21.5 MB" in words
    assert len(list(picture.iter(f"{svg}circle"))) == 2
    (tmp_path / "benchmarks" / "figures.json").write_text("{}")
    assert draw.main(["--check"], tmp_path) == 1, "a picture of no figure"
    assert draw.main([], tmp_path) == 0 and not (tmp_path / "docs" / "ablations.svg").exists()
