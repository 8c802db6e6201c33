"""mlx-lm's own ``stream_generate`` as a baseline: what a Mac user has today, on the weights that our engine has loaded.

Greedy, one prompt at a time, by turns with the other ways (``measure.py``). Its forward and its cache are its own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from redrafter.errors import InvalidRequest

if TYPE_CHECKING:
    from redrafter.llm import LLM

NAME = "mlx-lm"


class Streamed(NamedTuple):
    token_ids: list[int]
    """without the one that ended it"""
    seconds: float
    """from the first token to the last: reading the prompt is left out"""


class MLXLMBaseline:
    """``folder``: the model's, for mlx-lm's own tokenizer, which turns tokens into text while they come."""

    def __init__(self, llm: LLM, folder: Path) -> None:
        from mlx_lm.tokenizer_utils import load

        backend: Any = llm.engine.backend
        self._model = backend.target.model
        self._tokenizer = load(folder, eos_token_ids=sorted(backend.eos_ids))

    def run(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Streamed:
        from mlx_lm import stream_generate

        tokens: list[int] = []
        first = last = 0.0
        response = None
        for response in stream_generate(self._model, self._tokenizer, list(prompt_ids), max_tokens=max_new_tokens):
            last = time.perf_counter()
            first = first or last
            tokens.append(response.token)
        if response is not None and response.finish_reason == "stop":
            tokens.pop()
        return Streamed(tokens, last - first)


def open_baseline(name: str, llm: LLM, folder: Path, batch: int, temperature: float) -> MLXLMBaseline:
    """Raises InvalidRequest for a name that is not known and for a run that it cannot be compared with."""
    if name != NAME:
        raise InvalidRequest(f"--baseline {name!r} is unknown: use {NAME}")
    if type(llm.engine.backend).__module__ != "redrafter.backends.mlx.load":
        raise InvalidRequest(f"--baseline {NAME} runs on MLX: add --backend mlx")
    if batch != 1 or temperature != 0:
        raise InvalidRequest(
            f"--baseline {NAME} is greedy, one prompt at a time: --batch {batch} and --temperature {temperature:g} "
            "must be 1 and 0"
        )
    return MLXLMBaseline(llm, folder)


def against(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tokens per second of both after the first token, all prompts summed first, and their ratio."""

    def rate(prefix: str) -> float | None:
        seconds = sum(r[f"{prefix}_seconds_after_first"] for r in records)
        return sum(r[f"{prefix}_tokens_after_first"] for r in records) / seconds if seconds else None

    ours, theirs = rate("plain"), rate("mlxlm")
    return {
        "mlxlm_tokens_per_second": theirs,
        "mlxlm_equal_prompts": sum(bool(r["mlxlm_equal"]) for r in records),
        "plain_vs_mlxlm": ours / theirs if ours and theirs else None,
    }
