"""Milliseconds per step on MLX: plain and some beam shapes, compiled and not, and mlx-lm's own forward.

python3 benchmarks/gpu/mlx_steps.py MODEL_FOLDER DRAFTER_FOLDER [WIDTHxLENGTHxNODES ...]

``write`` is the host's time to start a step, ``step`` the time of a step when the host stays one ahead: where both are
alike, the host is what limits.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

from redrafter.engine import first_state
from redrafter.load import load
from redrafter.models import resolve
from redrafter.params import PLAIN, DecodeConfig

CACHED, STEPS = 192, 40


def main() -> None:
    model, drafter, *asked = sys.argv[1:]
    sizes = [tuple(map(int, text.split("x"))) for text in asked or ["2x4x8", "4x4x16", "4x5x20", "4x6x24", "8x6x32"]]
    configs = [PLAIN, *(DecodeConfig(beam_width=w, branching=w, draft_length=n, tree_size=t) for w, n, t in sizes)]
    device = "gpu" if mx.is_available(mx.gpu) else "cpu"
    backend: Any = load(resolve(model), Path(drafter), backend="mlx", device=device, config=PLAIN).backend
    backend.reserve(1, CACHED + 10 * STEPS)
    print(f"mlx-lm {_mlx_lm(backend):.2f} ms per token", flush=True)
    for compiled in (True, False):
        backend.steps.compiled = compiled
        for config in configs:
            started = time.perf_counter()
            _steps(backend, config, 3)
            first = time.perf_counter() - started
            write, step = _steps(backend, config, STEPS)
            shape = f"{config.beam_width}x{config.draft_length}x{config.tree_size}" if config != PLAIN else "plain"
            kind = "compiled" if compiled else "eager"
            print(f"{kind:9}{shape:9} write {write:6.2f} step {step:6.2f} ms, first {first:.1f} s", flush=True)


def _steps(backend: Any, config: DecodeConfig, count: int) -> tuple[float, float]:
    """Milliseconds to start a step and per step; a step's outcome is read after the next was started."""
    state = first_state(backend, config, backend.prefill(0, []), root=1, length=CACHED)
    backend.synchronize()
    handle, writing = None, 0.0
    started = time.perf_counter()
    for _ in range(count):
        before = time.perf_counter()
        state, accepted, tree = backend.step(state, config)
        told = backend.fetch(accepted, tree)
        writing += time.perf_counter() - before
        if handle is not None:
            backend.read(handle)
        handle = told
    backend.read(handle)
    return 1e3 * writing / count, 1e3 * (time.perf_counter() - started) / count


def _mlx_lm(backend: Any) -> float:
    """Milliseconds per token of ``generate_step``."""
    from mlx_lm.generate import generate_step

    for count in (5, STEPS):
        tokens = generate_step(mx.arange(1, CACHED), backend.target.model, max_tokens=count + 1)
        next(tokens)
        started = time.perf_counter()
        for _ in tokens:
            pass
        elapsed = time.perf_counter() - started
    return 1e3 * elapsed / STEPS


if __name__ == "__main__":
    main()
