"""The engine's backend on MLX: weights, caches, drafter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from redrafter.algorithm.accept import Accepted
from redrafter.algorithm.beam import Reading
from redrafter.algorithm.step import DecodeState, step
from redrafter.algorithm.tree import TokenTree
from redrafter.backends.base import BaseBackend, Fetched
from redrafter.backends.mlx.compiled import Steps
from redrafter.backends.mlx.drafter import Drafter
from redrafter.backends.mlx.drafting import MLXDrafter, token_table
from redrafter.backends.mlx.kv_cache import KVCache, on_cuda
from redrafter.backends.mlx.lengths import Lengths
from redrafter.backends.mlx.ops import MLXOps, constant
from redrafter.backends.mlx.target import MLXTarget, check_architecture
from redrafter.backends.protocol import Outcome
from redrafter.errors import CorruptModel, InvalidRequest, UnsupportedModel
from redrafter.params import MAX_TREE, DecodeConfig

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
GROWTH = 256
"""Slots by which the cache grows."""
PROMPT_LENGTHS = (64, 128, 256)
"""Tokens that CUDA reads at once."""


def use_device(name: str) -> None:
    """auto: the GPU if MLX has one, else the CPU. MLX computes everything on its default device, which this sets."""
    if name not in ("auto", "cpu", "gpu"):
        raise InvalidRequest(f"device={name!r} is unknown to --backend mlx: use auto, cpu or gpu")
    has_gpu = mx.is_available(mx.gpu)
    if name == "gpu" and not has_gpu:
        raise InvalidRequest("device='gpu': this build of MLX sees no GPU; use --device cpu")
    mx.set_default_device(mx.gpu if has_gpu and name != "cpu" else mx.cpu)


def load_target(folder: Path, config: dict[str, Any], dtype: str, feature_layers: Sequence[int] = ()) -> MLXTarget:
    """A target from a folder that mlx-lm can load, its own quantised checkpoints included.

    dtype auto: float32 on the CPU; on a GPU the 16-bit type the weights are stored in, bfloat16 if they are float32.
    Quantised weights stay what they are.
    """
    from mlx_lm.utils import load_model

    if dtype != "auto" and dtype not in DTYPES:
        raise InvalidRequest(f"dtype={dtype!r} is unknown: use auto, {', '.join(DTYPES)}")
    try:
        model, _ = load_model(folder, lazy=True, model_config=as_mlx_lm_reads(config))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "not supported" in reason:
            raise UnsupportedModel(f"{folder}: mlx-lm does not know it ({reason}); use --backend torch") from error
        raise CorruptModel(f"{folder}: mlx-lm cannot load it ({reason}); fetch the model again") from error
    check_architecture(model)
    model.set_dtype(pick_dtype(dtype, model.model.norm.weight.dtype, mx.default_device() == mx.gpu))
    target = MLXTarget(model, feature_layers)
    mx.eval(model.parameters())
    return target


def pick_dtype(name: str, stored: mx.Dtype, on_gpu: bool) -> mx.Dtype:
    """The type to compute in; ``name`` is known. float16 is faster than bfloat16 on M1 and M2, but it has to be asked
    for, since large activations overflow it."""
    if name != "auto":
        return DTYPES[name]
    if not on_gpu:
        return mx.float32
    return mx.bfloat16 if stored == mx.float32 else stored


def as_mlx_lm_reads(config: dict[str, Any]) -> dict[str, Any]:
    """Settings under the names that mlx-lm's models read.

    transformers 5 writes rope_theta and the rotary scaling inside rope_parameters, which mlx-lm's Llama and Qwen 2 do
    not open: they would rotate by their default base without a word. Defaults that a file leaves out come from
    transformers too, since mlx-lm ties word embeddings where transformers does not.
    """
    from transformers import CONFIG_MAPPING

    plain = without_quantisation(config)
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict(plain)
    rope = dict(getattr(parsed, "rope_parameters", None) or {})
    scaled = rope.get("rope_type", "default") != "default"
    settings = {
        "rope_theta": rope.get("rope_theta"),
        "rope_scaling": rope if scaled else None,
        "rope_parameters": rope,
        "tie_word_embeddings": parsed.tie_word_embeddings,
        "num_key_value_heads": getattr(parsed, "num_key_value_heads", None),
        "max_position_embeddings": parsed.max_position_embeddings,
    }
    return {name: value for name, value in settings.items() if value is not None or name == "rope_scaling"}


def without_quantisation(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the model that mlx-lm quantised: what it wrote about that is its own, and it reads it."""
    if "quantization" not in config:
        return config
    return {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}


class MLXBackend(BaseBackend):
    """What the engine asks for (``protocol.Backend``), on MLX.

    ``compiled``: a step is one compiled function; None: on Apple's GPUs. (On a CPU, ``mx.compile`` calls the system's
    C++ compiler for every kernel; on CUDA it takes minutes, and a plain step of the 7B shape then took 9.0 ms on an
    H200 instead of 5.8.) The host stays a step behind a GPU, so that it never waits for the host.
    """

    def __init__(
        self,
        target: MLXTarget,
        drafter: tuple[Drafter, mx.array | None] | None,
        context_limit: int,
        eos_ids: Iterable[int],
        vocabulary: int = 0,
        compiled: bool | None = None,
    ) -> None:
        on_gpu = mx.default_device() == mx.gpu
        self.run_ahead = on_gpu
        self.maskless = on_cuda()
        """whether attention without a mask has a kernel of its own for one query"""
        self.steps = Steps(self._whole_step, on_gpu and not on_cuda() if compiled is None else compiled)
        self._known = Lengths()
        self._told: Fetched | None = None
        self.ops = MLXOps()
        self.target = target
        self.context_limit = context_limit
        self.eos_ids = frozenset(eos_ids)
        self.drafter = None if drafter is None else bind(target, *drafter, vocabulary)

    @property
    def device(self) -> mx.Device:
        return mx.default_device()

    def reserve(self, rows: int, tokens: int) -> None:
        """The caches grow with use, by GROWTH slots or to twice their size."""
        cache = self.target.cache
        if rows <= cache.rows and tokens <= cache.slots:
            return
        whole = self.context_limit + MAX_TREE
        grown = max(-(-tokens // GROWTH) * GROWTH, min(2 * cache.slots, whole))
        cache.reserve(rows, grown if tokens > cache.slots else cache.slots)
        if self.drafter is not None:
            self.drafter.allocate(cache.rows, cache.slots)
        self.steps.clear()  # what was compiled for the old shapes is of no more use

    @contextmanager
    def recorded_anew(self) -> Iterator[None]:
        kept, size = self.steps, (self.rows, self.slots)
        self.steps = Steps(self._whole_step, kept.compiled)
        try:
            yield
        finally:
            self.steps = kept
            if (self.rows, self.slots) != size:
                kept.clear()

    @property
    def _caches(self) -> list[KVCache]:
        found = [self.target.cache, None if self.drafter is None else self.drafter.cache]
        return [cache for cache in found if cache is not None]

    def step(self, state: DecodeState, config: DecodeConfig) -> tuple[DecodeState, Accepted, TokenTree]:
        speculate = self.drafter is not None and config.tree_size > 1
        depths = config.deepest + 1 if speculate else 1
        if not self._known.about(state.lengths):
            self._known.start(state.lengths, self.host(state.lengths))
        caches, longest = self._caches if speculate else [self.target.cache], self._known.longest
        cache = caches[0]
        cache.expect(state.lengths.shape[0], config.tree_size if speculate else 1)
        limits = [cache.limit_of(longest, config.tree_size)]
        limits += [other.round_up(longest + depths) for other in caches[1:]]
        if not speculate:  # what waits for the drafter grows; a step that does not look at it keeps its shapes
            first = state.reading._replace(features=state.reading.features[:, :1], tokens=state.reading.tokens[:, :1])
            state = state._replace(reading=first)
            # A lone text of known length sees all of its slots: no mask, and kernels that take none.
            cache.whole = self.maskless and self._known.exact and not self.steps.compiled and cache.in_order(0)
            if cache.whole:
                limits[0] = longest + 1
        try:
            after, accepted, tree, self._told = self.steps(state, config, caches, tuple(limits))
        finally:
            cache.whole = False
        self._known.launched(after.lengths, self._told, depths)
        return after, accepted, tree

    def read(self, handle: Fetched) -> Outcome:
        outcome = super().read(handle)
        self._known.landed(handle, outcome.accepted)
        return outcome

    def _whole_step(self, state: DecodeState, config: DecodeConfig) -> tuple[DecodeState, Accepted, TokenTree, Fetched]:
        after, accepted, tree = step(self.ops, self.target, self.drafter, state, config, self.stages)
        told = super().fetch(accepted, tree)
        # CUDA moves memory that the host has read, and takes it for the next array of that size: kernels that write to
        # it wait for it to come back. One of them does, instead of one for every column.
        return after, accepted, tree, told._replace(packed=told.packed + constant((1, 1), 0, mx.int32))

    def fetch(self, accepted: Accepted, tree: TokenTree) -> Fetched:
        """It was made with the last step."""
        assert self._told is not None
        return self._told

    def catch_up(self, reading: Reading) -> None:
        super().catch_up(reading)
        self._start_reading()

    def prefill_chunk(
        self, row: int, token_ids: Sequence[int], start: int, before: mx.array | None
    ) -> tuple[mx.array, int]:
        read = super().prefill_chunk(row, token_ids, start, before)
        self._start_reading()
        return read

    def prompt_pads(self, start: int, count: int) -> int:
        """On CUDA, attention is planned and products are compiled anew for every shape: 50 ms to a second."""
        length = next((n for n in PROMPT_LENGTHS if n >= count), count)
        return length - count if self.target.steady and start + length <= self.slots else 0

    def _start_reading(self) -> None:
        """What was written into the caches is under way: a long prompt must not wait as one long list of operations."""
        mx.async_eval([cache.arrays for cache in self._caches])

    def no_features(self) -> mx.array:
        return mx.zeros(self.target.feature_size, dtype=self.target.mlx_dtype)

    def copy_prefix(self, source: int, to: int, tokens: int) -> None:
        self.target.cache.copy_prefix(source, to, tokens)
        if self.drafter is not None:
            self.drafter.copy_prefix(source, to, tokens)

    def swap_rows(self, a: int, b: int, tokens: int) -> None:
        self.target.cache.swap_rows(a, b, tokens)
        if self.drafter is not None:
            self.drafter.swap_rows(a, b, tokens)

    def array(self, values: Any) -> mx.array:
        return mx.array(values, dtype=mx.int32)

    def floats(self, values: Any) -> mx.array:
        return mx.array(values, dtype=mx.float32)

    def host(self, array: mx.array) -> Any:
        return array.tolist()

    def synchronize(self) -> None:
        mx.synchronize()


def bind(
    target: MLXTarget, drafter: Drafter, token_ids: mx.array | None, vocabulary: int = 0, table: bool | None = None
) -> MLXDrafter:
    """A drafter at work on this target: cast, with the target's own embedding and, if tied, its head.

    ``vocabulary``: how many of its own draft tokens, most frequent first, it may propose; 0 for all. ``table``: look
    up what a gru or rnn reads of a token (``token_table``); None: on CUDA, where launches cost more than its memory.
    """
    drafter.set_dtype(target.mlx_dtype)
    drafter.eval()
    if token_ids is not None and vocabulary:
        token_ids = token_ids[:vocabulary]
    if drafter.config.head == "own":
        own = None if token_ids is None else mx.arange(token_ids.shape[0])
        head = head_of(drafter.head, own)
    elif drafter.config.foldable and "scales" not in target.head:
        head = folded(target.head["weight"][token_ids], drafter)
    else:
        head = head_of(target.head, token_ids)
    mx.eval(drafter.parameters())
    if table is None:
        table = on_cuda()
    rows = token_table(drafter, target.embed) if table and drafter.config.cell in ("gru", "rnn") else None
    return MLXDrafter(drafter, target.embed, head, token_ids, rows)


def folded(rows: mx.array, drafter: Drafter) -> Callable[[mx.array], mx.array]:
    """The head's ``rows`` [V_d, D] times the drafter's matrix before them, which it then leaves out."""
    product = rows.astype(mx.float32) @ drafter.exit.weight.astype(mx.float32)
    transposed = product.astype(rows.dtype).T
    drafter.exit = nn.Identity()
    mx.eval(transposed)
    return lambda x: x @ transposed


def head_of(module: nn.Module, rows: mx.array | None) -> Callable[[mx.array], mx.array]:
    """x [..., in] -> scores of these rows of a linear or embedding, quantised or not; None: of all rows."""
    if rows is None:
        return module.as_linear if hasattr(module, "as_linear") else module
    if "scales" in module:
        parts = {name: module[name][rows] for name in ("weight", "scales", "biases") if module.get(name) is not None}
        mx.eval(parts)
        weight, scales, biases = parts["weight"], parts["scales"], parts.get("biases")
        how = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        return lambda x: mx.quantized_matmul(x, weight, scales, biases, transpose=True, **how)
    transposed = module["weight"][rows].T
    return lambda x: x @ transposed
