"""The recurrent drafter's modules on MLX: the same names, shapes and arithmetic as ``backends/torch/drafter.py``.

The checkpoint is the same too: config.json and model.safetensors, or Apple's layout. Tensors keep any leading axes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from redrafter.backends.mlx.attention import GatedMLP, adding, joined, rotate
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

Store = Callable[[int, mx.array], tuple[mx.array, mx.array]]
"""(layer, the new keys' heads and then the values' [B, T, 2 H, d]) -> all keys and values to look at, [B, H, S, d]."""
DTYPES = (mx.float32, mx.bfloat16, mx.float16)


def rms(x: mx.array) -> mx.array:
    """Scale the last axis to root mean square 1."""
    return mx.fast.rms_norm(x, None, 1e-6)


def rope(x: mx.array, offset: mx.array) -> mx.array:
    """The rotary embedding, base 10,000, of vectors [n, 1, 1, d] at ``offset`` [n]."""
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=10_000.0, scale=1.0, offset=offset)


@partial(mx.compile, shapeless=True)
def _plus_silu(x: mx.array, y: mx.array) -> mx.array:
    return x + nn.silu(y)


@partial(mx.compile, shapeless=True)
def _gated(of_token: Any, of_state: Any, state: mx.array) -> mx.array:
    """A GRU's gates in one launch instead of eleven; a reset, update and new part of the token and of the state."""
    (r_w, z_w, n_w), (r_u, z_u, n_u) = of_token, of_state
    z = mx.sigmoid(z_w + z_u)
    return (1 - z) * mx.tanh(n_w + mx.sigmoid(r_w + r_u) * n_u) + z * state


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

    def join(self) -> None:
        """One product for queries, keys and values, and one for gate and up. Once, when the weights are final."""
        if self.heads:
            self._qkv = joined([self.q_proj, self.k_proj, self.v_proj])
            self._plus_out = adding(self.o_proj)
        self._gated, self._plus_down = GatedMLP(self), adding(self.down_proj)

    def attend(self, x: mx.array, rows: int, offset: mx.array, mask: mx.array, store: Store, layer: int) -> mx.array:
        y = rotate(rope, self._qkv(rms(x)), offset, self.head_width)
        y = y.reshape(rows, x.shape[0] // rows, -1, self.head_width)
        keys, values = store(layer, y[:, :, self.heads :])
        q, scale = y[:, :, : self.heads].transpose(0, 2, 1, 3), self.head_width**-0.5
        seen = mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)
        return self._plus_out(x, seen.transpose(0, 2, 1, 3).reshape(x.shape[0], -1))

    def __call__(
        self, x: mx.array, rows: int, offset: mx.array | None, mask: mx.array | None, store: Store | None, layer: int
    ) -> mx.array:
        """[B T, D] of B ``rows``."""
        if offset is not None and mask is not None and store is not None:
            x = self.attend(x, rows, offset, mask, store, layer)
        return self._plus_down(x, self._gated(rms(x)))


class Trunk(nn.Module):
    """[B, T, D] -> [B, T, D]. ``offset``: of every vector (``attention.offsets``); ``mask`` [B, 1, T, S], added to
    scores over what ``store`` returns. A trunk without attention has none of the three."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.window = config.trunk_window
        self.layers = [
            TrunkLayer(config.width, config.trunk_heads, config.trunk_kv_heads, config.trunk_expansion)
            for _ in range(config.trunk_layers)
        ]

    def __call__(self, x: mx.array, offset: mx.array | None, mask: mx.array | None, store: Store | None) -> mx.array:
        rows, pairs, _ = x.shape
        x = x.reshape(rows * pairs, -1)
        for index, layer in enumerate(self.layers):
            x = layer(x, rows, offset, mask, store, index)
        return x.reshape(rows, pairs, -1)

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
        return _plus_silu(x, self.linear(x))


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

    def join(self) -> None:
        """Fewer, larger products. Once, when the weights are final."""
        if self.config.fused:
            for layer in self.trunk.layers:
                layer.join()
        self._of_context = self._of_state = None
        if self.config.exit_dim != self.config.width + self.config.state_size:
            parts = mx.split(self.input_proj.weight, [self.config.width], axis=1)
            # Copies, since a product wants the rows of a matrix to follow each other.
            self._of_context, self._of_state = (mx.contiguous(part).T for part in parts)
            mx.eval(self._of_context, self._of_state)

    def context(
        self,
        features_BTF: mx.array,
        next_BTD: mx.array,
        offset: mx.array | None,
        mask: mx.array | None,
        store: Store | None,
    ) -> mx.array:
        """What stays constant while one tree is drafted: features [B, T, F] and embeddings [B, T, D] of the tokens
        that follow them -> [B, T, C], C the drafter's width."""
        if not self.config.fused:
            return features_BTF[..., : self.config.hidden_size]
        x = mx.concatenate([features_BTF, next_BTD], axis=-1)
        x = rms(x.reshape(*x.shape[:2], -1, self.config.hidden_size)).reshape(x.shape)
        return rms(self.trunk(self.fuse(x), offset, mask, store))

    def zeroth_state(self, context: mx.array) -> mx.array:
        """s_0: the context or zeros."""
        if self.config.context_state:
            return context
        return mx.zeros((*context.shape[:-1], self.config.state_size), dtype=context.dtype)

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
        return _gated(mx.split(token, 3, axis=-1), mx.split(self.gru_u(state), 3, axis=-1), state)

    def exit_context(self, context: mx.array) -> mx.array:
        """[..., C]: what of a context goes into every ``exit_hidden`` of a tree: its part of the product, if any."""
        return context if self._of_context is None else mx.addmm(self.input_proj.bias, context, self._of_context)

    def exit_hidden(self, exit_context: mx.array, state: mx.array) -> mx.array:
        """[..., exit_dim] (own head) or [..., D] (tied head): what the head is applied to. h first, as Apple's."""
        if self._of_state is None:
            context = mx.broadcast_to(exit_context, (*state.shape[:-1], exit_context.shape[-1]))
            x = mx.concatenate([context, state], axis=-1)
        else:
            x = mx.addmm(exit_context, state, self._of_state)
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
    return mx.array(listed, dtype=mx.int32)
