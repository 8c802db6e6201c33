"""The default model on both backends: equal ids on real prompts. Half an hour on two cores: MLX multiplies at 2 GFLOP/s
on a Linux CPU. Interrupted, the same run goes on with ``python -m redrafter.bench.mlx_equal``."""
# ruff: noqa: E402 - nothing below may be imported where MLX is absent

from __future__ import annotations

from pathlib import Path

import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed: pip install 'redrafter[mlx]'")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'redrafter[mlx]'")

from redrafter.bench.mlx_equal import compare, open_both, shortest, summarise
from redrafter.bench.prompts import load_prompts
from redrafter.models import DEFAULT_MODEL, home

PROMPTS = Path(__file__).parents[3] / "shared" / "prompts" / "specbench_dev.jsonl"
COUNT, TOKENS = 50, 64

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not PROMPTS.is_file(), reason="the prompts (../shared/prompts) are absent"),
    pytest.mark.skipif(not (home() / "models" / DEFAULT_MODEL).is_dir(), reason=f"{DEFAULT_MODEL} was not fetched yet"),
]


def test_torch_and_mlx_give_equal_ids(capsys: pytest.CaptureFixture[str]) -> None:
    """Every second prompt is sampled. A difference is allowed where two tokens are as good as tied, and listed."""

    def tell(records: list[dict]) -> None:
        with capsys.disabled():
            print(f"{len(records)} of {COUNT}: {records[-1]}", flush=True)

    records = compare(*open_both(DEFAULT_MODEL, "auto"), shortest(load_prompts(PROMPTS), COUNT), TOKENS, [], tell)
    found = summarise(records)
    assert found["prompts"] == COUNT and found["equal_prompts"] + found["ties"] == COUNT
    assert found["equal_prompts"] >= COUNT - 1
