"""What the host is told, in one launch, against the backend's own text."""

from __future__ import annotations

import pytest
import torch

from redrafter.algorithm.accept import Accepted
from redrafter.algorithm.tree import TokenTree, ancestor_mask
from redrafter.backends.base import BaseBackend
from redrafter.backends.torch.kernels.outcome import pack_outcome
from redrafter.backends.torch.ops import TorchOps


class Backend(BaseBackend):
    ops = TorchOps()


@pytest.mark.parametrize("nodes", [1, 7, 64])
def test_one_launch_says_what_the_backend_says(device: torch.device, nodes: int) -> None:
    generator = torch.Generator().manual_seed(nodes)
    rows, depths = 3, 5
    parent, depth = torch.zeros(rows, nodes, dtype=torch.int64), torch.zeros(rows, nodes, dtype=torch.int64)
    for row in range(rows):
        for node in range(1, nodes):
            parent[row, node] = torch.randint(max(0, node - 4), node, (), generator=generator)
            depth[row, node] = depth[row, parent[row, node]] + 1
    live = torch.arange(nodes) < torch.randint(1, nodes + 1, (rows, 1), generator=generator)
    mask = ancestor_mask(TorchOps(), parent, nodes)
    tokens = torch.randint(0, 99, (rows, nodes), generator=generator)
    tree = TokenTree(*(x.to(device) for x in (tokens, parent, depth, mask, live)))
    emitted, length = torch.randint(0, 99, (rows, depths), generator=generator), torch.tensor([0, 4, 2])
    finite = torch.tensor([True, False, True])
    accepted = Accepted(*(x.to(device) for x in (emitted, length, emitted[:, 0], emitted, finite)))
    assert torch.equal(pack_outcome(accepted, tree), Backend().fetch(accepted, tree).packed)
