"""How many kernels a step of MLX starts, by part of the step, and how many different fused ones there are.

python3 benchmarks/gpu/mlx_launches.py MODEL_FOLDER DRAFTER_FOLDER [WIDTHxLENGTHxNODES ...]

Nothing is computed but one eager step: the compiled functions are written down and their operations counted. What only
renames memory (a reshape, a slice, a transposition) counts as nothing, a joining of n arrays as n, a write of rows as
one, a sort or a reduction as one, though a long one may take several. A GPU has kernels for the norm, the rotation and
the attention, which a CPU takes apart: others of one launch stand in for them here.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_phases import phases

from redrafter.backends.mlx.compiled import Steps
from redrafter.engine import first_state
from redrafter.load import load
from redrafter.models import resolve
from redrafter.params import PLAIN, DecodeConfig

CACHED, SLOTS = 100, 256
VIEWS = {
    *("Reshape", "Transpose", "Slice", "Broadcast", "BroadcastAxes", "ExpandDims", "Squeeze", "Split", "Flatten"),
    *("Unflatten", "AsStrided", "StopGradient", "Depends", "Copy", "View"),
}


def main() -> None:
    model, drafter, *asked = sys.argv[1:]
    verbose = "-v" in asked
    sizes = [tuple(map(int, text.split("x"))) for text in asked if text != "-v"] or [(4, 4, 16)]
    backend: Any = load(
        resolve(model), Path(drafter), backend="mlx", device="cpu", dtype="bfloat16", config=PLAIN
    ).backend
    backend.reserve(1, SLOTS)
    for attention, _ in backend.target._layers:
        attention.side_by_side = True  # as on CUDA
    settings = backend.drafter.drafter.config
    wide = {"gru": 3, "rnn": 1}.get(settings.cell)
    if wide:  # a table is looked into there
        backend.drafter._table = mx.zeros((settings.vocab_size, wide * settings.state_size), dtype=mx.bfloat16)
    state = first_state(backend, PLAIN, backend.prefill(0, [5] * CACHED), root=1, length=CACHED)
    print(f"{'':24}launches fused kinds")
    show("plain", backend._whole_step, state, PLAIN, [backend.target.cache], verbose)
    for width, length, nodes in sizes:
        config = DecodeConfig(beam_width=width, branching=width, draft_length=length, tree_size=nodes)
        start = first_state(backend, config, state.reading.features[0, 0], root=1, length=CACHED)
        name = f"{width}x{length}x{nodes} "
        show(name + "step", backend._whole_step, start, config, backend._caches, verbose)
        for part in phases(backend, start, config):
            show(name + part.name, part.function, part.arrays, config, part.caches, verbose)


def show(name: str, function: Any, arrays: Any, config: DecodeConfig, caches: list, verbose: bool) -> None:
    counts = launches(function, arrays, config, caches)
    fused = {kind: n for kind, n in counts.items() if kind.startswith("Compiled")}
    print(f"{name:24}{sum(counts.values()):8}{sum(fused.values()):6}{len(fused):6}", flush=True)
    if verbose:
        for kind, n in counts.most_common():
            print(f"    {n:5} {kind}")


def launches(function: Any, arrays: Any, config: DecodeConfig, caches: list) -> Counter[str]:
    """By operation: how many kernels the compiled function starts, written down and not run."""
    steps = Steps(function, True)
    kernels = mx.fast.rms_norm, mx.fast.rope, mx.fast.scaled_dot_product_attention
    told: list[Any] = []
    steps.start = lambda *results: told.extend(results)  # type: ignore[method-assign]
    before = [cache.arrays for cache in caches]
    try:
        mx.fast.rms_norm, mx.fast.rope, mx.fast.scaled_dot_product_attention = _norm, _rope, _attention
        steps(arrays, config, caches, (SLOTS,) * len(caches))
        with tempfile.NamedTemporaryFile("w+", suffix=".dot") as file:
            mx.export_to_dot(file.name, told)
            return count(Path(file.name).read_text())
    finally:
        mx.fast.rms_norm, mx.fast.rope, mx.fast.scaled_dot_product_attention = kernels
        for cache, arrays in zip(caches, before, strict=True):
            cache.arrays = arrays


def _norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    return mx.cumsum(x, axis=-1)


def _rope(x: mx.array, dims: int, **_: Any) -> mx.array:
    return mx.cumprod(x, axis=-1)


def _attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | None) -> mx.array:
    return (
        mx.cumsum(q, axis=-1)
        if mask is None
        else mx.addmm(q, mx.broadcast_to(mask, (*q.shape[:3], mask.shape[3])), v[:, :1])
    )


def count(dot: str) -> Counter[str]:
    kinds = dict(re.findall(r'\{ (\d+) \[label ="(\w+)"', dot))
    into = Counter(re.findall(r'^"[^"]+" -> (\d+)$', dot, re.MULTILINE))
    counts: Counter[str] = Counter()
    for node, kind in kinds.items():
        if kind not in VIEWS:
            counts[kind] += into[node] if kind == "Concatenate" else 1
    return counts


if __name__ == "__main__":
    main()
