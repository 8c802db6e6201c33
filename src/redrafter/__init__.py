"""Exact speculative decoding with a recurrent drafter: the same tokens from the same model, sooner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from redrafter.params import DecodeConfig, SamplingParams

if TYPE_CHECKING:
    from redrafter.llm import LLM

__all__ = ["LLM", "DecodeConfig", "SamplingParams", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``LLM`` on first use: importing it brings torch, which takes seconds that ``--help`` should not wait for."""
    if name == "LLM":
        from redrafter.llm import LLM

        return LLM
    raise AttributeError(f"module 'redrafter' has no attribute {name!r}")
