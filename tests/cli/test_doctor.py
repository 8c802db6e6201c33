"""``redrafter doctor``: what it finds and how it says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from redrafter import __version__
from redrafter.cli import doctor, main


def test_doctor_tells_machine_versions_and_cache(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("REDRAFTER_HOME", str(tmp_path))
    model = tmp_path / "models" / "a-model"
    model.mkdir(parents=True)
    (model / "manifest.json").write_text("{}")
    (tmp_path / "models" / "half-fetched").mkdir()
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["redrafter"] == __version__
    assert facts["cache"] == {"folder": str(tmp_path), "models": [{"name": "a-model", "mib": 0.0}]}
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["cpu"]["cores"] >= 1 and facts["cpu"]["threads"] == torch.get_num_threads()
    assert facts["device"]["dtype_auto"] == "bfloat16" or not facts["cpu"]["bfloat16"]
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = ["cpu", "cache", "drafters"]
    assert [line.split()[0] for line in lines] == ["redrafter", "packages", "device", "gpu", *said]
    assert lines[5].endswith(f"{tmp_path}: a-model (0.0 MiB)")


def test_doctor_works_before_anything_was_fetched(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("REDRAFTER_HOME", str(tmp_path / "absent"))
    assert main(["doctor"]) == 0
    assert "absent: none" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError):
        (tmp_path / "absent").stat()


def test_doctor_names_the_gpu_its_driver_and_what_is_missing() -> None:
    cards = [{"name": "NVIDIA H100", "memory_gib": 79.2}]
    facts = {"cuda": cards, "driver": "550.54\n550.54", "cuda_trouble": None, "kernels_trouble": None}
    assert doctor._gpu(facts) == "NVIDIA H100 (79.2 GiB), driver 550.54; kernels: can be compiled"
    assert doctor._gpu(facts | {"driver": None, "kernels_trouble": "no triton"}).endswith("version; kernels: no triton")
    assert doctor._gpu(facts | {"cuda": [], "cuda_trouble": "there is no GPU"}) == "none: there is no GPU"
