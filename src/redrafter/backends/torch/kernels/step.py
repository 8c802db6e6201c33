"""The drafting side of a step on kernels, for the CUDA graph: inputs and outputs are the algorithm's own.

``algorithm/`` is the only text of the algorithm; each function here has its twin there and is tested equal to it. What
the kernels cover is a matter of shapes and of which settings are None, both fixed when a graph is captured:
``covers_shape`` and ``covers_sampling`` say it, and nothing is decided per step.
"""

import torch
from torch import Tensor

from redrafter.algorithm.accept import Accepted
from redrafter.algorithm.accept import accept as eager_accept
from redrafter.algorithm.accept import choose as eager_choose
from redrafter.algorithm.beam import DraftBeams, Drafter, Reading
from redrafter.algorithm.sampling import Sampling
from redrafter.algorithm.tree import TokenTree
from redrafter.backends.torch.kernels.accept import Sampled, accept, choose_tiles
from redrafter.backends.torch.kernels.beam import LookedUp, beam_level, levels, new_pool
from redrafter.backends.torch.kernels.noise import gumbel
from redrafter.backends.torch.kernels.pack import MAX_NODES, MAX_POOL, PackedTree, pack
from redrafter.backends.torch.kernels.state import advance as advance
from redrafter.backends.torch.kernels.topk import Coupling
from redrafter.backends.torch.ops import TorchOps
from redrafter.params import DecodeConfig

MAX_CHILDREN = 256
"""Children that one program ranks at a depth, beams and children each rounded up to a power of two."""


def covers_shape(shape: DecodeConfig, draft_vocabulary: int) -> bool:
    """Whether ``fast_draft`` and ``fast_pack`` take this shape; if not, use ``algorithm.beam.draft`` and ``pack``."""
    geometry = list(levels(shape, draft_vocabulary))
    ranked = max(_padded(level.beams) * _padded(level.children) for level in geometry)
    slots = geometry[-1].offset + geometry[-1].beams * geometry[-1].children + shape.deepest - shape.draft_length
    return ranked <= MAX_CHILDREN and slots <= MAX_POOL and 2 <= shape.tree_size <= MAX_NODES


def covers_sampling(sampling: Sampling) -> bool:
    """Whether the choice kernel takes these settings: temperature and seed, and nothing that reshapes the logits."""
    others = (sampling.top_k, sampling.top_p, sampling.log_min_p, sampling.bias, sampling.penalties)
    return all(setting is None for setting in others)


def _padded(size: int) -> int:
    return 1 << (size - 1).bit_length()


def fast_draft(
    drafter: Drafter,
    reading: Reading,
    root_B: Tensor,
    shape: DecodeConfig,
    noise: tuple[Tensor, Tensor] | None = None,
    arrived: Tensor | None = None,
) -> DraftBeams:
    """``algorithm.beam.draft``; of children with equal scores the lower index wins. One kernel per depth beside the
    drafter's own. ``drafter.logits`` may be float32, bfloat16 or float16. ``arrived``: int32 zeros for B rows or more,
    which every draft leaves at zero; without them they are made."""
    state = drafter.begin(reading)
    chain = drafter.recall(reading, shape.deepest) if shape.prompt_lookup else None
    logits_BWV = drafter.logits(state)
    geometry = list(levels(shape, logits_BWV.shape[-1]))
    last = geometry[-1]
    rows, device = root_B.shape[0], root_B.device
    tail = 0 if chain is None else chain.tokens.shape[1] - shape.draft_length
    pool = new_pool(rows, last.offset + last.beams * last.children + tail, device)
    if arrived is None or len(arrived) < rows:
        arrived = torch.zeros(rows, dtype=torch.int32, device=device)
    winners = None
    for level in geometry:
        coupling = None if noise is None else Coupling(noise[0][:, level.depth - 1], noise[1])
        looked_up = None if chain is None else LookedUp(chain, tail if level is last else 0)
        winners = beam_level(logits_BWV, level, pool, winners, arrived[:rows], drafter.token_ids, coupling, looked_up)
        if level is not last:
            state = drafter.extend(state, winners.beam, winners.token)
            logits_BWV = drafter.logits(state)
    assert winners is not None
    return DraftBeams(*pool, winners.slot, shape.draft_length, tail)


def fast_pack(beams: DraftBeams, root_B: Tensor, tree_size: int) -> PackedTree:
    """``algorithm.tree.pack``, and every node's ancestors as bits."""
    return pack(beams, root_B, tree_size)


def fast_noise(sampling: Sampling, lengths_B: Tensor, depths: int, vocabulary: int) -> tuple[Tensor, Tensor] | None:
    """``algorithm.step.step_noise``: the integers bit for bit, the logarithms to rounding. Plain and speculative
    decoding must take their noise from the same function: the last bit can decide a near-tie."""
    if sampling.inverse_temperature is None:
        return None
    assert sampling.key is not None
    return gumbel(sampling.key, lengths_B, depths, vocabulary), sampling.inverse_temperature


def fast_choose_accept(
    logits_BNV: Tensor, tree: TokenTree, sampling: Sampling, noise_BPV: Tensor | None, depths: int
) -> Accepted:
    """``algorithm.accept.choose_accept``. Settings that ``covers_sampling`` excludes choose by the algorithm's text,
    and a tree of more than MAX_NODES nodes is accepted by it."""
    covered = tree.tokens.shape[1] <= MAX_NODES
    if not (covered and covers_sampling(sampling)):
        choice = eager_choose(TorchOps(), logits_BNV.float(), tree, sampling, noise_BPV)
        return accept(tree, choice, depths) if covered else eager_accept(TorchOps(), tree, choice, depths)
    inverse = sampling.inverse_temperature
    sampled = None if noise_BPV is None or inverse is None else Sampled(noise_BPV, inverse)
    return accept(tree, choose_tiles(logits_BNV, tree.depth, sampled), depths)
