"""Copies in one launch against torch's."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")

from redrafter.backends.torch.kernels.copies import BLOCK, copied_together, copy_together


@pytest.mark.parametrize("count", [1, 2, 6, 8])
def test_copies(count: int) -> None:
    shapes = [(3,), (2, 7, BLOCK + 6), (1,), (5, 2), (1, 9), (4,), (2, 2), (6, BLOCK)][:count]
    dtypes = [
        torch.int64,
        torch.float16,
        torch.float32,
        torch.int32,
        torch.int64,
        torch.float32,
        torch.int64,
        torch.half,
    ]
    sources = [torch.randn(shape).mul(99).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]
    held = [torch.zeros(len(x) + 1, *x.shape[1:], dtype=x.dtype) for x in sources]
    pairs = [(to[:-1], x) for to, x in zip(held, sources, strict=True)]
    assert all(copied_together(*pair) for pair in pairs)
    copy_together(pairs)
    for to, x in zip(held, sources, strict=True):
        assert torch.equal(to[:-1], x)
        assert not to[-1].any(), "written behind the end"


def test_what_is_copied_apart() -> None:
    x = torch.zeros(4, 6)
    assert copied_together(x, x.clone())
    assert not copied_together(x, x.half())
    assert not copied_together(x, torch.zeros(6, 4).T)
    assert not copied_together(torch.zeros(3, dtype=torch.half), torch.zeros(3, dtype=torch.half))
