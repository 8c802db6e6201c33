"""The instrument's folders: opened like any model's, they give the small pair's answers and drafts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from redrafter import LLM, SamplingParams
from redrafter.backends.torch.checkpoint import save_drafter
from redrafter.bench import widen
from redrafter.bench.widen_folder import write_folders
from redrafter.errors import InvalidRequest
from redrafter.params import DecodeConfig
from tests import fakes
from tests.bench.test_widen import SMALL, WIDE, small_drafter
from tests.tiny import make_model

SHAPE = DecodeConfig(beam_width=3, branching=3, draft_length=3, tree_size=9)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ and drafter/ that speak."""
    root = tmp_path_factory.mktemp("small")
    make_model("llama", **{**SMALL, "vocab_size": 280, "eos_token_id": 279}).save_pretrained(root / "model")
    fakes.byte_level().save_pretrained(root / "model")
    torch.manual_seed(5)
    save_drafter(small_drafter(vocab_size=280), root / "drafter", {"note": "kept"})
    return root


def ask(folder: Path, backend: str) -> tuple[list[int], list[int]]:
    llm = LLM.from_pretrained(
        str(folder / "model"), str(folder / "drafter"), backend=backend, dtype="float32", device="cpu", config=SHAPE
    )
    answer = llm.generate("why?", SamplingParams(max_new_tokens=24))[0]
    return list(answer.token_ids), list(answer.statistics.accepted_at_depth)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_the_wide_folders_answer_and_draft_like_the_small_ones(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'redrafter[mlx]'")
    monkeypatch.setitem(widen.SHAPES, "tiny", WIDE)
    model, drafter = write_folders(small / "model", small / "drafter", tmp_path, "tiny", "float32")
    assert (model, drafter) == (tmp_path / "model", tmp_path / "drafter")
    assert '"instrument": "tiny"' in (drafter / "config.json").read_text()
    assert ask(tmp_path, backend) == ask(small, backend)


def test_bfloat16_halves_the_weights(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(widen.SHAPES, "tiny", WIDE)
    whole, _ = write_folders(small / "model", small / "drafter", tmp_path / "a", "tiny", "float32")
    half, _ = write_folders(small / "model", small / "drafter", tmp_path / "b", "tiny")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (whole, half)]
    assert 1.9 < sizes[0] / sizes[1] < 2.1


def test_errors_come_before_anything_is_written(small: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="shape 'huge' is unknown"):
        write_folders(small / "model", small / "drafter", tmp_path, "huge")
    with pytest.raises(InvalidRequest, match="dtype='int8' is unknown"):
        write_folders(small / "model", small / "drafter", tmp_path, "llama-2-7b", "int8")
    assert not list(tmp_path.iterdir())


def test_the_command_explains_itself() -> None:
    command = [sys.executable, "-m", "redrafter.bench.widen_folder", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "llama-2-7b" in done.stdout
