"""The recurrent drafter's modules on MLX: the same names, shapes and arithmetic as ``backends/torch/drafter.py``.

The checkpoint is the same too: config.json and model.safetensors, or Apple's layout. Tensors keep any leading axes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from redrafter.drafter_config import DrafterConfig
from redrafter.drafter_files import (
    AGAIN,
    CONFIG,
    MANIFEST,
    WEIGHTS,
    from_apple,
    is_apple,
    own_config,
    read_config,
    verify,
)
from redrafter.errors import CorruptModel

Store = Callable[[int, mx.array, mx.array], tuple[mx.array, mx.array]]
"""(layer, keys [B, H, T, d], values) -> all keys and values to attend to."""
DTYPES = (mx.float32, mx.bfloat16, mx.float16)


def rms(x: mx.array) -> mx.array:
    """Scale the last axis to root mean square 1."""
    return mx.fast.rms_norm(x, None, 1e-6)


def rotary(position_BT: mx.array, width: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """cos and sin [B, 1, T, width] of the rotary embedding, base 10,000."""
    half = mx.arange(0, width, 2, dtype=mx.float32) / width
    angle = position_BT[..., None].astype(mx.float32) * (10_000.0**-half)
    angle = mx.concatenate([angle, angle], axis=-1)[:, None]
    return mx.cos(angle).astype(dtype), mx.sin(angle).astype(dtype)


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    first, second = mx.split(x, 2, axis=-1)
    return x * cos + mx.concatenate([-second, first], axis=-1) * sin


class TrunkLayer(nn.Module):
    """x + attention(rms x), then x + SwiGLU(rms x); ``heads`` = 0 leaves the attention out."""

    def __init__(self, width: int, heads: int, kv_heads: int, expansion: float) -> None:
        super().__init__()
        self.heads = heads
        if heads:
            self.head_width = width // heads
            self.q_proj = nn.Linear(width, heads * self.head_width, bias=False)
            self.k_proj = nn.Linear(width, kv_heads * self.head_width, bias=False)
            self.v_proj = nn.Linear(width, kv_heads * self.head_width, bias=False)
            self.o_proj = nn.Linear(heads * self.head_width, width, bias=False)
        inner = int(width * expansion)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def attend(
        self, x: mx.array, rope: tuple[mx.array, mx.array], mask: mx.array | None, store: Store, layer: int
    ) -> mx.array:
        rows, length, _ = x.shape
        n = rms(x)

        def split(y: mx.array) -> mx.array:
            return y.reshape(rows, length, -1, self.head_width).transpose(0, 2, 1, 3)

        q, k, v = split(self.q_proj(n)), split(self.k_proj(n)), split(self.v_proj(n))
        keys, values = store(layer, rotate(k, *rope), v)
        scale = self.head_width**-0.5
        y = mx.fast.scaled_dot_product_attention(rotate(q, *rope), keys, values, scale=scale, mask=mask)
        return x + self.o_proj(y.transpose(0, 2, 1, 3).reshape(rows, length, -1))

    def __call__(
        self, x: mx.array, rope: tuple[mx.array, mx.array], mask: mx.array | None, store: Store, layer: int
    ) -> mx.array:
        if self.heads:
            x = self.attend(x, rope, mask, store, layer)
        n = rms(x)
        return x + self.down_proj(nn.silu(self.gate_proj(n)) * self.up_proj(n))


class Trunk(nn.Module):
    """[B, T, D] -> [B, T, D]. ``mask`` [B, 1, T, S], added to scores over what ``store`` returns."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        width, heads = config.width, config.trunk_heads
        self.window = config.trunk_window
        self.head_width = width // heads if heads else 0
        self.layers = [
            TrunkLayer(width, heads, config.trunk_kv_heads, config.trunk_expansion) for _ in range(config.trunk_layers)
        ]

    def __call__(self, x: mx.array, position_BT: mx.array, mask: mx.array | None, store: Store) -> mx.array:
        rope = rotary(position_BT, self.head_width, x.dtype) if self.head_width else (x, x)
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, mask, store, index)
        return x

    def visible(self, query_BT: mx.array, key_BS: mx.array) -> mx.array:
        """[B, 1, T, S] bool: which positions a query sees: its own and the ``window - 1`` before it."""
        distance = query_BT[:, :, None] - key_BS[:, None, :]
        return ((distance >= 0) & (distance < self.window))[:, None]


class ResidualBlock(nn.Module):
    """x + SiLU(L x + b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def __call__(self, x: mx.array) -> mx.array:
        return x + nn.silu(self.linear(x))


class Drafter(nn.Module):
    """The drafter's own weights; the target's embedding and, if tied, its head are passed in by ``drafting.py``."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        width, state = config.width, config.state_size
        if config.fused:
            self.fuse = nn.Linear(config.feature_size + config.hidden_size, width, bias=False)
            self.trunk = Trunk(config)
        if config.projected:
            self.embed_proj = nn.Linear(config.hidden_size, width, bias=False)
        if config.cell == "rnn":
            self.rnn_w = nn.Linear(width, state, bias=False)
            self.rnn_u = nn.Linear(state, state)
        elif config.cell == "gru":
            self.gru_w = nn.Linear(width, 3 * state, bias=False)
            self.gru_u = nn.Linear(state, 3 * state)
        elif config.cell == "medusa":
            self.depth_blocks = [ResidualBlock(state) for _ in range(config.draft_length)]
        if config.exit_dim != width + state:
            self.input_proj = nn.Linear(width + state, config.exit_dim)
        self.blocks = [ResidualBlock(config.exit_dim) for _ in range(config.num_blocks)]
        if config.head == "own":
            self.head = nn.Linear(config.exit_dim, config.vocabulary, bias=False)
        else:
            self.exit: nn.Module = nn.Linear(config.exit_dim, config.hidden_size, bias=False)

    def context(
        self,
        features_BTF: mx.array,
        next_BTD: mx.array,
        position_BT: mx.array,
        mask: mx.array | None,
        store: Store,
    ) -> mx.array:
        """What stays constant while one tree is drafted: features [B, T, F] and embeddings [B, T, D] of the tokens
        that follow them -> [B, T, C], C the drafter's width."""
        if not self.config.fused:
            return features_BTF[..., : self.config.hidden_size]
        parts = [rms(x) for x in mx.split(features_BTF, 1 + len(self.config.feature_layers), axis=-1)]
        x = self.fuse(mx.concatenate([*parts, rms(next_BTD)], axis=-1))
        return rms(self.trunk(x, position_BT, mask, store))

    def first_state(self, context: mx.array, root_embedding: mx.array) -> mx.array:
        """s_1: the state after the root, from s_0. [..., C], [..., D] -> [..., state]."""
        if self.config.context_state:
            return self.next_state(context, root_embedding, 0)
        zero = mx.zeros((*context.shape[:-1], self.config.state_size), dtype=context.dtype)
        return self.next_state(zero, root_embedding, 0)

    def next_state(self, state: mx.array, embedding: mx.array, depth: int) -> mx.array:
        """[..., state], [..., D] -> [..., state]: read one more token; ``depth`` drafted tokens were read before it."""
        if self.config.cell == "medusa" and depth > 0:
            return self.depth_blocks[min(depth, self.config.draft_length - 1)](state)
        return self.take(state, self.token_input(embedding))

    def token_input(self, embedding: mx.array) -> mx.array:
        """What the cell adds of a token, whatever the state: [..., D] -> [..., 3 state] (gru) or [..., state]."""
        cell = self.config.cell
        e = rms(embedding) if cell == "medusa" or (self.config.fused and cell != "sum") else embedding
        if self.config.projected:
            e = self.embed_proj(e)
        if cell == "rnn":
            return self.rnn_w(e)
        return self.gru_w(e) if cell == "gru" else e

    def take(self, state: mx.array, token: mx.array) -> mx.array:
        """[..., state] and a token's ``token_input`` -> [..., state]."""
        if self.config.cell == "sum":
            return state + token
        if self.config.cell == "medusa":
            return self.depth_blocks[0](token)
        if self.config.cell == "rnn":
            return nn.silu(token + self.rnn_u(state))
        r_w, z_w, n_w = mx.split(token, 3, axis=-1)
        r_u, z_u, n_u = mx.split(self.gru_u(state), 3, axis=-1)
        z = mx.sigmoid(z_w + z_u)
        return (1 - z) * mx.tanh(n_w + mx.sigmoid(r_w + r_u) * n_u) + z * state

    def exit_hidden(self, context: mx.array, state: mx.array) -> mx.array:
        """[..., exit_dim] (own head) or [..., D] (tied head): what the head is applied to. h first, as Apple's."""
        context = mx.broadcast_to(context, (*state.shape[:-1], context.shape[-1]))
        x = mx.concatenate([context, state], axis=-1)
        if self.config.exit_dim != x.shape[-1]:
            x = self.input_proj(x)
        for block in self.blocks:
            x = block(x)
        return x if self.config.head == "own" else self.exit(x)


def load_drafter(folder: Path) -> tuple[Drafter, mx.array | None]:
    """The drafter in ``folder`` in the dtype it was saved in, and the target ids of its draft vocabulary [V_d], if it
    has one of its own. Apple's layout is recognised by its keys."""
    values = read_config(folder)
    if is_apple(values):
        if (folder / MANIFEST).is_file():
            verify(folder)
        return _build(folder, *from_apple(folder, values, _read_weights(folder)))
    return _build(folder, own_config(folder, values), _read_weights(folder))


def _read_weights(folder: Path) -> dict[str, mx.array]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise CorruptModel(f"{path} is missing; {AGAIN}")
    try:
        stored: Any = mx.load(str(path))
    except (RuntimeError, ValueError) as error:
        raise CorruptModel(f"{path} cannot be read ({error}); {AGAIN}") from error
    return stored


def _build(folder: Path, config: DrafterConfig, stored: dict[str, mx.array]) -> tuple[Drafter, mx.array | None]:
    path = folder / WEIGHTS
    token_ids = _token_ids(path, config, stored.pop("token_ids", None))
    dtypes = {tensor.dtype for tensor in stored.values()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        found = ", ".join(sorted(map(str, dtypes)))
        raise CorruptModel(f"{path}: weights of type {found}; all must be one of float32, bfloat16, float16; {AGAIN}")
    for name, tensor in stored.items():
        if not mx.isfinite(tensor).all().item():
            raise CorruptModel(f"{path}: {name} holds numbers that are not finite; {AGAIN}")
    drafter = Drafter(config)
    try:
        drafter.load_weights(list(stored.items()), strict=True)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise CorruptModel(f"{path} does not hold what its {CONFIG} asks for ({reason}); {AGAIN}") from error
    return drafter, token_ids


def _token_ids(path: Path, config: DrafterConfig, ids: mx.array | None) -> mx.array | None:
    """Two equal ids would put two equal siblings in the tree, which acceptance relies on not to happen."""
    if not config.draft_vocabulary:
        if ids is not None:
            raise CorruptModel(f"{path}: unexpected tensors token_ids for its {CONFIG}; {AGAIN}")
        return None
    listed: Any = [] if ids is None else ids.tolist()
    if len(listed) != config.draft_vocabulary or len(set(listed)) != len(listed):
        raise CorruptModel(f"{path}: token_ids must be {config.draft_vocabulary} distinct token ids; {AGAIN}")
    if min(listed) < 0 or max(listed) >= config.vocab_size:
        raise CorruptModel(f"{path}: token_ids must lie below vocab_size={config.vocab_size}; {AGAIN}")
    return mx.array(listed, dtype=mx.int64)
