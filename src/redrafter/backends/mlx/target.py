"""A model loaded by mlx-lm as a target: its projections, norms, MLPs and rotary modules, our attention and cache.

mlx-lm's own forward takes one offset for a whole sequence and a mask from its cache; a tree's nodes need a position
each and a mask of their own, so the layers are walked here. Linears are called as they are, quantised or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from redrafter.algorithm.accept import Accepted
from redrafter.algorithm.tree import TokenTree
from redrafter.backends.mlx.attention import Attention, GatedMLP, adding
from redrafter.backends.mlx.kv_cache import KVCache, on_cuda
from redrafter.backends.mlx.ops import counting
from redrafter.errors import UnsupportedModel

FAMILIES = ("mlx_lm.models.llama", "mlx_lm.models.qwen2", "mlx_lm.models.qwen3")
"""Modules of mlx-lm whose layers are the ones walked here (Mistral models are its Llama)."""
ROTARY = ("RoPE", "Llama3RoPE", "YarnRoPE")
"""Rotary modules whose frequencies do not depend on how long the text is."""


class MLXTarget:
    """``prefill``, ``verify``, ``commit`` (algorithm/step.py) over a model that ``check_architecture`` accepts.

    ``feature_layers``: layers whose output is kept beside the last hidden state after the final norm; features are
    [last ; layer ; layer ..]. ``side_by_side``: see ``Attention``; it also asks for ``steady`` shapes; None: where CUDA
    computes.
    """

    def __init__(self, model: Any, feature_layers: Sequence[int] = (), side_by_side: bool | None = None) -> None:
        self.model = model
        self.feature_layers = tuple(feature_layers)
        self.vocab_size: int = model.args.vocab_size
        self.hidden_size: int = model.args.hidden_size
        layers = model.model.layers
        for index in self.feature_layers:
            if not 0 <= index < len(layers):
                raise UnsupportedModel(
                    f"feature layer {index} does not exist: the target has layers 0 to {len(layers) - 1}"
                )
        self.mlx_dtype: mx.Dtype = model.model.norm.weight.dtype
        attention = layers[0].self_attn
        width = getattr(model.args, "head_dim", None) or self.hidden_size // attention.n_heads
        self.cache = KVCache(len(layers), attention.n_kv_heads, width, self.mlx_dtype)
        if side_by_side is None:
            side_by_side = on_cuda()
        self.steady = side_by_side
        """whether a prompt's shapes are to repeat"""
        self._layers = [
            (Attention(x.self_attn, side_by_side), adding(x.self_attn.o_proj), GatedMLP(x.mlp), adding(x.mlp.down_proj))
            for x in layers
        ]

    @property
    def dtype(self) -> str:
        return str(self.mlx_dtype).rpartition(".")[2]

    @property
    def feature_size(self) -> int:
        return self.hidden_size * (1 + len(self.feature_layers))

    @property
    def head(self) -> nn.Module:
        """The output projection, or the embedding that stands in for it (``as_linear``)."""
        return self.model.model.embed_tokens if self.model.args.tie_word_embeddings else self.model.lm_head

    def embed(self, token_ids: mx.array) -> mx.array:
        return self.model.model.embed_tokens(token_ids)

    def prefill(self, row: int, token_ids: mx.array, start: int) -> mx.array:
        """Read ``token_ids`` [T] of one row at positions start.. into the cache: features [T, F]."""
        limit = start + token_ids.shape[0]
        position_1T = mx.arange(start, limit, dtype=mx.int32)[None]
        if self.steady:
            limit = self.cache.round_up(limit)
        self.cache.settle(row, start)
        self.cache.place(row, position_1T, limit)
        visible = counting(limit)[None, None, :] <= position_1T[:, :, None]
        features = self._forward(token_ids[None], position_1T, visible)[1][0]
        mx.async_eval(features, self.cache.arrays)
        return features

    def verify(self, tree: TokenTree, lengths_B: mx.array) -> tuple[mx.array, mx.array]:
        nodes = tree.tokens.shape[1]
        cache, rows = self.cache, lengths_B.shape[0]
        cache.expect(rows, nodes)
        if cache.whole:
            cache.place(0, lengths_B[:, None], cache.limit_for(lengths_B, nodes))
            hidden, features = self._forward(tree.tokens, lengths_B[:, None], None)
            return self._logits(hidden).astype(mx.float32), features
        limit = cache.limit_for(lengths_B, nodes)
        cache.place(0, cache.find(0, lengths_B[:, None] + counting(nodes)), limit)
        # A slot holds a committed token, or the node of this tree whose number is its position - length, or nothing.
        node_BS = cache.position_of[:rows, :limit] - lengths_B[:, None]
        in_tree_BS = (node_BS >= 0) & (node_BS < nodes)
        index = mx.broadcast_to(mx.clip(node_BS, 0, nodes - 1)[:, None, :], (rows, nodes, limit))
        in_tree_BNS = mx.take_along_axis(tree.mask, index, axis=2) & in_tree_BS[:, None, :]
        visible_BNS = (node_BS < 0)[:, None, :] | in_tree_BNS
        hidden, features = self._forward(tree.tokens, lengths_B[:, None] + tree.depth, visible_BNS)
        return self._logits(hidden).astype(mx.float32), features

    def commit(self, lengths_B: mx.array, accepted: Accepted) -> None:
        if self.cache.nodes > 1:  # the root already lies where it belongs
            self.cache.keep_path(lengths_B, accepted.path)

    def _logits(self, hidden: mx.array) -> mx.array:
        return self.head.as_linear(hidden) if self.model.args.tie_word_embeddings else self.head(hidden)

    def _forward(
        self, ids_BN: mx.array, position_BN: mx.array, visible_BNS: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        """Last hidden states [B, N, D] and features [B, N, F] of the tokens, whose keys and values go where the cache
        was told. ``visible_BNS``: None where all slots are."""
        body = self.model.model
        x = body.embed_tokens(ids_BN.reshape(-1))
        attention = self._layers[0][0]
        offset = attention.offsets(position_BN)
        mask = None if visible_BNS is None else attention.mask(visible_BNS, x.dtype)
        kept = {}
        for index, (layer, parts) in enumerate(zip(body.layers, self._layers, strict=True)):
            attend, plus_out, mlp, plus_down = parts
            x = plus_out(x, attend(layer.input_layernorm(x), offset, mask, self.cache, index))
            x = plus_down(x, mlp(layer.post_attention_layernorm(x)))
            if index in self.feature_layers:
                kept[index] = x
        last, whole = body.norm(x), [kept[index] for index in self.feature_layers]
        features = mx.concatenate([last, *whole], axis=-1) if whole else last
        return last.reshape(*ids_BN.shape, -1), features.reshape(*ids_BN.shape, -1)


def check_architecture(model: Any) -> None:
    """Refuse by name what the walk above would compute wrongly."""
    kind = getattr(getattr(model, "args", None), "model_type", type(model).__name__)
    if type(model).__module__ not in FAMILIES:
        known = ", ".join(name.rpartition(".")[2] for name in FAMILIES)
        raise UnsupportedModel(
            f"model_type {kind!r} is {type(model).__module__} of mlx-lm, and --backend mlx walks the layers of {known} "
            "(mistral is its llama): use --backend torch"
        )
    rotary = type(model.model.layers[0].self_attn.rope).__name__
    if rotary not in ROTARY:
        raise UnsupportedModel(
            f"{kind} has rotary positions of mlx-lm's {rotary}, whose frequencies change with the length of the text; "
            f"--backend mlx takes {', '.join(ROTARY)}: use --backend torch"
        )
