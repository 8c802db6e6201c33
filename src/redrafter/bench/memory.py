"""Peak memory of plain and of speculative decoding on an NVIDIA GPU, counted apart from the timed runs.

Both ways run in one process, so that what only speculation needs is there while plain decoding is counted. It is taken
off again: tensors that only the drafter holds, and cache slots beyond the context, into which trees are written.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from redrafter.bench.control import with_shape
from redrafter.bench.measure import Plan, run_batch, settings_of
from redrafter.params import PLAIN, DecodeConfig

if TYPE_CHECKING:
    from redrafter.backends.torch.load import TorchBackend
    from redrafter.bench.prompts import BenchPrompt
    from redrafter.llm import LLM

TOKENS = 32
"""Of each answer: caches and steps have their sizes from the first token on."""
PLAIN_SLOTS = 2
"""Cache slots that plain decoding needs beyond the context: for the root, and for a step ahead of an answer's end."""


def memory(llm: LLM, shape: DecodeConfig, batch: Sequence[BenchPrompt], plan: Plan) -> dict[str, Any]:
    """Metrics in bytes, and ``memory_overhead``, the two peaks' ratio. ``shape``: of the speculative steps.

    Each way answers the batch with all its steps and prompts recorded anew: a graph's own memory is counted when it is
    recorded and not when it is replayed. What was recorded before is kept for later and taken off.
    """
    backend: Any = llm.engine.backend
    settings = settings_of(replace(plan.params, max_new_tokens=min(TOKENS, plan.params.max_new_tokens)), 0, len(batch))

    def peak(config: DecodeConfig) -> int:
        alone = with_shape(llm, config)
        with backend.recorded_anew():
            return peak_of(backend.device, lambda: run_batch(alone, list(batch), settings, True)) - kept

    kept, drafter, spare = kept_bytes(backend), drafter_bytes(backend), spare_cache_bytes(backend)
    plain, speculative = peak(PLAIN) - drafter - spare, peak(shape)
    return {
        "plain_peak_memory_bytes": plain,
        "speculative_peak_memory_bytes": speculative,
        "memory_overhead": speculative / plain,
        "memory_overhead_bytes": speculative - plain,
        "drafter_resident_bytes": drafter,
        "spare_cache_bytes": spare,
    }


def peak_of(device: torch.device, run: Callable[[], Any]) -> int:
    """The most bytes that torch had allocated on the GPU while ``run`` ran, what was there before included."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def drafter_bytes(backend: TorchBackend) -> int:
    """Of all that the drafter holds and the target does not: weights, tables, folded products, keys and values."""
    return _bytes_beside(backend.drafter, backend.target, backend.device)


def kept_bytes(backend: TorchBackend) -> int:
    """Of what the backend holds beside target and drafter: buffers and results of what was recorded."""
    return _bytes_beside(backend, [backend.target, backend.drafter], backend.device)


def _bytes_beside(owner: Any, other: Any, device: torch.device) -> int:
    known = storages(other, device)
    return sum(size for place, size in storages(owner, device).items() if place not in known)


def spare_cache_bytes(backend: TorchBackend) -> int:
    """Of the target's cache slots that plain decoding would not have."""
    cache = backend.target.cache
    return cache.bytes_for(cache.rows, max(0, cache.slots - backend.context_limit - PLAIN_SLOTS))


def storages(owner: Any, device: torch.device) -> dict[int, int]:
    """Place -> bytes of the device's memory behind every tensor that an object holds, through containers, modules and
    classes of this package. Functions are not looked into: what a drafter calls of its target is the target's."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    left = [owner]
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            if item.device.type == device.type:
                place, size = _storage(item)
                found[place] = size
        elif isinstance(item, dict):
            left.extend(item.values())
        elif isinstance(item, list | tuple):
            left.extend(item)
        elif isinstance(item, nn.Module) or type(item).__module__.startswith("redrafter."):
            left.extend(getattr(item, "__dict__", {}).values())
    return found


def _storage(tensor: Tensor) -> tuple[int, int]:
    if tensor.is_mkldnn:  # packed for a CPU: it has no storage that can be named
        return id(tensor), tensor.numel() * tensor.element_size()
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
