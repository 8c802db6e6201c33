"""What a step costs, part by part, against what its bytes would take: apart from the timed runs, on graphs of its own.

The parts are recorded one by one as the whole step is (on a CPU they just run) and timed by turns; medians count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from redrafter.algorithm.beam import no_beams
from redrafter.algorithm.tree import pack
from redrafter.backends.torch.graph import without_reading
from redrafter.backends.torch.linear import PackedLinear
from redrafter.backends.torch.load import TorchBackend
from redrafter.bench.metrics import NEEDS_CUDA
from redrafter.engine import first_state
from redrafter.params import PLAIN, DecodeConfig

CACHED_TOKENS = 320
"""A question and half an answer of 256 tokens."""
READ_BYTES = 4 * 2**30
AHEAD_CYCLES = 2_000_000
"""About a millisecond. A host that launches slowly, or many kernels, would else be timed too."""
UNITS = NEEDS_CUDA


def roofline(backend: TorchBackend, shape: DecodeConfig, repeats: int = 30) -> dict[str, Any]:
    """Metrics named in UNITS, and ``phases``: milliseconds of every part of a step of one greedy request.

    plain_bandwidth_share: bytes of the weights and of the cached keys and values that a plain step reads, over its
    time, over the bandwidth of a kernel that does nothing but read; verify_ratio: the forward over ``shape``'s tree
    over that over one row; step_extra_share: what a speculative step takes beside its forward, over a plain step.
    """
    clock = Clock(backend.device)
    parts = _parts(backend, shape)
    seconds = clock.by_turns({name: clock.recorded(part) for name, part in parts.items()}, repeats)
    ms = {name: 1e3 * value for name, value in seconds.items()}
    plain, whole = ms["plain step"], ms["speculative step"]
    read, copy = _bandwidth(backend.device, clock)
    moved = step_bytes(backend)
    return {
        "plain_step_ms": plain,
        "plain_bandwidth_share": moved / seconds["plain step"] / read,
        "verify_ratio": ms["verify tree"] / ms["verify one row"],
        "step_extra_share": (whole - ms["verify tree"]) / plain,
        "step_ratio": whole / plain,
        "read_bandwidth": read / 1e9,
        "copy_bandwidth": copy / 1e9,
        "bytes_per_plain_step": moved,
        "phases": ms,
    }


def step_bytes(backend: TorchBackend) -> int:
    """Bytes that one row's step reads: every weight but the embedding (a row of it), keys and values."""
    model = backend.target.model
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
    weights = {p.data_ptr(): p for p in model.parameters()}
    if isinstance(head, PackedLinear) or head.weight.data_ptr() != embedding.data_ptr():
        weights.pop(embedding.data_ptr(), None)
    packed = [m.weight_bytes for m in model.modules() if isinstance(m, PackedLinear)]
    own = sum(p.numel() * p.element_size() for p in weights.values()) + sum(packed)
    return own + backend.target.cache.bytes_for(1, CACHED_TOKENS)


def _parts(backend: TorchBackend, shape: DecodeConfig) -> dict[str, Callable[[], Any]]:
    ops, target, drafter = backend.ops, backend.target, backend.drafter
    backend.reserve(1, CACHED_TOKENS + shape.tree_size + shape.deepest + 2)
    stages = backend.stages
    state = first_state(backend, shape, backend.no_features(), root=1, length=CACHED_TOKENS)
    beams = stages.draft(ops, drafter, state.reading, state.root, shape, None)
    tree = stages.pack(ops, beams, state.root, shape.tree_size)
    one = pack(ops, no_beams(ops, state.root), state.root, 1)
    logits, _ = target.verify(tree, state.lengths)
    logits = logits.clone()
    accepted = stages.choose_accept(ops, logits, tree, state.sampling, None, shape.deepest + 1)
    whole = getattr(backend, "whole_step", backend.step)  # what a graph records, or the step itself
    return {
        "plain step": lambda: whole(without_reading(state), PLAIN),
        "speculative step": lambda: whole(state, shape),
        "draft": lambda: stages.draft(ops, drafter, state.reading, state.root, shape, None),
        "pack": lambda: stages.pack(ops, beams, state.root, shape.tree_size),
        "verify tree": lambda: target.verify(tree, state.lengths),
        "verify one row": lambda: target.verify(one, state.lengths),
        "choose and accept": lambda: stages.choose_accept(ops, logits, tree, state.sampling, None, shape.deepest + 1),
        "commit": lambda: target.commit(state.lengths, accepted),
    }


class Clock:
    """Times functions on one device: as CUDA graphs between two events, or by the wall."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._device = device

    def recorded(self, function: Callable[[], Any]) -> Callable[[], Any]:
        if not self.cuda:
            return function
        from redrafter.backends.torch.graph import CudaRecorder

        function()  # kernels compile
        return CudaRecorder(self._device)(function)[0]

    def once(self, function: Callable[[], Any]) -> float:
        """Seconds."""
        if not self.cuda:
            started = time.perf_counter()
            function()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD_CYCLES)  # what follows is in the queue before the device gets to it
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def by_turns(self, functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
        taken: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(repeats + 2):
            for name, function in functions.items():
                taken[name].append(self.once(function))
        return {name: statistics.median(values[2:]) for name, values in taken.items()}


def _bandwidth(device: torch.device, clock: Clock) -> tuple[float, float]:
    """Bytes per second that a device reads, and that it copies (read and written both counted)."""
    size = READ_BYTES if device.type == "cuda" else READ_BYTES // 16
    source = torch.ones(size // 2, dtype=torch.bfloat16, device=device)
    reader: Callable[[], Tensor | None] = lambda: source.view(torch.int64).amax()  # noqa: E731
    if device.type == "cuda":
        from redrafter.backends.torch.kernels.read import read_all

        sums = torch.empty(2**20, dtype=torch.float32, device=device)
        reader = lambda: read_all(source, sums)  # noqa: E731
    target = torch.empty_like(source)
    taken = clock.by_turns({"read": clock.recorded(reader), "copy": clock.recorded(lambda: target.copy_(source))}, 7)
    return size / taken["read"], 2 * size / taken["copy"]
