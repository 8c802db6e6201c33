"""The recurrent drafter: one configuration, several variants, one forward for training and decoding.

Context (once per step):  c = trunk(W_f [features ; e(next)])       or the last hidden state itself (paper)
Token (per drafted token): e, normed if the context is learned, projected if the drafter is narrower than the target
Cell (per drafted token): s = SiLU(W e + U s + b), s_0 = 0 (paper section 3.1, ``rnn``), or a GRU
Head (per drafted token): logits = head(n x (x + SiLU(L x + b)) of [c ; s])

Legend: B rows, T tokens, F features, D the target's hidden size, C the drafter's width (mostly D).
Embeddings, and with ``head="tied"`` the output head, are the target's own and frozen: they are passed in, never stored.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redrafter.backends.torch.trunk import Attend, Trunk, rms
from redrafter.drafter_config import CELLS, HEADS, DrafterConfig

__all__ = ["CELLS", "HEADS", "Drafter", "DrafterConfig", "ResidualBlock"]


class ResidualBlock(nn.Module):
    """x + SiLU(L x + b) (paper section 3.1; Medusa's block)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class Drafter(nn.Module):
    """The drafter's own weights. Tensors keep any leading axes; the last one is the width."""

    token_ids: Tensor  # [V_d] target id of every draft token

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        width, state = config.width, config.state_size
        if config.fused:
            self.fuse = nn.Linear(config.feature_size + config.hidden_size, width, bias=False)
            self.trunk = Trunk(
                config.trunk_layers,
                width,
                config.trunk_heads,
                config.trunk_kv_heads,
                config.trunk_expansion,
                config.trunk_window,
            )
        if config.projected:
            self.embed_proj = nn.Linear(config.hidden_size, width, bias=False)
        if config.cell == "rnn":
            self.rnn_w = nn.Linear(width, state, bias=False)
            self.rnn_u = nn.Linear(state, state)
        elif config.cell == "gru":
            self.gru_w = nn.Linear(width, 3 * state, bias=False)
            self.gru_u = nn.Linear(state, 3 * state)
        elif config.cell == "medusa":
            self.depth_blocks = nn.ModuleList(ResidualBlock(state) for _ in range(config.draft_length))
        joint = width + state
        if config.exit_dim != joint:
            self.input_proj = nn.Linear(joint, config.exit_dim)
        self.blocks = nn.ModuleList(ResidualBlock(config.exit_dim) for _ in range(config.num_blocks))
        if config.head == "own":
            self.head = nn.Linear(config.exit_dim, config.vocabulary, bias=False)
        else:
            self.exit = nn.Linear(config.exit_dim, config.hidden_size, bias=False)
        self.register_buffer("token_ids", torch.arange(config.vocabulary), persistent=config.draft_vocabulary > 0)

    def context(
        self,
        features_BTF: Tensor,
        next_BTD: Tensor,
        position_BT: Tensor,
        attend: Attend | None = None,
    ) -> Tensor:
        """What stays constant while one tree is drafted: [B, T, F] features, [B, T, D] embeddings of the tokens that
        follow them -> [B, T, C]. ``attend`` is the trunk's (``trunk.py``); without it T is the text."""
        if not self.config.fused:
            return features_BTF[..., : self.config.hidden_size]
        parts = [rms(x) for x in features_BTF.split(self.config.hidden_size, dim=-1)]
        x = self.fuse(torch.cat([*parts, rms(next_BTD)], dim=-1))
        return rms(self.trunk(x, position_BT, attend))

    def first_state(self, context: Tensor, root_embedding: Tensor) -> Tensor:
        """s_1: the state after the root, from s_0. [..., C], [..., D] -> [..., state]."""
        return self.next_state(self.zeroth_state(context), root_embedding, 0)

    def zeroth_state(self, context: Tensor) -> Tensor:
        """s_0: the context or zeros."""
        if self.config.context_state:
            return context
        return context.new_zeros(*context.shape[:-1], self.config.state_size)

    def next_state(self, state: Tensor, embedding: Tensor, depth: int) -> Tensor:
        """[..., state], [..., D] -> [..., state]: read one more token; ``depth`` drafted tokens were read before it."""
        if self.config.cell == "medusa" and depth > 0:
            # No recurrence: the state names the depth only, and the tokens drafted so far are not looked at.
            return self.depth_blocks[min(depth, self.config.draft_length - 1)](state)
        return self.take(state, self.token_input(embedding))

    def token_input(self, embedding: Tensor) -> Tensor:
        """What the cell adds of a token, whatever the state: [..., D] -> [..., 3 state] (gru) or [..., state]."""
        cell = self.config.cell
        e = rms(embedding) if cell == "medusa" or (self.config.fused and cell != "sum") else embedding
        if self.config.projected:
            e = self.embed_proj(e)
        if cell == "rnn":
            return self.rnn_w(e)
        return self.gru_w(e) if cell == "gru" else e

    def take(self, state: Tensor, token: Tensor) -> Tensor:
        """[..., state] and a token's ``token_input`` -> [..., state]."""
        if self.config.cell == "sum":
            return state + token
        if self.config.cell == "medusa":
            return self.depth_blocks[0](token)
        if self.config.cell == "rnn":
            return F.silu(token + self.rnn_u(state))
        r_w, z_w, n_w = token.chunk(3, -1)
        r_u, z_u, n_u = self.gru_u(state).chunk(3, -1)
        z = torch.sigmoid(z_w + z_u)
        return (1 - z) * torch.tanh(n_w + torch.sigmoid(r_w + r_u) * n_u) + z * state

    def exit_hidden(self, context: Tensor, state: Tensor) -> Tensor:
        """[..., exit_dim] (own head) or [..., D] (tied head): what the head is applied to. h first, as Apple's."""
        x = torch.cat([context.expand(*state.shape[:-1], context.shape[-1]), state], dim=-1)
        if self.config.exit_dim != x.shape[-1]:
            x = self.input_proj(x)
        for block in self.blocks:
            x = block(x)
        return x if self.config.head == "own" else self.exit(x)
