"""Matrix products whose result for a row does not depend on how many rows there are.

oneDNN's blocked weights give that on x86 (measured: bit-equal for 2 to 512 rows; a single row may take another kernel,
so it is doubled, which costs nothing), and are also faster than torch's plain product. The two
operators are torch's own but private; where they are missing, plain products are used and ``row_invariant`` says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

PACKABLE = (torch.bfloat16, torch.float32)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    ops = torch.ops.mkldnn
    known = hasattr(ops, "_linear_pointwise") and hasattr(ops, "_reorder_linear_weight")
    if device.type != "cpu" or dtype not in PACKABLE or not torch.backends.mkldnn.is_available() or not known:
        return False
    return dtype != torch.bfloat16 or ops._is_mkldnn_bf16_supported()


class PackedLinear(nn.Module):
    """nn.Linear over a weight in oneDNN's blocked layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 16)
        self._bias = None if bias is None else bias.detach()

    @property
    def weight_bytes(self) -> int:
        return self.in_features * self.out_features * self._weight.element_size()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        alone = rows.shape[0] == 1
        if alone:
            rows = rows.expand(2, -1).contiguous()
        y = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return (y[:1] if alone else y).reshape(*x.shape[:-1], self.out_features)


def make_linear(weight: Tensor) -> nn.Module:
    """A bias-free product with ``weight`` [out, in]: packed where that is possible."""
    if can_pack(weight.dtype, weight.device):
        return PackedLinear(weight)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return plain


def pack_linears(model: nn.Module) -> None:
    """Swap every nn.Linear of the model for its packed form; the plain weights are freed."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and can_pack(module.weight.dtype, module.weight.device):
            model.set_submodule(name, PackedLinear(module.weight, module.bias))


def row_invariant(dtype: torch.dtype, shapes: Sequence[tuple[int, int]] = ((960, 576), (576, 1536))) -> bool:
    """Whether rows of packed products with weights of these shapes [out, in] are bit-equal however many there are.

    A probe of this machine's kernels: where it says no, or nothing can be packed, near-ties may fork in ``dtype``.
    """
    if not can_pack(dtype, torch.device("cpu")):
        return False
    generator = torch.Generator().manual_seed(0)
    for out, width in shapes:
        linear = PackedLinear(torch.randn(out, width, generator=generator).to(dtype))
        x = torch.randn(64, width, generator=generator).to(dtype)
        whole = linear(x)
        if not all(torch.equal(linear(x[:n]), whole[:n]) for n in (1, 2, 3, 5, 8, 12, 16, 24, 33, 48)):
            return False
    return True
