"""How a launch of the streamed products (kernels/stream.py) is best cut: every sensible cut, compiled and timed.

    python benchmarks/gpu/cuts.py --shape llama-2-7b --rows 64 16 --workers 16

A product runs over several copies of its weights, so that none comes out of the L2 cache, in one CUDA graph. The best
cuts are printed beside cuBLAS and what ``stream.plan`` takes now. Compiling takes most of the time: ``--workers``
processes do it first, into triton's cache.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from redrafter.backends.torch.kernels.matmul import Workspace
from redrafter.backends.torch.kernels.stream import EARLY_BYTES, Cut, Scaled, plan, stream

SHARED_MEMORY = 228_000
"""bytes of one block on a Hopper GPU, less what triton keeps"""
COPIES_BYTES = 400 << 20
SHAPES = {  # outputs, inputs, gated
    "llama-2-7b": {
        "qkv": (12288, 4096, False),
        "gate_up": (11008, 4096, True),
        "out": (4096, 4096, False),
        "down": (4096, 11008, False),
    },
    "smollm2-135m": {
        "qkv": (960, 576, False),
        "gate_up": (1536, 576, True),
        "out": (576, 576, False),
        "down": (576, 1536, False),
    },
}


class Product:
    """One of a layer's products; out and down add the residual and prepare the norm behind them, the others take it."""

    def __init__(self, name: str, size: tuple[int, int, bool], rows: int, copies: int, device: torch.device) -> None:
        self.name, (outputs, inputs, self.gated), self.rows = name, size, rows
        bf16: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        weights = outputs * (2 if self.gated else 1)
        self.weights = [torch.randn(weights, inputs, **bf16) * 0.02 for _ in range(copies)]
        self.workspace = Workspace(device, floats=16 * 128 * 16384)
        values = torch.randn(rows, inputs, **bf16)
        self.values, self.residual, self.norm = values, None, None
        self.x: Any = values
        if name in ("qkv", "gate_up"):
            self.x = Scaled(values, torch.rand(32, rows, device=device) * inputs / 32, 1e-5)
        else:
            self.residual = torch.randn(rows, outputs, **bf16)
            self.norm = (torch.ones(outputs, **bf16), 1e-5)

    def run(self, cut: Cut | None = None) -> None:
        rest: dict[str, Any] = {"residual_MN": self.residual, "gated": self.gated, "norm": self.norm, "cut": cut}
        for weight in self.weights:
            stream(self.x, weight, workspace=self.workspace, **rest)

    def cublas(self) -> None:
        for weight in self.weights:
            torch.nn.functional.linear(self.values, weight)


class Job(NamedTuple):
    product: Product
    cut: Cut


def cuts(rows: int, outputs: int, inputs: int, gated: bool) -> Iterator[Cut]:
    """Blocks that fit, sums that may be split, and enough programs to occupy the multiprocessors; of small weights also
    ahead of the launch before."""
    small = 2 * outputs * inputs * (2 if gated else 1) <= EARLY_BYTES
    columns = (32, 64, 128, 256) if outputs > 2048 and rows > 32 else (16, 32, 64, 128)
    depths, splits, stage_counts = (64, 128, 256), (1, 2, 3, 4), (3, 4, 6)
    orders = (False, True) if rows > 32 else (False,)
    for BN, BK, split, warps, stages, x_first in itertools.product(
        columns, depths, splits, (2, 4, 8), stage_counts, orders
    ):
        shared = stages * BK * 2 * (BN * (2 if gated else 1) + max(16, rows))
        if shared > SHARED_MEMORY or (split > 1 and gated) or warps not in (max(2, BN // 32), max(4, BN // 16)):
            continue
        if split > 1 and (outputs + BN - 1) // BN * split < 60:
            continue
        for ahead in (False, True) if small else (False,):
            yield Cut(BN, BK, split, warps, stages, x_first, ahead)


def jobs(shape: str, rows: list[int], copies: Callable[[int], int], device: torch.device) -> Iterator[Job]:
    for count, (name, size) in itertools.product(rows, SHAPES[shape].items()):
        product = Product(name, size, count, copies(2 * size[0] * size[1] * (2 if size[2] else 1)), device)
        for cut in cuts(count, *size):
            yield Job(product, cut)


def compile_part(args: argparse.Namespace, device: torch.device) -> None:
    for number, job in enumerate(jobs(args.shape, args.rows, lambda _: 1, device)):
        if number % args.workers == args.part:
            job.product.run(job.cut)
    torch.cuda.synchronize()


def microseconds(run: Callable[[], None], launches: int) -> float:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    taken = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(1e3 * start.elapsed_time(end) / launches)
    return statistics.median(taken)


def show(args: argparse.Namespace, device: torch.device) -> None:
    found = jobs(args.shape, args.rows, lambda size: max(4, COPIES_BYTES // size), device)
    for product, group in itertools.groupby(found, lambda job: job.product):
        count = len(product.weights)
        timed = sorted((microseconds(partial(product.run, job.cut), count), job.cut) for job in group)
        (outputs, inputs), rows = product.weights[0].shape, product.rows
        now = plan(rows, outputs // (2 if product.gated else 1), inputs, product.gated)
        print(f"{product.name}, {rows} rows, {len(timed)} cuts")
        print(f"  {microseconds(product.cublas, count):7.2f} us cuBLAS, the product alone")
        print(f"  {microseconds(product.run, count):7.2f} us now {tuple(now)}")
        for taken, cut in timed[:4]:
            print(f"  {taken:7.2f} us     {tuple(cut)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-2-7b")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 16])
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda")
    if args.part is not None:
        compile_part(args, device)
        return
    parts = [subprocess.Popen([sys.executable, *sys.argv, "--part", str(i)]) for i in range(args.workers)]
    for part in parts:
        part.wait()
    show(args, device)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
