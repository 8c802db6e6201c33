"""The drafter's part of the instrument (``widen.py``): a small drafter's function at a wide drafter's cost.

The drafter's norms have no weights, and its context may become its first state, where no scale could be undone. So the
trunk keeps the root mean square as it is: it writes x a second time, sqrt(D_w / D_s - 1) times as large, into the
channels that follow, and readers take half from each. What comes from the target is padded with zeros and its norm
comes out sqrt(D_w / D_s) times as large, which the next matrix undoes. Its eps of 1e-6 then weighs D_w / D_s times as
much, a relative change of (D_w / D_s - 1) eps / (2 ms) for a mean square ms: 3e-4 for embeddings of 0.1 in a 7B shape,
less than bfloat16 rounds.

``width`` 0: a drafter as wide as its target, the trunk with the wide target's heads. Nobody would train that for 7B.
Another width: features come in as wide as the target's, embeddings through ``embed_proj`` (an identity among random
weights), and the trunk's heads stay as wide as they were. Such a width is at least twice the small drafter's, 1152 for
the shipped one: the context's norm has no weights and its result is the first state, so no scale may change, and only a
second copy of every channel can see to that. ``bind`` multiplies the target's head rows with ``exit``, here as in any
drafter; no zeros are left in the [V_d, exit_dim] that a depth reads.

The shipped drafter in the shape of Llama-2-7B, MB in bfloat16:
    width, exit_dim   read per depth, zeros   with a token table (its size)   once per step
    4096, 4096        436, 8 %                336 (1208)                      503
    1152, 1024        66, 10 %                48 (340)                        70
    1152, 576         48, 8 %                 30 (340)                        70
Share of weights that are zero at width 1152, exit_dim 1024: fuse, trunk q, k, o, gate, down 0, v and up 50 %,
embed_proj 14 %, gru_w 0, gru_u 25 %, input_proj 58 %, block 25 %.

Expansion, window, layers, vocabulary stay. Share of weights that are zero at width 0, in the shape of Llama-2-7B | of
Qwen2.5-1.5B: fuse 10 % | 9 %, trunk q 4 % | 28 %, k 0,
v 24 % | 38 %, o 10 % | 22 %, gate 0, up 24 % | 47 %, down 10 % | 9 %, gru 6 % | 12 %, input_proj 25 % | 54 %,
block and exit 12 % | 23 %.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from transformers import LlamaConfig

from redrafter.backends.torch.drafter import Drafter
from redrafter.bench.widen import STD, Axis, Heads, Part, fill, first, heads_of, layer_axes, place_heads
from redrafter.drafter_config import DrafterConfig
from redrafter.errors import InvalidRequest


def wide_drafter_config(small: DrafterConfig, wide: LlamaConfig, width: int = 0, exit_dim: int = 0) -> DrafterConfig:
    """``width`` and ``exit_dim`` 0 widen in proportion. A state as wide as the drafter stays so, another keeps its
    width. Raises InvalidRequest."""
    if small.cell == "medusa":
        raise InvalidRequest("cell='medusa' adds to a norm that widening scales: use a drafter with another cell")
    if small.vocab_size != wide.vocab_size:
        raise InvalidRequest(f"the drafter's vocabulary is {small.vocab_size} and the wide target's {wide.vocab_size}")
    old, width = small.width, width or small.width * wide.hidden_size // small.hidden_size
    narrow = width != wide.hidden_size
    if width < old or wide.hidden_size < small.hidden_size or (small.fused and old < width < 2 * old):
        raise InvalidRequest(f"width={width} is too small for a drafter of {old}: use {old} or at least {2 * old}")
    if narrow and not (small.fused and small.cell in ("gru", "rnn")):
        raise InvalidRequest(
            f"a drafter with a bare context or cell={small.cell!r} is as wide as its target: use width=0, not {width}"
        )
    if small.projected and not narrow:
        raise InvalidRequest(f"width={width} would leave out the drafter's projection: use another than the target's")
    heads = _trunk_heads(small, width) if narrow else heads_of(wide)
    state = width if small.state_size == old else small.state_size
    projected = small.exit_dim != old + small.state_size
    result = replace(
        small,
        hidden_size=wide.hidden_size,
        width=width,
        num_target_layers=wide.num_hidden_layers,
        state_size=state,
        exit_dim=(exit_dim or small.exit_dim * width // old) if projected else width + state,
        trunk_heads=heads.query if small.trunk_heads else 0,
        trunk_kv_heads=heads.kv if small.trunk_heads else 0,
    )
    if projected and (result.exit_dim == width + state or result.exit_dim < small.exit_dim):
        raise InvalidRequest(
            f"exit_dim={result.exit_dim} must be at least {small.exit_dim} and not {width + state}, context + state, "
            "which has no projection"
        )
    if not projected and exit_dim not in (0, width + state):
        raise InvalidRequest(f"exit_dim={exit_dim} would need a projection that the drafter has not: leave it at 0")
    return result


def _trunk_heads(small: DrafterConfig, width: int) -> Heads:
    """As many heads of the small drafter's width as ``width`` holds, grouped as there."""
    if not small.trunk_heads:
        return Heads(0, 0, 0)
    size, group = small.width // small.trunk_heads, small.trunk_heads // small.trunk_kv_heads
    if width % (size * group):
        raise InvalidRequest(
            f"width={width} must hold groups of {group} heads of {size}: use a multiple of {size * group}"
        )
    return Heads(width // size, width // size // group, size)


def join(*axes: tuple[int, Axis]) -> Axis:
    """One axis after the other; each comes with its number of small channels."""
    parts: list[Part] = []
    free, small, wide = [torch.zeros(0, dtype=torch.int64)], 0, 0
    for width, axis in axes:
        parts += [p._replace(small=p.small + small, wide=p.wide + wide) for p in axis.parts]
        free.append(axis.free + wide)
        small, wide = small + width, wide + axis.size
    return Axis(wide, tuple(parts), torch.cat(free))


def doubled(small: int, wide: int) -> Axis:
    """Small channels first and once more behind, as much larger as keeps the root mean square over the whole axis."""
    index = torch.arange(small)
    if wide == small:
        return first(small, wide)
    parts = (Part(index, index, 1.0, 0.5), Part(index, index + small, math.sqrt(wide / small - 1), 0.5))
    return Axis(wide, parts)


def read_once(axis: Axis) -> Axis:
    """The first place carries the channel, the others are free: for what a nonlinearity will touch."""
    one, *others = axis.parts
    return Axis(axis.size, (one._replace(share=1.0),), torch.cat([axis.free, *(p.wide for p in others)]))


def drafter_axes(small: DrafterConfig, wide: DrafterConfig) -> dict[str, tuple[Axis, Axis]]:
    """The (rows, columns) of every matrix of the drafter, by its name."""
    hidden = small.hidden_size
    target = first(hidden, wide.hidden_size)
    normed = first(hidden, wide.hidden_size, math.sqrt(wide.hidden_size / hidden)) if small.fused else target
    old, new = small.width, wide.width
    token = first(old, new) if wide.projected else normed
    context = doubled(old, new) if small.fused else target
    state = read_once(context) if small.context_state else first(small.state_size, wide.state_size)
    axes: dict[str, tuple[Axis, Axis]] = {
        "fuse": (context, join(*[(hidden, normed)] * (2 + len(small.feature_layers)))),
        "embed_proj": (token, normed),
    }
    if small.trunk_layers:
        inner = first(int(old * small.trunk_expansion), int(new * small.trunk_expansion))
        if small.trunk_heads:
            one = Heads(small.trunk_heads, small.trunk_kv_heads, old // small.trunk_heads)
            heads = place_heads(one, Heads(wide.trunk_heads, wide.trunk_kv_heads, new // wide.trunk_heads))
        else:
            heads = place_heads(Heads(1, 1, 2), Heads(1, 1, 2))  # no such matrices: any will do
        for layer in range(small.trunk_layers):
            axes |= {f"trunk.layers.{layer}.{name}": pair for name, pair in layer_axes(context, heads, inner).items()}
    gate = state.rest_free()
    gates = join((small.state_size, gate), (small.state_size, gate), (small.state_size, state))
    axes |= {"rnn_w": (state, token), "rnn_u": (state, state), "gru_w": (gates, token), "gru_u": (gates, state)}
    if wide.exit_dim == new + wide.state_size:
        out = join((old, read_once(context)), (small.state_size, state))
    else:
        out = first(small.exit_dim, wide.exit_dim)
        axes["input_proj"] = (out, join((old, context), (small.state_size, state)))
    axes |= {f"blocks.{i}.linear": (out, out) for i in range(small.num_blocks)}
    vocabulary = first(small.vocabulary, wide.vocabulary)
    return axes | {"exit": (target, out), "head": (vocabulary, out)}


def fill_bias(out: Tensor, small: Tensor, rows: Axis, generator: torch.Generator) -> None:
    out.normal_(0.0, STD, generator=generator)
    out[rows.dead.to(out.device)] = 0
    for part in rows.parts:
        out[part.wide.to(out.device)] = (small[part.small.to(small.device)].float() * part.scale).to(
            out.device, out.dtype
        )


@torch.no_grad()
def widen_drafter(
    drafter: Drafter,
    wide: LlamaConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    width: int = 0,
    exit_dim: int = 0,
) -> Drafter:
    """The drafter of a widened target with the same draft logits. ``drafter`` is not bound yet (``bind`` packs it)."""
    config = wide_drafter_config(drafter.config, wide, width, exit_dim)
    axes, state = drafter_axes(drafter.config, config), drafter.state_dict()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device(device):
        result = Drafter(config).to(dtype)
    if config.projected and not drafter.config.projected:
        state = {
            **state,
            "embed_proj.weight": torch.eye(config.hidden_size)[: drafter.config.width, : drafter.config.width],
        }
    for name, parameter in result.named_parameters():
        if name not in state:
            raise InvalidRequest(f"the drafter has no weight {name}: widen it before it is bound to a target")
        rows, columns = axes[name.rpartition(".")[0]]
        if name.endswith(".bias"):
            fill_bias(parameter.data, state[name], rows, generator)
        else:
            fill(parameter.data, state[name], rows, columns, generator)
    result.token_ids.copy_(drafter.token_ids)
    return result.eval().requires_grad_(False)
