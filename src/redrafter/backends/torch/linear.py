"""Matrix products whose result for a row does not depend on how many rows there are.

oneDNN's blocked weights give that on x86, and are also faster than torch's plain product. A single row may take another
kernel, so it is doubled, which costs nothing. So may many rows: where a CPU has AMX, bfloat16 products of more than 32
rows add in another order (Xeon, oneDNN of torch 2.13; float32 does not). How many rows agree is found out once per
process (``most_rows``), and products of more are made in parts. The two operators are torch's own but private; where
they are missing, plain products are used and ``row_invariant`` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

PACKABLE = (torch.bfloat16, torch.float32)
PROBED = ((4096, 576), (2048, 1536))
"""[out, in]: large enough that one sum in 10,000 shows (AMX: 1 in 4,000 to 14,000)."""
LIMITS = (512, 32)
"""What ``most_rows`` may be. More rows than the first are made in parts in any case."""
COUNTS = (1, 2, 3, 5, 8, 12, 16, 24, 32, 33, 48, 64, 100, 256)


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
        limit = most_rows(self._weight.dtype) or len(rows)
        if len(rows) <= limit:
            y = self._product(rows)
        else:
            y = torch.cat([self._product(part) for part in rows.split(limit)])
        return y.reshape(*x.shape[:-1], self.out_features)

    def _product(self, rows: Tensor) -> Tensor:
        alone = len(rows) == 1
        if alone:
            rows = rows.expand(2, -1).contiguous()
        y: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return y[:1] if alone else y


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


@cache
def most_rows(dtype: torch.dtype) -> int:
    """The largest of LIMITS up to which this machine's packed products do not depend on how many rows there are; 0 if
    none is. A tenth of a second, once."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        products = []
        for out, width in PROBED:
            linear = PackedLinear(torch.randn(out, width, generator=generator).to(dtype))
            products.append((linear._product, torch.randn(LIMITS[0], width, generator=generator).to(dtype)))
        return next((limit for limit in LIMITS if all(_agree(p, x[:limit]) for p, x in products)), 0)


def _agree(product: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether the first rows of a product are what they are without the others."""
    whole = product(x)
    return all(torch.equal(product(x[:n]), whole[:n]) for n in COUNTS if n < len(x))


def row_invariant(dtype: torch.dtype, shapes: Sequence[tuple[int, int]] = PROBED) -> bool:
    """Whether rows of packed products with weights of these shapes [out, in] are bit-equal however many there are.

    A probe of this machine's kernels: where it says no, or nothing can be packed, near-ties may fork in ``dtype``.
    """
    if not can_pack(dtype, torch.device("cpu")):
        return False
    generator = torch.Generator().manual_seed(0)
    for out, width in shapes:
        linear = PackedLinear(torch.randn(out, width, generator=generator).to(dtype))
        if not _agree(linear, torch.randn(300, width, generator=generator).to(dtype)):
            return False
    return True
