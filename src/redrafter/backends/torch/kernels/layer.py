"""Decoder layers of the Llama kind in six launches: the GPU's fast path, to the formulas of ``fused.py``.

    1 norm, q|k|v, bias                        4 out, residual
    2 head norms, rotation, cache write        5 norm, gate|up, silu(gate) * up
    3 attention                                6 down, residual

One row goes through ``matmul.py``, up to 64 (of small layers 128) through ``stream.py``, where without head norms the
first launch does the second's work, more (and float32) through cuBLAS and ``norms.py``.

Where bfloat16 is rounded other than in transformers: a norm's weight multiplies before the division by rms(x)
(``matmul.py``, ``stream.py``), attention's probabilities are rounded before they are normalised (as torch's own kernels
do), and of many rows the last residual is added before its product is rounded (``addmm``).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redrafter.backends.torch.attention import KERNEL, mask_parts, masked_attention
from redrafter.backends.torch.fused import LAYERS, is_silu
from redrafter.backends.torch.kernels.attention import tree_attention
from redrafter.backends.torch.kernels.commit import KernelCache, LayerSlots
from redrafter.backends.torch.kernels.matmul import Norm, Workspace, few_rows
from redrafter.backends.torch.kernels.norms import HeadNorms, add_rms_norm, rope_write, silu_mul
from redrafter.backends.torch.kernels.rotate import Rotation, interleaved
from redrafter.backends.torch.kernels.stream import MAX_ROWS, fits, most_rows, plan, scaled, stream
from redrafter.params import MAX_TREE

WIDE_HEAD = 2048
"""Inputs of a head from which our kernels were measured."""


def fuse_cuda_layers(model: Any) -> int:
    """Swap every layer that can be; returns how many were. The model's attention must be ``redrafter_kernel``."""
    if model.config._attn_implementation != KERNEL:
        return 0
    layers = model.base_model.layers
    workspace = Workspace(next(model.parameters()).device)
    swapped = 0
    for index, layer in enumerate(layers):
        if type(layer).__name__ in LAYERS and is_silu(layer.mlp.act_fn) and layer.mlp.gate_proj.bias is None:
            layers[index] = FusedCudaLayer(layer, workspace)
            swapped += 1
    for layer, following in pairwise(layers):
        if isinstance(layer, FusedCudaLayer) and isinstance(following, FusedCudaLayer):
            layer.next_norm = following.input_norm
    base = model.base_model
    if hasattr(getattr(base, "norm", None), "variance_epsilon"):
        base.norm = KernelNorm(base.norm)
    if isinstance(getattr(base, "rotary_emb", None), nn.Module) and _static_rope(model.config):
        base.rotary_emb = RotaryTable(base.rotary_emb, model.config.max_position_embeddings, base.embed_tokens.weight)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and fits(head.weight) and head.in_features >= WIDE_HEAD:
        model.set_output_embeddings(KernelHead(head, workspace))
    return swapped


def _static_rope(config: Any) -> bool:
    """Whether a position's angles never depend on how long the text is."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return isinstance(rope, dict) and rope.get("rope_type", "default") in ("default", "linear", "llama3", "yarn")


class KernelNorm(nn.Module):
    """An RMS norm in one launch instead of transformers' seven."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return add_rms_norm(x.contiguous(), None, self.weight, self.variance_epsilon)[1]


class KernelHead(nn.Module):
    """A wide head's product of up to 64 rows by our kernels. 49,152 x 4,096 in bfloat16 on one H200: one row 90 us
    (cuBLAS 99), 16 rows 95 (100), 64 rows 100 (104)."""

    def __init__(self, head: nn.Linear, workspace: Workspace) -> None:
        super().__init__()
        self.weight, self.bias, self._workspace = head.weight, head.bias, workspace

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
        if len(x) > MAX_ROWS:
            return F.linear(hidden_states, self.weight, self.bias)
        if len(x) == 1:
            y = few_rows(x, self.weight, self.bias)
        else:
            y, _ = stream(x, self.weight, self.bias, workspace=self._workspace)
        return y.view(*hidden_states.shape[:-1], -1)


class RotaryTable(nn.Module):
    """cos and sin of every position, looked up instead of computed: the same bits."""

    table: Tensor  # [positions, 2 d]

    def __init__(self, rotary: nn.Module, positions: int, like: Tensor) -> None:
        super().__init__()
        # A tree at the context's end reaches beyond it.
        position = torch.arange(positions + MAX_TREE, device=like.device)[None]
        with torch.no_grad():
            cos, sin = rotary(like[:1, None], position_ids=position)
        self.register_buffer("table", torch.cat([cos[0], sin[0]], dim=-1), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = F.embedding(position_ids, self.table).chunk(2, dim=-1)
        return cos, sin


class FusedCudaLayer(nn.Module):
    """Takes the place of a transformers decoder layer inside its model; called as that one is.

    ``workspace`` is shared by all layers of a model: they run one after the other.
    """

    def __init__(self, layer: Any, workspace: Workspace) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.layer_idx: int = attention.layer_idx
        self.width: int = attention.head_dim
        self.scaling: float = attention.scaling
        self._workspace = workspace
        self.input_gain, self._input_eps = _norm(layer.input_layernorm)
        self.mlp_gain, self._mlp_eps = _norm(layer.post_attention_layernorm)
        self.next_norm: tuple[Tensor, float] | None = None
        """the first norm of the layer behind this one"""
        self.q_gain = self.k_gain = None
        if hasattr(attention, "q_norm"):
            self._head_eps = _norm(attention.q_norm)[1]
            self.q_gain, self.k_gain = (
                nn.Parameter(interleaved(norm.weight, self.width), requires_grad=False)
                for norm in (attention.q_norm, attention.k_norm)
            )
        self.qkv, self.qkv_bias = _join(attention.q_proj, attention.k_proj, attention.v_proj, width=self.width)
        self.out, self.out_bias = _join(attention.o_proj)
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        self.gate_up = nn.Parameter(interleaved(gate_up, len(gate_up)), requires_grad=False)
        self.down, self.down_bias = _join(mlp.down_proj)
        weights = (self.qkv, self.out, self.gate_up, self.down)
        self.most_streamed = most_rows(*weights) if fits(*weights) else 0

    @property
    def input_norm(self) -> tuple[Tensor, float]:
        return self.input_gain, self._input_eps

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        cache: KernelCache | None = None,
        past_key_values: KernelCache | None = None,
        **_: Any,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]. transformers names the cache ``past_key_values``, in newer releases ``cache``."""
        store = past_key_values if cache is None else cache
        assert isinstance(store, KernelCache)
        rows, nodes, size = hidden_states.shape
        x = hidden_states.reshape(-1, size)
        forward = self._alone if len(x) == 1 else self._few if len(x) <= self.most_streamed else self._many

        rotation = Rotation(*position_embeddings, store.layer(self.layer_idx))

        def attend(qkv: Tensor, rotated: bool = False) -> Tensor:
            qkv = qkv.view(rows, nodes, -1)
            q = qkv.unflatten(2, (-1, self.width)).transpose(1, 2) if rotated else self._rotate(qkv, rotation)
            return self._attend(q, attention_mask, rotation.stored).view(len(x), -1)

        return forward(x, attend, rotation).view(rows, nodes, size)

    def _alone(self, x: Tensor, attend: Any, rotation: Rotation) -> Tensor:
        """One row, bound by the weights' bytes: everything around a product happens in its launch."""
        workspace = self._workspace
        y = attend(few_rows(x, self.qkv, self.qkv_bias, norm=Norm(self.input_gain, self._input_eps)))
        x = few_rows(y, self.out, self.out_bias, residual_MN=x, workspace=workspace)
        h = few_rows(x, self.gate_up, norm=Norm(self.mlp_gain, self._mlp_eps), gated=True)
        return few_rows(h, self.down, self.down_bias, residual_MN=x, workspace=workspace)

    def _few(self, x: Tensor, attend: Any, rotation: Rotation) -> Tensor:
        """As one row, in the tensor cores: a product leaves what the norm of the next one needs."""
        workspace = self._workspace
        ready, workspace.ready = workspace.ready, None
        if ready is not None and ready[0].data_ptr() == x.data_ptr() and ready[0].shape == x.shape:
            n = ready[1]
        else:
            n = scaled(x, self.input_norm)
        outputs, inputs = self.qkv.shape
        rotated = self.q_gain is None and rotation.fits(outputs, plan(len(x), outputs, inputs, False).BN)
        turned = rotation if rotated else None
        y = attend(stream(n, self.qkv, self.qkv_bias, rotation=turned, workspace=workspace)[0], rotated)
        mlp_norm = (self.mlp_gain, self._mlp_eps)
        x, n = stream(y, self.out, self.out_bias, residual_MN=x, norm=mlp_norm, workspace=workspace)
        assert n is not None
        h, _ = stream(n, self.gate_up, gated=True, workspace=workspace)
        x, behind = stream(h, self.down, self.down_bias, residual_MN=x, norm=self.next_norm, workspace=workspace)
        workspace.ready = None if behind is None else (x, behind)
        return x

    def _many(self, x: Tensor, attend: Any, rotation: Rotation) -> Tensor:
        """cuBLAS multiplies; norm and gate take launches of their own."""
        _, n = add_rms_norm(x, None, self.input_gain, self._input_eps)
        y = F.linear(attend(F.linear(n, self.qkv, self.qkv_bias)), self.out, self.out_bias)
        x, n = add_rms_norm(x, y, self.mlp_gain, self._mlp_eps)
        h = silu_mul(F.linear(n, self.gate_up))
        if self.down_bias is not None:
            return x + F.linear(h, self.down, self.down_bias)
        return torch.addmm(x, h, self.down.T)

    def _rotate(self, qkv: Tensor, rotation: Rotation) -> Tensor:
        norms = None
        if self.q_gain is not None and self.k_gain is not None:
            norms = HeadNorms(self.q_gain, self.k_gain, self._head_eps)
        return rope_write(qkv, rotation, norms)

    def _attend(self, q: Tensor, mask: Tensor, stored: LayerSlots) -> Tensor:
        """[B, H, N, d] -> [B, N, H * d]; ``mask`` as for ``attention.kernel_attention``."""
        keys, values, _ = stored
        if mask.dtype == torch.bool:
            return masked_attention(q, keys, values, mask, self.scaling).transpose(1, 2).flatten(2)
        lengths_B, words, at_B = mask_parts(mask)
        arrived = self._workspace.arrived
        return tree_attention(q, keys, values, lengths_B, words, self.scaling, arrived=arrived, at_B=at_B)


def _norm(norm: Any) -> tuple[nn.Parameter, float]:
    return norm.weight, float(norm.variance_epsilon)


def _join(*linears: Any, width: int = 0) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight and bias of one product for several with the same input. With a ``width`` they are q, k and v, and the
    halves of the first two's heads are interleaved."""
    if len(linears) == 1:
        return linears[0].weight, linears[0].bias

    def joined(parts: list[Tensor]) -> nn.Parameter:
        if width:
            parts = [*(interleaved(part, width) for part in parts[:-1]), parts[-1]]
        return nn.Parameter(torch.cat(parts), requires_grad=False)

    biases = [linear.bias for linear in linears]
    return joined([linear.weight for linear in linears]), None if biases[0] is None else joined(biases)
