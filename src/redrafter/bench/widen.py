"""An instrument: a small model's function at a large model's cost. Not a model, and named wherever its figures appear.

Random weights of a multi-billion shape cost the right time and accept nothing; trained ones may not be at hand. So a
small Llama is embedded in a large Llama's shape such that every logit stays the same (to rounding) and every product
has the large shape. Speed and acceptance measured on it are those of one model; its answers are the small one's.

A channel of the wide model is one of three kinds (``Axis``): *placed* (carries a small channel), *dead* (always zero)
or *free* (anything, never read by a placed or dead channel). A weight is zero only where a dead channel would read a
live one, or where a live one would read a free one; all else that is not the small model's is random.

    residual   small channels first, the rest dead: norm weights x sqrt(D_s / D_w), eps x D_s / D_w
    queries    rotary pair j of d_s / 2 sits at pair j d_w / d_s, whose frequency is the same; x sqrt(d_w / d_s), for
               scores are divided by sqrt(d_w); other widths of these heads dead, other heads free
    keys       repeated as the wide grouping needs; all else free     values   the same; all else dead
    SwiGLU     gate: the rest free; up: the rest dead, so that down's other columns meet zeros only
    layers     extra ones come last, live but for their dead values and their dead up

Share of weights that are zero, SmolLM2-135M in the shape of Llama-2-7B | of Qwen2.5-1.5B: q 2 % | 14 %, k 0,
v 12 % | 19 %, o 12 % | 36 %, gate 0, up 12 % | 31 %, down 12 % | 11 %; of a whole layer 8 % | 15 %. Embedding 86 % |
63 %, of which a forward reads its tokens' rows only; but a tied head is the embedding, so pass ``tie=False`` where the
head is timed: the same bytes and products, none of them zero, for one more matrix in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from redrafter.errors import InvalidRequest

STD = 0.02
"""Spread of the random weights: what models of this kind start from."""

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
    # Qwen2.5-1.5B has 28 layers and 2 key/value heads. SmolLM2's 30 layers do not fit in 28, nor its 3 key/value heads
    # in 2, so both are one or two more: 7 % more weights than 28 layers, 1 % of them for the third head.
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 30,
        "num_attention_heads": 12,
        "num_key_value_heads": 3,
        "head_dim": 128,
    },
}


class Part(NamedTuple):
    """Small channels ``small`` times ``scale`` lie at ``wide``; ``share`` is what a reader takes from this place."""

    small: Tensor
    wide: Tensor
    scale: float = 1.0
    share: float = 1.0


@dataclass(frozen=True)
class Axis:
    """How a vector of the small model lies in one of the wide model: ``size`` channels, placed, free or dead."""

    size: int
    parts: tuple[Part, ...] = ()
    free: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @property
    def placed(self) -> Tensor:
        return torch.cat([torch.zeros(0, dtype=torch.int64), *(part.wide for part in self.parts)])

    @property
    def live(self) -> Tensor:
        return torch.cat([self.placed, self.free])

    @property
    def dead(self) -> Tensor:
        return self.others(self.live)

    def others(self, channels: Tensor) -> Tensor:
        mask = torch.ones(self.size, dtype=torch.bool)
        mask[channels] = False
        return mask.nonzero()[:, 0]

    def rest_free(self) -> Axis:
        """The same with every channel that is not placed free."""
        return Axis(self.size, self.parts, self.others(self.placed))


def first(small: int, wide: int, scale: float = 1.0) -> Axis:
    """The small channels first, the rest dead."""
    index = torch.arange(small)
    return Axis(wide, (Part(index, index, scale),))


def fill(out: Tensor, small: Tensor | None, rows: Axis, columns: Axis, generator: torch.Generator) -> None:
    """Write a wide matrix [rows, columns] in place; ``small`` is None where neither axis has parts to join."""
    out.normal_(0.0, STD, generator=generator)

    def at(r: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return r.to(out.device)[:, None], c.to(out.device)

    out[at(rows.dead, columns.live)] = 0
    out[at(rows.placed, columns.free)] = 0
    if small is None:
        return
    for r in rows.parts:
        for c in columns.parts:
            factor = r.scale * c.share / c.scale
            block = small[r.small.to(small.device)[:, None], c.small.to(small.device)]
            out[at(r.wide, c.wide)] = (block.float() * factor).to(out.device, out.dtype)


class Heads(NamedTuple):
    query: int
    kv: int
    width: int


class HeadAxes(NamedTuple):
    """query, key, value: rows of their projections; output: columns of the one that reads the attention."""

    query: Axis
    key: Axis
    value: Axis
    output: Axis


def place_heads(small: Heads, wide: Heads) -> HeadAxes:
    """Small head i of key/value group g takes a query head whose wide group holds a copy of g's keys and values."""
    group, room = small.query // small.kv, wide.query // wide.kv
    copies = math.ceil(group / room)
    if small.kv * copies > wide.kv:
        raise InvalidRequest(
            f"{small.query}/{small.kv} heads need {small.kv * copies} key/value heads among {wide.query}/{wide.kv} "
            f"and there are {wide.kv}: give the wide shape more"
        )
    if wide.width % small.width:
        raise InvalidRequest(
            f"heads of {small.width} share no rotary frequencies with heads of {wide.width}: use a multiple of "
            f"{small.width}"
        )
    ratio, half = wide.width // small.width, small.width // 2
    dim = torch.arange(small.width)
    dims = dim % half * ratio + dim // half * (wide.width // 2)
    head = torch.arange(small.query)
    taken = (head // group * copies + head % group // room) * room + head % group % room
    every = torch.arange(small.query * small.width)
    index = (taken[:, None] * wide.width + dims).flatten()
    size, kv_size = wide.query * wide.width, wide.kv * wide.width
    all_heads = torch.arange(size).view(wide.query, wide.width)
    spare = torch.ones(wide.query, dtype=torch.bool)
    spare[taken] = False
    # A spare query head beside a taken one attends to live values: nobody may read what it finds.
    reads_live = spare & (torch.arange(wide.query) // room < small.kv * copies)
    kv_every = torch.arange(small.kv * small.width)
    kv_parts = []
    for copy in range(copies):
        kv_head = torch.arange(small.kv) * copies + copy
        kv_parts.append(Part(kv_every, (kv_head[:, None] * wide.width + dims).flatten()))
    value = Axis(kv_size, tuple(kv_parts))
    return HeadAxes(
        query=Axis(size, (Part(every, index, math.sqrt(ratio)),), all_heads[spare].flatten()),
        key=value.rest_free(),
        value=value,
        output=Axis(size, (Part(every, index),), all_heads[reads_live][:, dims].flatten()),
    )


def layer_axes(residual: Axis, heads: HeadAxes, inner: Axis) -> dict[str, tuple[Axis, Axis]]:
    """The (rows, columns) of every matrix of a Llama layer, by the last part of its name."""
    return {
        "q_proj": (heads.query, residual),
        "k_proj": (heads.key, residual),
        "v_proj": (heads.value, residual),
        "o_proj": (residual, heads.output),
        "gate_proj": (inner.rest_free(), residual),
        "up_proj": (inner, residual),
        "down_proj": (residual, inner),
    }


def heads_of(config: LlamaConfig) -> Heads:
    width = config.head_dim or config.hidden_size // config.num_attention_heads
    return Heads(config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads, width)


def wide_config(small: LlamaConfig, tie: bool | None = None, **sizes: Any) -> LlamaConfig:
    """The configuration of ``sizes`` that can hold ``small``: its vocabulary, rotary base and, unless ``tie`` says
    otherwise, its tying. ``tie=False`` under a tied small model gives the head weights of its own, none of them zero.
    """
    same = ("vocab_size", "hidden_act", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    return LlamaConfig(
        **{name: getattr(small, name) for name in same},
        rms_norm_eps=small.rms_norm_eps * small.hidden_size / sizes["hidden_size"],
        rope_parameters=rope_of(small),
        tie_word_embeddings=small.tie_word_embeddings if tie is None else tie,
        **sizes,
    )


def shape_named(name: str, small: LlamaConfig, tie: bool | None = None) -> LlamaConfig:
    """A known shape (``SHAPES``) that holds ``small``, checked. Raises InvalidRequest."""
    if name not in SHAPES:
        raise InvalidRequest(f"shape {name!r} is unknown: use {' or '.join(SHAPES)}")
    wide = wide_config(small, tie, **SHAPES[name])
    check(small, wide)
    return wide


def rope_of(config: LlamaConfig) -> dict[str, Any]:
    return dict(config.rope_parameters or {})


def check(small: LlamaConfig, wide: LlamaConfig) -> None:
    """Raises InvalidRequest where ``wide`` cannot hold the function of ``small``."""
    for name in ("vocab_size", "hidden_act", "rope_parameters"):
        if getattr(small, name) != getattr(wide, name):
            raise InvalidRequest(
                f"{name} is {getattr(wide, name)} in the wide shape and {getattr(small, name)} in the small one: "
                "they must be equal; build it with wide_config"
            )
    rope = rope_of(small)["rope_type"]
    if rope != "default":
        raise InvalidRequest(f"rope_type={rope!r} depends on the head's width: only 'default' can be widened")
    for config in (small, wide):
        if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
            raise InvalidRequest(
                f"a {config.model_type} with attention_bias={config.attention_bias}, mlp_bias={config.mlp_bias} cannot "
                "be widened: use a Llama without biases"
            )
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers"):
        if getattr(small, name) > getattr(wide, name):
            raise InvalidRequest(f"{name}={getattr(wide, name)} is less than the small model's {getattr(small, name)}")
    if wide.tie_word_embeddings and not small.tie_word_embeddings:
        raise InvalidRequest("a tied wide model cannot hold an untied small one: use tie=False")
    eps = small.rms_norm_eps * small.hidden_size / wide.hidden_size
    if not math.isclose(wide.rms_norm_eps, eps, rel_tol=1e-6):
        raise InvalidRequest(f"rms_norm_eps={wide.rms_norm_eps} must be {eps}: build the wide shape with wide_config")
    place_heads(heads_of(small), heads_of(wide))


def filler(
    small: LlamaConfig, state: Mapping[str, Tensor], wide: LlamaConfig, generator: torch.Generator
) -> Callable[[str, Tensor], None]:
    """What writes the wide parameter of a name into a tensor, in place."""
    check(small, wide)
    residual = first(small.hidden_size, wide.hidden_size)
    vocabulary = first(small.vocab_size, wide.vocab_size)
    heads = place_heads(heads_of(small), heads_of(wide))
    placed = layer_axes(residual, heads, first(small.intermediate_size, wide.intermediate_size))
    # An extra layer holds none of the small model's heads and inner channels.
    none, kv_none = (Axis(n * heads_of(wide).width) for n in heads_of(wide)[:2])
    no_heads = HeadAxes(none.rest_free(), kv_none.rest_free(), kv_none, none)
    extra = layer_axes(residual, no_heads, Axis(wide.intermediate_size))
    ratio = math.sqrt(small.hidden_size / wide.hidden_size)

    def source(name: str) -> Tensor:
        tied = name == "lm_head.weight" and small.tie_word_embeddings
        name = "model.embed_tokens.weight" if tied else name
        if name not in state:
            raise InvalidRequest(f"the small model has no weight {name}: give a plain transformers Llama, not packed")
        return state[name].detach()

    def write(name: str, out: Tensor) -> None:
        parts = name.split(".")
        is_extra = parts[1] == "layers" and int(parts[2]) >= small.num_hidden_layers
        if parts[-2].endswith("norm"):
            out.fill_(ratio)
            if not is_extra:
                out[: small.hidden_size] = (source(name).float() * ratio).to(out.device, out.dtype)
        elif name == "model.embed_tokens.weight":
            fill(out.t(), source(name).t(), residual, vocabulary, generator)
        elif name == "lm_head.weight":
            fill(out, source(name), vocabulary, residual, generator)
        elif is_extra:
            fill(out, None, *extra[parts[-2]], generator)
        else:
            fill(out, source(name), *placed[parts[-2]], generator)

    return write


@torch.no_grad()
def widen(
    small: LlamaConfig, state_dict: Mapping[str, Tensor], wide: LlamaConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """The wide model's state dict, on the generator's device, in the dtype of the small one's embedding."""
    write = filler(small, state_dict, wide, generator)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(wide)
    result = {}
    dtype = state_dict["model.embed_tokens.weight"].dtype
    for name, parameter in shapes.named_parameters():
        result[name] = torch.empty(parameter.shape, dtype=dtype, device=generator.device)
        write(name, result[name])
    if wide.tie_word_embeddings:
        result["lm_head.weight"] = result["model.embed_tokens.weight"]
    return result


@torch.no_grad()
def widen_model(
    model: Any,
    wide: LlamaConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    attention: str = "sdpa",
) -> Any:
    """A transformers model of the wide shape, filled in place: its weights are in memory once.

    ``model`` is the small one as transformers made it (``make_target`` packs weights: widen before). ``attention``:
    for a target of ours, ``redrafter_exact`` on the CPU and ``redrafter_fast`` elsewhere.
    """
    generator = torch.Generator(device).manual_seed(seed)
    write = filler(model.config, model.state_dict(), wide, generator)
    with torch.device(device):
        result = AutoModelForCausalLM.from_config(wide, dtype=dtype, attn_implementation=attention)
    for name, parameter in result.named_parameters():
        write(name, parameter.data)
    return result.eval().requires_grad_(False)
