"""Where a step's time goes on MLX: plain, the parts of a speculative step, whole steps.

python3 benchmarks/gpu/mlx_steps.py MODEL_FOLDER DRAFTER_FOLDER [WIDTHxLENGTHxNODES ...] [--profile] [--compiled]

The most telling numbers come first and every line is printed when it is known. ``write`` is the host's time to start
a step, ``step`` the time of a step when the host stays one ahead: where both are alike, the host is what limits.
``first``: seconds until the first time was over, most of them for compiling kernels. ``--profile``: the kernels that
take longest, as torch's profiler sees those of the whole process (CUDA only). ``--compiled``: whole steps by
``mx.compile`` too, for which MLX compiles a minute or more on CUDA.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_phases import phases, run

from redrafter.backends.mlx.compiled import Steps
from redrafter.engine import first_state
from redrafter.load import load
from redrafter.models import resolve
from redrafter.params import PLAIN, DecodeConfig

CACHED, SLOTS = 192, 1024
STEPS = 20 if mx.is_available(mx.gpu) else 2
SINCE = time.perf_counter()


def main() -> None:
    model, drafter, *asked = [word for word in sys.argv[1:] if not word.startswith("--")]
    names = asked or ["4x4x16", "8x4x32", "8x5x48", "8x6x64"]
    sizes = [tuple(map(int, name.split("x"))) for name in names]
    configs = [DecodeConfig(beam_width=w, branching=w, draft_length=n, tree_size=t) for w, n, t in sizes]
    device = "gpu" if mx.is_available(mx.gpu) else "cpu"
    backend: Any = load(resolve(model), Path(drafter), backend="mlx", device=device, config=PLAIN).backend
    backend.reserve(1, SLOTS)
    tell("loaded")
    for nodes in (1, 8, 16, 32):
        timed(f"products of {nodes} rows", lambda nodes=nodes: products(backend.target, nodes))
    for compiled in (False, True)[: 1 + ("--compiled" in sys.argv)]:
        backend.steps.compiled = compiled
        whole("plain", backend, PLAIN)
        if not compiled:
            tell(f"mlx-lm {_mlx_lm(backend):.2f} ms per token")
            parts(backend, configs[0])
        for config, size in zip(configs, names, strict=True):
            whole(f"whole {size}", backend, config)


def tell(line: str) -> None:
    print(f"{time.perf_counter() - SINCE:6.1f} s  {line}", flush=True)


def timed(name: str, start: Callable[[], Any], count: int = STEPS) -> None:
    """Milliseconds from one call to the next, and to write one down."""
    began = time.perf_counter()
    start()
    mx.synchronize()
    first, began, writing = time.perf_counter() - began, time.perf_counter(), 0.0
    for _ in range(count):
        before = time.perf_counter()
        start()
        writing += time.perf_counter() - before
    mx.synchronize()
    elapsed = time.perf_counter() - began
    tell(f"{name:24} write {1e3 * writing / count:6.2f} step {1e3 * elapsed / count:6.2f} ms, first {first:.1f} s")


def products(target: Any, rows: int) -> None:
    """Every layer's four products and the head's, one after the other, and nothing else."""
    x = mx.ones((1, rows, target.hidden_size), dtype=target.mlx_dtype)
    for layer, (attention, mlp) in zip(target.model.model.layers, target._layers, strict=True):
        q, o_proj = attention._qkv(x), layer.self_attn.o_proj
        x = o_proj(q[..., : q.shape[-1] * attention.heads // (attention.heads + 2 * attention.kv_heads)])
        both = mlp._both(x)
        x = layer.mlp.down_proj(both[..., : both.shape[-1] // 2])
    mx.async_eval(target._logits(x))


def parts(backend: Any, config: DecodeConfig) -> None:
    compiled = backend.steps.compiled
    kind = "compiled" if compiled else "eager"
    state = first_state(backend, config, backend.prefill(0, []), root=1, length=CACHED)
    slots = backend.target.cache.round_up(CACHED + config.tree_size)
    found = phases(backend, state, config)
    for part in sorted(found, key=lambda part: part.name not in ("verify", "draft")):
        steps = Steps(part.function, compiled)
        timed(f"{kind} {part.name}", lambda part=part, steps=steps: run(part, steps, config, slots))


def whole(name: str, backend: Any, config: DecodeConfig) -> None:
    """A step's outcome is read after the next was started."""
    kind = "compiled" if backend.steps.compiled else "eager"
    state = [first_state(backend, config, backend.prefill(0, []), root=1, length=CACHED), None]

    def one() -> None:
        after, accepted, tree = backend.step(state[0], config)
        told = backend.fetch(accepted, tree)
        if state[1] is not None:
            backend.read(state[1])
        state[:] = after, told

    timed(f"{kind} {name}", one)
    if "--profile" in sys.argv:
        kernels(one)


def kernels(one: Callable[[], None], count: int = 5) -> None:
    """Microseconds of a step, launches and microseconds of each, of the kernels that take longest."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.zeros(1, device="cuda")  # without a context of its own it sees nothing
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(count):
            one()
        mx.synchronize()
    found: dict[str, list[float]] = {}
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name.removeprefix("void mlx::core::cu::")[:90], []).append(
                event.time_range.elapsed_us()
            )
    busy, launches = (sum(map(of, found.values())) / count for of in (sum, len))
    tell(f"{busy:.0f} us of {launches:.0f} kernels")
    for name, times in sorted(found.items(), key=lambda item: -sum(item[1]))[:20]:
        each = sum(times) / len(times)
        print(f"    {sum(times) / count:8.1f} us {len(times) / count:6.1f} x {each:7.2f}  {name}", flush=True)


def _mlx_lm(backend: Any) -> float:
    """Milliseconds per token of ``generate_step``."""
    from mlx_lm.generate import generate_step

    for count in (3, STEPS):
        tokens = generate_step(mx.arange(1, CACHED), backend.target.model, max_tokens=count + 1)
        next(tokens)
        started = time.perf_counter()
        for _ in tokens:
            pass
        elapsed = time.perf_counter() - started
    return 1e3 * elapsed / STEPS


if __name__ == "__main__":
    main()
