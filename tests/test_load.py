"""Which backend a name means, here and elsewhere."""

from __future__ import annotations

import platform
import sys

import pytest

from redrafter import LLM
from redrafter import load as loading
from redrafter.errors import InvalidRequest
from redrafter.load import pick_backend


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    def pretend(system: str, processor: str, *installed: str) -> None:
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(platform, "machine", lambda: processor)
        monkeypatch.setattr(loading, "find_spec", lambda name: name if name in installed else None)

    return pretend


WHOLE = ("mlx", "mlx.core", "mlx_lm")


def test_auto_is_mlx_on_apple_silicon_only_where_it_is_installed(machine) -> None:
    machine("darwin", "arm64", *WHOLE)
    assert pick_backend("auto") == "mlx" and pick_backend("torch") == "torch"
    machine("darwin", "arm64")
    assert pick_backend("auto") == "torch"
    machine("darwin", "x86_64", *WHOLE)
    assert pick_backend("auto") == "torch"
    machine("linux", "aarch64", *WHOLE)
    assert pick_backend("auto") == "torch" and pick_backend("mlx") == "mlx"


@pytest.mark.parametrize(
    ("installed", "named"), [((), "mlx, mlx_lm"), (("mlx", "mlx.core"), "mlx_lm"), (("mlx", "mlx_lm"), "mlx")]
)
def test_mlx_asked_for_and_absent_is_one_line_with_the_way_to_install_it(machine, installed, named) -> None:
    machine("linux", "x86_64", *installed)
    with pytest.raises(InvalidRequest) as raised:
        pick_backend("mlx")
    assert str(raised.value) == f"backend='mlx': {named} cannot be imported; pip install 'redrafter[mlx]'"


def test_mlx_is_missed_before_a_model_is_looked_for(machine) -> None:
    machine("linux", "x86_64")
    with pytest.raises(InvalidRequest, match="mlx"):
        LLM.from_pretrained("no such model", backend="mlx")


def test_an_unknown_backend() -> None:
    with pytest.raises(InvalidRequest, match="backend='metal' is unknown: use one of auto, torch, mlx"):
        pick_backend("metal")
