"""The interpreter takes more than the compiler does: every kernel compiles for a GPU, which need not be there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be compiled")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from redrafter.algorithm.accept import Accepted
from redrafter.algorithm.sampling import Sampling
from redrafter.algorithm.tree import TokenTree
from redrafter.backends.torch.graph import STOPS, Ends
from redrafter.backends.torch.kernels import accept, beam, early, lookup, noise, pack, state, topk
from redrafter.params import DecodeConfig

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "launch_pdl")
TYPES = {
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
}
MODULES = {beam: "_beam_level", pack: "_pack", accept: "_accept", noise: "_noise", state: "_place"}


def type_of(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(type_of, value))
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype][1:]}{value.block_shape}>"
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


class Compiled:
    """Stands in for a kernel: a launch compiles it for sm_90 with its types and constants, and runs nothing."""

    def __init__(self, kernel: Any, done: list[str]) -> None:
        self.kernel, self.done = kernel, done

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, *values: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        names = self.kernel.arg_names
        given = {**dict(zip(names, values, strict=False)), **named}
        signature, constants, aligned = {}, {}, {}
        for place, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, given.pop(parameter.name)
            if parameter.is_constexpr:
                signature[name], constants[(place,)] = "constexpr", value
            else:
                signature[name] = type_of(value)
                if isinstance(value, torch.Tensor):  # without it nothing is brought ahead
                    aligned[(place,)] = [["tt.divisibility", 16]]
        assert not given, f"{self.kernel.__name__} has no arguments {list(given)}"
        source = ASTSource(self.kernel, signature, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert len(compiled.asm["cubin"]) > 0
        self.done.append(self.kernel.__name__)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> list[str]:
    """Names of the kernels compiled so far."""
    names: list[str] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(early, "_hopper", lambda device: True)
    for module, name in [*MODULES.items(), (accept, "_choose_tiles"), (state, "_advance"), (lookup, "_find_chain")]:
        monkeypatch.setattr(module, name, Compiled(getattr(module, name), names))
    return names


def test_draft_and_pack_compile(done: list[str]) -> None:
    shape = DecodeConfig(beam_width=8, branching=8, draft_length=2, tree_size=64)
    ids, gumbel = torch.arange(5000), torch.zeros(2, 5000)
    geometry = list(beam.levels(shape, 5000))
    pool = beam.new_pool(2, 72 + 13, torch.device("cpu"))
    winners = None
    arrived = torch.zeros(2, dtype=torch.int32)
    for depth in geometry:
        logits = torch.zeros(2, depth.beams, 5000, dtype=torch.bfloat16)
        coupling = topk.Coupling(gumbel, torch.ones(2)) if depth.depth == 2 else None
        chain = lookup.Chain(torch.zeros(2, 15, dtype=torch.int64), torch.zeros(2, 15))
        looked_up = beam.LookedUp(chain, 13) if depth.depth == 2 else None
        winners = beam.beam_level(logits, depth, pool, winners, arrived, ids, coupling, looked_up)
    assert winners is not None
    pack.pack(pack.DraftBeams(*pool, winners.slot, 2), torch.zeros(2, dtype=torch.int64), 64)
    assert done == ["_beam_level"] * 2 + ["_pack"]


def test_the_lookup_compiles(done: list[str]) -> None:
    numbers = torch.ones(3, dtype=torch.int64)
    reading = lookup.Reading(torch.zeros(3, 9, 4), torch.ones(3, 9, dtype=torch.int64), numbers, numbers)
    lookup.find_chain(reading, torch.zeros(4, 3000, dtype=torch.int64), 8)
    assert done == ["_find_chain"]


def test_noise_choose_and_accept_compile(done: list[str]) -> None:
    sampling = Sampling(inverse_temperature=torch.ones(2), key=torch.zeros(2, 2, dtype=torch.int64))
    gumbel = noise.gumbel(sampling.key, torch.zeros(2, dtype=torch.int64), 9, 3000)
    node, mask = torch.zeros(2, 64, dtype=torch.int64), torch.ones(2, 64, 64, dtype=torch.bool)
    tree = TokenTree(node, node, node, mask, mask[:, 0].contiguous())
    sampled = accept.Sampled(gumbel, sampling.inverse_temperature)
    keys = accept.choose_tiles(torch.zeros(2, 64, 3000), node, sampled)
    accept.accept(tree, keys, 9)
    accept.accept(tree, accept.Choice(node, tree.live), 9)
    assert done == ["_noise", "_choose_tiles", "_accept", "_accept"]


def test_what_surrounds_a_forward_compiles(done: list[str]) -> None:
    one, words = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 64, 2, dtype=torch.int64)
    state.place_nodes(words[:, :, 0].contiguous(), words, one, 900)
    features, path = torch.zeros(2, 64, 2304, dtype=torch.bfloat16), words[:, :9, 0].contiguous()
    for ends in (None, Ends(words[:, :STOPS, 0].contiguous(), one)):
        state.advance(features, Accepted(path, one, one, path, one > 0), one, ends)
    assert done == ["_place", "_advance", "_advance"]
