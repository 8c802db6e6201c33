"""Prompt lookup in the drafter's own tree: what followed when the text was last like this is likely to follow again.

A name from the prompt, a line of code or a list that goes on need not be guessed. What was found is no branch of its
own: it is mixed into the weights by which the beam search ranks children (``beam.py``), so that prefixes it shares with
beams merge and siblings stay distinct. Prompt lookup is Saxena's (2023), in one tree with a drafter's branches SAM
decoding's (arXiv:2411.10666). docs/algorithm.md says what it gains.

Letters: B rows, S positions, L draft length, W beams, K children per beam.
"""

from __future__ import annotations

from typing import NamedTuple

from redrafter.algorithm.ops import Array, Ops

LEAST, MOST = 2, 16
"""Tokens at the text's end that must have been there before, and that are compared at most."""
UNKNOWN = -1
"""In the place of a token that the drafter has not read."""
DOUBT = 4.0
"""After n equal tokens the next one is taken to be equal with probability n / (n + DOUBT). Greedy answers of
SmolLM2-135M keep to it more often than that, sampled ones less. Tokens per step of 260 answers each at 16 and 64 nodes,
without lookup, with 2 and with 4: greedy 4.04 and 4.80, 5.23 and 6.47, 5.35 and 6.48; at temperature 1 2.71 and 3.28,
2.69 and 3.31, 2.73 and 3.32."""


class Chain(NamedTuple):
    """What followed the latest of the longest earlier occurrences of the text's end."""

    tokens: Array  # [B, L] int64
    weight: Array  # [B, L] float32: how likely each is if those before it were right; 0: nothing was found


def find_chain(ops: Ops, text_BS: Array, end_B: Array, length: int) -> Chain:
    """``text``: tokens by position, ``UNKNOWN`` or anything but the row's own behind ``end_B``, its last token. Where
    the earlier occurrence reaches the end it is repeated: a loop goes on. In a row that nobody runs in a chain may lead
    to where nothing was read; also there its tokens are a vocabulary's, for a tree verifies what is dead, too."""
    slots = text_BS.shape[1]
    position_S, back_M = ops.arange(slots, like=end_B), ops.arange(MOST, like=end_B)
    at_SM, own_BM = position_S[:, None] - back_M, end_B[:, None] - back_M
    earlier_BSM = text_BS[:, ops.where(at_SM < 0, 0, at_SM)]
    last_BM = ops.take_along(text_BS, ops.where(own_BM < 0, 0, own_BM), 1)
    differs_BSM = (earlier_BSM != last_BM[:, None]) | (at_SM < 0)[None] | (own_BM < 0)[:, None]
    end_BS1 = ops.full((end_B.shape[0], slots, 1), True, like=end_B)
    equal_BS = ops.argmax(ops.float32(ops.concat([differs_BSM, end_BS1], 2)))
    before_BS = (position_S[None] < end_B[:, None]) & (equal_BS >= LEAST)
    found_B1 = ops.argmax(ops.where(before_BS, equal_BS * slots + position_S[None], 0))[:, None]
    equal_B1 = ops.where(ops.take_along(before_BS, found_B1, 1), ops.take_along(equal_BS, found_B1, 1), 0)
    ahead_1L = ops.arange(length, like=end_B)[None]
    period_B1 = ops.where(equal_B1 > 0, end_B[:, None] - found_B1, 1)
    tokens_BL = ops.take_along(text_BS, found_B1 + 1 + ahead_1L % period_B1, 1)
    known_BL = (equal_B1 > 0) & (ops.cumsum(ops.float32(tokens_BL < 0)) == 0)
    sure_BL = ops.float32(ops.where(known_BL, equal_B1 + ahead_1L, 0))
    return Chain(ops.where(tokens_BL < 0, 0, tokens_BL), sure_BL / (sure_BL + DOUBT))


def mixed(
    ops: Ops, chain: Chain, depth: int, follows_BW: Array, token_BWK: Array, weight_BWK: Array
) -> tuple[Array, Array, Array]:
    """Children's tokens and log weights with the chain in them, and which children follow it.

    A beam that ``follows`` the chain gives its next token the share c of weight and what it had of the rest: q becomes
    (1 - c) q + c [the chain's]. A token that is not among its children takes the last one's place, if it outweighs it.
    """
    children = token_BWK.shape[2]
    guess_B11, share_B11 = chain.tokens[:, depth - 1][:, None, None], chain.weight[:, depth - 1][:, None, None]
    last_1K = (ops.arange(children, like=token_BWK) == children - 1)[None, None]
    uses_BW1 = follows_BW[:, :, None] & (share_B11 > 0)
    hit_BWK = (token_BWK == guess_B11) & uses_BW1
    no_weight = float("-inf")
    own_BWK = weight_BWK + ops.log(1 - share_B11)
    missing_BWK = uses_BW1 & (ops.sum(hit_BWK)[:, :, None] == 0) & last_1K & (ops.log(share_B11) > own_BWK)
    hit_BWK = hit_BWK | missing_BWK
    own_BWK = ops.where(missing_BWK, no_weight, own_BWK)
    chains_BWK = ops.where(hit_BWK, ops.log(share_B11), no_weight)
    both_BWK = ops.logsumexp(ops.stack([own_BWK, chains_BWK], 3))[..., 0]
    token_BWK = ops.where(missing_BWK, guess_B11, token_BWK)
    return token_BWK, ops.where(uses_BW1, both_BWK, weight_BWK), hit_BWK
