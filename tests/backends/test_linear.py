"""Rows of a packed product are the same bits however many there are."""

from __future__ import annotations

import pytest
import torch

from redrafter.backends.torch import linear
from redrafter.backends.torch.linear import PackedLinear, can_pack, most_rows, row_invariant

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_how_many_there_are(dtype: torch.dtype) -> None:
    if not can_pack(dtype, CPU) or not most_rows(dtype):
        pytest.skip(f"this CPU's products in {dtype} are not packed, or agree for no number of rows")
    assert row_invariant(dtype)
    torch.manual_seed(1)
    packed, x = PackedLinear(torch.randn(8192, 576).to(dtype)), torch.randn(600, 576).to(dtype)
    whole = packed(x)
    for rows in (1, 2, 31, 32, 33, 64, 65, 513):
        assert torch.equal(packed(x[:rows]), whole[:rows])


def test_more_rows_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_pack(torch.float32, CPU):
        pytest.skip("nothing is packed here")
    packed, made, product = PackedLinear(torch.randn(5, 8), torch.randn(5)), [], PackedLinear._product
    x = torch.randn(2, 5, 8)
    expected = packed(x)
    monkeypatch.setattr(linear, "most_rows", lambda dtype: 3)
    monkeypatch.setattr(PackedLinear, "_product", lambda self, rows: made.append(len(rows)) or product(self, rows))
    torch.testing.assert_close(packed(x), expected)
    assert made == [3, 3, 3, 1]
    monkeypatch.setattr(linear, "most_rows", lambda dtype: 0)
    packed(x)
    assert made[4:] == [10]


def test_products_that_agree_for_no_number_of_rows_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_pack(torch.float32, CPU):
        pytest.skip("nothing is packed here")
    product = PackedLinear._product
    monkeypatch.setattr(PackedLinear, "_product", lambda self, rows: product(self, rows) + len(rows))
    assert most_rows.__wrapped__(torch.float32) == 0
    assert not row_invariant(torch.float32, ((16, 8),))
