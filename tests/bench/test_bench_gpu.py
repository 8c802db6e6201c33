"""What ``redrafter bench`` adds on a GPU: the parts of a step and the instrument, played on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from redrafter.backends.torch.checkpoint import save_drafter
from redrafter.bench import instrument, memory, provenance, roofline, widen
from redrafter.bench import run as bench_run
from redrafter.bench.metrics import NEEDS_CUDA
from redrafter.cli import bench, main
from tests import fakes
from tests.bench.test_widen import SMALL, WIDE, small_drafter
from tests.tiny import make_model

SHAPE = {"beam_width": 2, "branching": 2, "draft_length": 3, "tree_size": 6}
RESULT = Path("benchmarks/results/r.json")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small")
    make_model("llama", **{**SMALL, "vocab_size": 280, "eos_token_id": 279}).save_pretrained(root / "model")
    fakes.byte_level().save_pretrained(root / "model")
    torch.manual_seed(5)
    known = {"tokens_per_step": [SHAPE | {"tokens_per_step": 2.0}, SHAPE | {"tree_size": 4, "tokens_per_step": 1.5}]}
    save_drafter(small_drafter(vocab_size=280), root / "drafter", known)
    return root


@pytest.fixture
def arguments(folders: Path, tmp_path: Path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    for module in (bench, provenance):
        monkeypatch.setattr(module, "checkout", lambda: None)
    monkeypatch.setenv(provenance.COMMIT_VARIABLE, "0123abc")
    monkeypatch.setattr(roofline, "READ_BYTES", 2**22)
    model = ["--model", str(folders / "model"), "--drafter", str(folders / "drafter"), "--dtype", "float32"]
    return ["bench", *model, "--device", "cpu", "--max-new-tokens", "6", "--limit", "1", "--name", "r", "-q"]


@pytest.fixture
def as_gpu(monkeypatch) -> None:
    """The CPU where ``bench`` asks for a GPU."""
    monkeypatch.setattr(bench, "_is_cuda", lambda backend, device: True)
    monkeypatch.setattr(bench_run, "on_cuda", lambda llm: True)
    monkeypatch.setattr(memory, "peak_of", lambda device, run: run().seconds and 10**8)


def result() -> dict[str, Any]:
    return json.loads(RESULT.read_text(encoding="utf-8"))


def test_the_parts_of_a_step_are_in_result_figures_and_page(arguments, as_gpu, tmp_path) -> None:
    assert main([*arguments, "--figure", "gpu_share=step_extra_share"]) == 0
    found = result()
    assert found["units"].items() >= NEEDS_CUDA.items() and found["summary"].keys() >= NEEDS_CUDA.keys()
    phases = found["roofline"]["phases_ms"]
    extra = (phases["speculative step"] - phases["verify tree"]) / phases["plain step"]
    figure = json.loads(Path("benchmarks/figures.json").read_text())["gpu_share"]
    assert figure["value"] == found["summary"]["step_extra_share"] == pytest.approx(extra)
    assert found["memory"]["shape"]["tree_size"] == 6
    assert found["summary"]["memory_overhead_bytes"] == found["summary"]["drafter_resident_bytes"] > 0
    usual = found["roofline"]["shape"]
    assert usual["tree_size"] in (4, 6)
    assert {line["config"]["tree_size"] for line in found["cost_table"]} == {1, 4, 6}
    assert sum(line["chosen"] for line in found["cost_table"]) == 1
    assert main(["bench", "--report", str(RESULT), "-o", "page.html"]) == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert "A step, part by part" in page and "choose and accept" in page
    assert "2 x 2, 3 deep, 6 nodes" in page and ">plain<" in page and "Plain step" in page


def test_without_a_gpu_there_are_no_parts_and_a_fixed_shape_has_no_table(arguments) -> None:
    assert main([*arguments, *(f"--{k.replace('_', '-')}={v}" for k, v in SHAPE.items())]) == 0
    found = result()
    assert "roofline" not in found and not found["units"].keys() & NEEDS_CUDA.keys()
    assert found["cost_table"] == []
    assert main(["bench", "--report", str(RESULT), "-o", "page.html"]) == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert "part by part" not in page and "Shapes to choose from" not in page


def test_the_instrument_is_named_and_answers_like_the_small_model(arguments, as_gpu, monkeypatch) -> None:
    assert main(arguments) == 0
    small = result()
    monkeypatch.setitem(widen.SHAPES, "tiny", WIDE)
    monkeypatch.setattr(instrument, "WIDTH", 96)
    assert main([*arguments, "--instrument", "tiny", "--max-context", "120"]) == 0
    wide = result()
    assert wide["provenance"]["model"]["name"] == "model widened to tiny"
    assert [r["ids_sha256"] for r in wide["prompts"]] == [r["ids_sha256"] for r in small["prompts"]]
    assert wide["summary"]["bytes_per_plain_step"] > 4 * small["summary"]["bytes_per_plain_step"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--instrument", "llama-2-7b"], "--instrument llama-2-7b: a CPU takes seconds"),
        (["--instrument", "gpt-7"], "--instrument 'gpt-7' is unknown: use one of llama-2-7b"),
        (["--figure", "gpu=verify_ratio"], "measured on an NVIDIA GPU: use --device cuda"),
        (["--figure", "gpu=memory_overhead"], "--figure 'gpu=memory_overhead' is measured on an NVIDIA GPU"),
    ],
)
def test_what_needs_a_gpu_says_so(arguments, more, says, capsys) -> None:
    assert main([*arguments, *more]) == 2
    err = capsys.readouterr().err
    assert says in err and len(err.splitlines()) == 1 and not RESULT.exists()
