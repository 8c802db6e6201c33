"""Time of decoder layers by how many nodes go through them, with random weights: no model is needed, and a minute.

    python benchmarks/gpu/layers.py --shape llama-2-7b --nodes 1 16 32 48 64
    python benchmarks/gpu/layers.py --nodes 64 --cut 22016,4096=64,128,1,4,3,1,0,1 --cut 4096,11008=32,128,1,4,6,1

A chain of layers, each with its own weights, runs in one CUDA graph over a text of ``--text`` tokens; graphs take
turns, and medians are shown. ``--cut`` tries another ``stream.Cut`` for the product with a weight of that size (gates
and ups are one weight): block of outputs, of inputs, parts, warps, stages, x first, ahead, late. A kernel that is
faster alone may be slower among others, so this comes after ``cuts.py`` and before a campaign.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from redrafter.backends.torch.kernels import layer as layer_module
from redrafter.backends.torch.kernels.attention import ancestor_words
from redrafter.backends.torch.kernels.commit import KernelCache
from redrafter.backends.torch.kernels.layer import FusedCudaLayer
from redrafter.backends.torch.kernels.matmul import Workspace
from redrafter.backends.torch.kernels.stream import Cut, stream

SHAPES: dict[str, tuple[int, dict[str, Any]]] = {  # layers whose weights are more than the L2 cache holds
    "llama-2-7b": (12, {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}),
    "smollm2-135m": (
        30,
        {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
}
Cuts = dict[tuple[int, ...], Cut]


class Chain:
    """Layers behind one another."""

    def __init__(self, config: LlamaConfig, layers: int, text: int, dtype: torch.dtype, device: torch.device) -> None:
        self.text, self.layers = text, []
        self.width = config.hidden_size // config.num_attention_heads
        workspace = Workspace(device, floats=16 * 64 * 16384)
        for index in range(layers):
            layer = LlamaDecoderLayer(config, index).to(device, dtype)
            for weight in layer.parameters():
                torch.nn.init.normal_(weight, 1.0 if weight.ndim == 1 else 0.0, 0.02)
            self.layers.append(FusedCudaLayer(layer, workspace).requires_grad_(False))
        for layer, following in pairwise(self.layers):
            layer.next_norm = following.input_norm
        self.cache = KernelCache(layers, config.num_key_value_heads, self.width, dtype, device)
        self.cache.reserve(1, text + 128)
        self.kept: list[Any] = []
        """what recorded graphs read"""
        self.like = torch.empty(0, config.hidden_size, dtype=dtype, device=device)

    def inputs(self, nodes: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Hidden states, mask and angles of a chain of nodes behind the text."""
        device, random = self.like.device, self.like.new_empty(1, nodes, self.like.shape[1]).normal_
        words = ancestor_words(torch.ones(1, nodes, nodes, dtype=torch.bool, device=device).tril())
        length = torch.full((1, nodes, 1), self.text, device=device)
        slots, angle = self.text + torch.arange(nodes, device=device)[None], self.like.new_ones(1, nodes, self.width)
        self.cache.place(0, slots, self.text + 128)
        found = random(), torch.cat([words, length], dim=2)[:, None].contiguous(), (angle, angle)
        self.kept.append((slots, found))
        return found

    def __call__(self, x: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask, rope, cache=self.cache)
        return x


@contextmanager
def cuts_tried(cuts: Cuts) -> Iterator[None]:
    def other(x: Any, weight: Tensor, *rest: Any, **named: Any) -> Any:
        return stream(x, weight, *rest, **named, cut=cuts.get(tuple(weight.shape)))

    with patch.object(layer_module, "stream", other):
        yield


def recorded(chain: Chain, nodes: int, cuts: Cuts) -> torch.cuda.CUDAGraph:
    inputs = chain.inputs(nodes)
    with cuts_tried(cuts):
        chain(*inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain(*inputs)
    return graph


def microseconds(graph: torch.cuda.CUDAGraph, layers: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / layers


def cut_of(text: str) -> tuple[tuple[int, ...], Cut]:
    size, values = ([int(n) for n in part.split(",")] for part in text.split("="))
    return tuple(size), Cut(*values[:5], *map(bool, values[5:]))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-2-7b")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 16, 32, 48, 64])
    parser.add_argument("--text", type=int, default=300, help="tokens before the nodes")
    parser.add_argument("--cut", type=cut_of, action="append", default=[], metavar="OUTPUTS,INPUTS=CUT")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    layers, sizes = SHAPES[args.shape]
    chain = Chain(LlamaConfig(**sizes), layers, args.text, torch.bfloat16, torch.device("cuda"))
    tried: dict[str, Cuts] = {"as it is": {}} | {f"{size}: {tuple(cut)}": {size: cut} for size, cut in args.cut}
    graphs = {(n, name): recorded(chain, n, cuts) for n in args.nodes for name, cuts in tried.items()}
    taken: dict[Any, list[float]] = {key: [] for key in graphs}
    for _ in range(args.rounds):
        for key, graph in graphs.items():
            taken[key].append(microseconds(graph, layers))
    for (nodes, name), times in taken.items():
        low, middle, high = statistics.quantiles(times, n=4)
        print(f"{nodes:3d} nodes {middle:7.2f} us a layer ({low:.2f} to {high:.2f})  {name}")


if __name__ == "__main__":
    main()
