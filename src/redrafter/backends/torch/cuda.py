"""The backend on an NVIDIA GPU: one graph per step, kernels of our own, a host that stays one step behind."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from redrafter.algorithm.accept import Accepted
from redrafter.algorithm.beam import DraftBeams, Reading, draft
from redrafter.algorithm.lookup import Chain
from redrafter.algorithm.ops import Ops
from redrafter.algorithm.step import DecodeState, Stages, counted, step
from redrafter.algorithm.tree import TokenTree, pack
from redrafter.backends.base import BaseBackend, Fetched
from redrafter.backends.protocol import PromptPart
from redrafter.backends.torch.drafter import Drafter
from redrafter.backends.torch.drafting import DraftState, TorchDrafter
from redrafter.backends.torch.graph import IDLE, STOPS, CudaRecorder, Ends, GraphRunner, leaves, mapped
from redrafter.backends.torch.kernels import step as kernels
from redrafter.backends.torch.kernels.cell import block_and_cell, gated
from redrafter.backends.torch.kernels.lookup import find_chain
from redrafter.backends.torch.kernels.matmul import MAX_ROWS, few_rows
from redrafter.backends.torch.kernels.outcome import pack_outcome
from redrafter.backends.torch.kernels.rotate import interleaved
from redrafter.backends.torch.kernels.trunk import LastContext
from redrafter.backends.torch.kernels.window import window_attention
from redrafter.backends.torch.load import TorchBackend, bind
from redrafter.backends.torch.prompt import LENGTHS, LONG, MANY, MOST, SEGMENT, PromptReader
from redrafter.backends.torch.target import TorchTarget
from redrafter.backends.torch.trunk import Attend
from redrafter.params import DecodeConfig

STEP_PAIRS = 16
"""The trunk's kernel is compiled for every number of pairs: for those of a step, not for every length of a prompt."""
WIDE_HEAD, HEAD_ROWS = 512, 64
"""Inputs from which, and rows up to which, a head's product was measured."""
COUNTERS = 1024
IN_FLIGHT = 3
"""Pinned buffers per kind of outcome: one being read, one on its way, one being launched."""


class GraphBackend(TorchBackend):
    """TorchBackend whose step is recorded. ``record`` is a test's stand-in for CUDA's recorder."""

    def __init__(
        self,
        target: TorchTarget,
        drafter: Drafter | None,
        context_limit: int,
        eos_ids: Iterable[int],
        *,
        record: Any = None,
    ) -> None:
        super().__init__(target, None, context_limit, eos_ids)
        if drafter is not None:
            table = drafter.config.cell in ("gru", "rnn")
            kind = partial(KernelDrafter, embedding=target.model.get_input_embeddings().weight)
            self.drafter = bind(target, drafter, table=table, kind=kind)
        self.run_ahead = True
        self.reads_together = target.reads_chains
        self.stages = KERNELS
        self._record = record or CudaRecorder(target.device)
        self._runner, self._read_prompts = self._recorders()
        self._pinned: dict[Any, list[Any]] = {}
        self._told: Any = None

    @property
    def graphs(self) -> int:
        """Recorded so far."""
        return len(self._runner)

    def array(self, values: Any) -> Tensor:
        return self._sent(torch.tensor(values, dtype=torch.int64))

    def floats(self, values: Any) -> Tensor:
        return self._sent(torch.as_tensor(values, dtype=torch.float32))

    def _sent(self, values: Tensor) -> Tensor:
        """On the device, without waiting for the step in flight as a copy from pageable memory does."""
        if self.device.type != "cuda":
            return values
        return values.pin_memory().to(self.device, non_blocking=True)

    def reserve(self, rows: int, tokens: int) -> None:
        before = self.rows, self.slots
        super().reserve(rows, tokens)
        if (self.rows, self.slots) != before:
            self._runner.clear()
            self._read_prompts.clear()

    def _recorders(self) -> tuple[GraphRunner, PromptReader]:
        """For steps and for prompts."""
        runner = GraphRunner(self.whole_step, self._record, lambda: self.rows)
        return runner, PromptReader(self.target, self.drafter, self._record)

    @contextmanager
    def recorded_anew(self) -> Iterator[None]:
        kept, size = (self._runner, self._read_prompts), (self.rows, self.slots)
        self._runner, self._read_prompts = self._recorders()
        try:
            yield
        finally:
            self.synchronize()
            self._runner, self._read_prompts = kept
            if (self.rows, self.slots) != size:  # the caches have moved
                self._runner.clear()
                self._read_prompts.clear()

    def prepare(self, max_batch: int, shapes: Sequence[DecodeConfig]) -> None:
        """All of the cache, with room beyond the context for a tree at its end and what a step ahead of an answer's end
        writes, or for the pads of a prompt; and the graphs that read prompts."""
        spare = 2 * max([LENGTHS[-1] // 2, *(shape.tree_size for shape in shapes)])
        self.reserve(max_batch, self.context_limit + spare)
        for length in (*LENGTHS, *(LENGTHS[-1] * segments for segments in LONG)):
            self.prefill(0, [0] * min(length, self.context_limit))
        for segments in MANY if self.reads_together else ():
            self._read_prompts([PromptPart(0, [0] * min(SEGMENT, self.context_limit), 0, None)] * segments)

    @property
    def prompt_chunk(self) -> int:
        return MOST if self.reads_together else super().prompt_chunk

    def prefill_chunks(self, parts: Sequence[PromptPart]) -> list[tuple[Tensor, int]]:
        """By a graph: on one H200 launches one by one take 15 ms to 40 ms, whatever the chunk's length, and the graph
        of 128 tokens 5.4 ms in the 7B shape, 1.5 ms in that of SmolLM2."""
        if not self.reads_together:
            return super().prefill_chunks(parts)
        ends = [min(part.start + self.prompt_chunk, len(part.token_ids)) for part in parts]
        nexts = [
            part._replace(token_ids=part.token_ids[part.start : end]) for part, end in zip(parts, ends, strict=True)
        ]
        return list(zip(self._read_prompts(nexts), ends, strict=True))

    def step(self, state: DecodeState, config: DecodeConfig) -> tuple[DecodeState, Accepted, TokenTree]:
        view = self._runner(state, config)
        self._told = view.told
        return view.after, view.accepted, view.tree

    def ends(self, stop_ids: Collection[int], full: int) -> Ends | None:
        if not self.target.reads_chains:  # only the kernels know idle rows
            return None
        tokens = sorted(stop_ids)[:STOPS]
        return Ends(self.array([tokens + [-1] * (STOPS - len(tokens))]), self.array([full]))

    def keep_rows(self, state: DecodeState, order: Sequence[int]) -> DecodeState | None:
        return self._runner.keep(state, order)

    def whole_step(
        self, state: DecodeState, config: DecodeConfig
    ) -> tuple[DecodeState, Accepted, TokenTree, tuple[Any, ...]]:
        """What a graph records: the step, and what the host is told of it."""
        after, accepted, tree = step(self.ops, self.target, self.drafter, state, config, self.stages)
        logprobs = None if accepted.logits is None else self._logprobs(accepted.logits, accepted.tokens)
        if tree.tokens.shape[1] > kernels.MAX_NODES:
            return after, accepted, tree, (BaseBackend.fetch(self, accepted, tree).packed, logprobs)
        return after, accepted, tree, (pack_outcome(accepted, tree), logprobs)

    def fetch(self, accepted: Accepted, tree: TokenTree) -> Fetched:
        """Start the copy to pinned memory of what the last step told."""
        told = self._told
        if self.device.type != "cuda":
            return Fetched(*mapped(torch.clone, told))
        key = tuple(tuple(x.shape) for x in leaves(told))
        ring = self._pinned.setdefault(key, [])
        if len(ring) < IN_FLIGHT:
            ring.append(_pinned(told))
        else:
            ring.append(ring.pop(0))
        for to, value in zip(leaves(ring[-1]), leaves(told), strict=True):
            to.copy_(value, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        packed, logprobs = ring[-1]
        return Fetched(packed, logprobs, ready)

    def read(self, handle: Fetched) -> Any:
        if handle.ready is not None:
            handle.ready.synchronize()
        return super().read(handle)


def _pinned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return tuple(map(_pinned, value)) if isinstance(value, tuple) else value


class KernelDrafter(TorchDrafter):
    """TorchDrafter with a few launches per drafted token instead of a dozen, and ten per step instead of fifty.

    The head's input is x = W_c c + W_s s + b before the residual blocks; the context's part is computed once per step.
    The first block, x + silu(L x + l), is folded into it: of the stacked rows [W; L W] the products of c and s give x
    and L x + l at once (rounded once less than on the eager path, which acceptance may notice and no answer can).
    ``embedding`` [V, D]: what ``embed`` looks up in; without it the context is computed as TorchDrafter does.
    """

    def __init__(
        self,
        drafter: Drafter,
        embed: Callable[[Tensor], Tensor],
        head: Callable[[Tensor], Tensor],
        vocabulary: int = 0,
        table: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> None:
        super().__init__(drafter, embed, head, vocabulary, table)
        config = drafter.config
        self._gru = config.cell == "gru" and table is not None
        self._project = config.exit_dim != config.width + config.state_size
        if self._project:
            weight, self._bias = _with_block(drafter.input_proj, drafter.blocks[0].linear if drafter.blocks else None)
            parts = weight.split([config.width, config.state_size], 1)
            self._of_context, self._of_state = (part.contiguous() for part in parts)
            self._with_cell: tuple[Tensor, Tensor | None] = self._of_state, None
        """what the block's part of a state is computed with, and behind it the cell's"""
        self._ahead: tuple[Tensor, Tensor] | None = None
        """the states that were last looked at, and what the cell will add of them"""
        if self._gru and self._project and drafter.blocks:
            split, u = len(self._of_state), drafter.gru_u
            self._with_cell = torch.cat([self._of_state, u.weight]), u.bias
            self._of_state = self._with_cell[0][:split]
            u.weight = torch.nn.Parameter(self._with_cell[0][split:], requires_grad=False)
        self._last_context: LastContext | None = None
        self.arrived = torch.zeros(COUNTERS, dtype=torch.int32, device=drafter.token_ids.device)
        """counters of the beam search, a row each, which it leaves at zero"""
        if embedding is not None and LastContext.exists(drafter):
            self._last_context = LastContext(drafter, embedding)

    def allocate(self, rows: int, capacity: int) -> None:
        super().allocate(rows, capacity)
        if self._last_context is not None:
            self._last_context.allocate(self._keys[0].shape[2])

    def _first(self, reading: Reading) -> Tensor:
        """An idle row writes behind all texts."""
        behind = self._text.shape[1] - 1 - reading.tokens.shape[1]
        return torch.where(reading.first <= IDLE, behind, super()._first(reading))

    def _attention(self, rows: slice, position_BT: Tensor) -> Attend:
        # Where steps have a kernel of their own, what comes here waits while another would be compiled.
        if self._last_context is not None or position_BT.shape[1] > STEP_PAIRS:
            return super()._attention(rows, position_BT)
        first_B = position_BT[:, 0].contiguous()
        window = self.drafter.config.trunk_window

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cached = self._keys[layer][rows], self._values[layer][rows]
            return window_attention((q, k, v), cached, first_B, window)

        return attend

    def begin(self, reading: Reading) -> DraftState:
        rows = reading.tokens.shape[0]
        if self._last_context is None or not self._last_context.covers(reading):
            state = super().begin(reading)
        else:
            context = self._last_context(reading, self._keys[0], self._values[0])[:, None]
            zeroth, root_B1 = self.drafter.zeroth_state(context), reading.tokens[:, -1:]
            new = self._next_state(root_B1, zeroth, None) if self._gru else self._next(zeroth, root_B1, 0)
            state = DraftState(context, new, 0)
        if not self._project:
            return state
        if rows > MAX_ROWS:
            return state._replace(context=F.linear(state.context, self._of_context, self._bias))
        part = few_rows(state.context.reshape(rows, -1), self._of_context, self._bias)
        return state._replace(context=part[:, None])

    def recall(self, reading: Reading, length: int) -> Chain:
        reading = reading._replace(first=reading.first.contiguous(), count=reading.count.contiguous())
        return find_chain(reading, self._text, length)

    def extend(self, state: DraftState, beam_BW: Tensor, token_BW: Tensor) -> DraftState:
        rows, width = beam_BW.shape
        if not self._gru or rows * width > MAX_ROWS:
            return super().extend(state, beam_BW, token_BW)
        context = state.context
        if self._project and context.shape[1] != width:  # copied once per step, not once per depth
            context = context[:, :1].expand(rows, width, -1)
            context = context if rows == 1 else context.contiguous()
        return DraftState(context, self._next_state(token_BW, state.state, beam_BW), state.depth + 1)

    def _next_state(self, token_BW: Tensor, state_BPS: Tensor, beam_BW: Tensor | None) -> Tensor:
        """[B, W, S]: the cell's next states; without beams W = P and everyone continues itself."""
        assert self.table is not None
        if self._ahead is not None and self._ahead[0] is state_BPS:
            ahead = self._ahead[1]
        else:
            u = self.drafter.gru_u
            ahead = few_rows(state_BPS.flatten(0, 1), u.weight, u.bias)
        return gated(self.table, token_BW, state_BPS, beam_BW, ahead)

    def logits(self, state: DraftState) -> Tensor:
        rows, width, size = state.state.shape
        if not self._project:
            return super().logits(state)
        if rows * width > MAX_ROWS:
            x = state.context + F.linear(state.state, self._of_state)
            if self.drafter.blocks:
                x = x[..., 0::2] + F.silu(x[..., 1::2])
            for block in self.drafter.blocks[1:]:
                x = block(x)
        else:
            context = state.context.expand(rows, width, -1).reshape(rows * width, -1)
            flat = state.state.reshape(rows * width, size)
            if self.drafter.blocks:
                weight, bias = self._with_cell
                x, ahead = block_and_cell(flat, weight, context, bias)
                self._ahead = None if ahead is None else (state.state, ahead)
            else:
                x = few_rows(flat, self._of_state, residual_MN=context)
            for block in self.drafter.blocks[1:]:
                linear: Any = block.linear
                x = few_rows(x, linear.weight, linear.bias, residual_MN=x, silu=True)
        if self.drafter.config.head != "own":
            x = self.drafter.exit(x)
        flat, head = x.reshape(rows * width, -1), self._head
        if isinstance(head, torch.nn.Linear) and _ours_is_faster(flat):
            # Back and forth: 222 us of a draft of the 7B shape without its trunk become 207.
            return few_rows(flat, head.weight, backwards=state.depth % 2 == 1).view(rows, width, -1)
        return head(flat).view(rows, width, -1)


def _ours_is_faster(x: Tensor) -> bool:
    """A head's product of these rows by our kernel than by cuBLAS: of 8, 32 and 64 rows 12 of 341, 10 of 366 and 12 of
    432 us of a draft of the 7B shape."""
    return x.element_size() == 2 and x.shape[0] <= HEAD_ROWS and x.shape[1] >= WIDE_HEAD


def _with_block(proj: torch.nn.Linear, block: Any) -> tuple[Tensor, Tensor]:
    """Weight [2 E, ..] and bias [2 E] that give proj(x) and block(proj(x)), a row of each in turn; without a block
    those of ``proj``."""
    if block is None:
        return proj.weight, proj.bias
    weight, bias, inner = proj.weight.float(), proj.bias.float(), block.weight.float()
    folded = torch.cat([weight, inner @ weight]), torch.cat([bias, inner @ bias + block.bias.float()])
    whole, both = (interleaved(x, len(x)).to(proj.weight.dtype) for x in folded)
    return whole, both


def _noise(ops: Ops, target: Any, state: DecodeState, depths: int) -> Any:
    return kernels.fast_noise(state.sampling, state.lengths, depths, target.vocab_size)


def _draft(ops: Ops, drafter: Any, reading: Reading, root: Tensor, shape: DecodeConfig, noise: Any) -> DraftBeams:
    ids = drafter.token_ids
    vocabulary = len(ids) if ids is not None else drafter.drafter.config.vocab_size
    if kernels.covers_shape(shape, vocabulary):
        return kernels.fast_draft(drafter, reading, root, shape, noise, getattr(drafter, "arrived", None))
    return draft(ops, drafter, reading, root, shape, noise)


def _pack(ops: Ops, beams: DraftBeams, root: Tensor, tree_size: int) -> Any:
    pool = beams.score.shape[1]
    covered = 2 <= tree_size <= kernels.MAX_NODES and 0 < pool <= kernels.MAX_POOL
    if not covered:
        tree = pack(ops, beams, root, tree_size)
        if tree_size > 1:
            return tree
        itself = torch.arange(1, -1, -1, device=root.device).expand(len(root), 1, 2).contiguous()
        return tree._replace(ancestors=itself)
    packed = kernels.fast_pack(beams, root, tree_size)
    return packed.tree._replace(ancestors=packed.ancestors)


def _choose_accept(ops: Ops, logits: Tensor, tree: Any, sampling: Any, noise: Any, depths: int) -> Accepted:
    return kernels.fast_choose_accept(logits, tree, sampling, noise, depths)


def _advance(ops: Ops, state: DecodeState, features: Tensor, accepted: Accepted) -> DecodeState:
    read, first, count, lengths = kernels.advance(features, accepted, state.lengths, state.ends)
    reading = Reading(read, accepted.tokens, first, count)
    return DecodeState(reading, accepted.bonus, lengths, counted(ops, state.sampling, accepted), state.ends)


KERNELS = Stages(_noise, _draft, _pack, _choose_accept, _advance)
