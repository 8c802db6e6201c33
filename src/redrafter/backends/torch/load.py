"""The engine's backend on torch: weights, caches, drafter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from redrafter.backends.base import BaseBackend
from redrafter.backends.torch import linear
from redrafter.backends.torch.attention import EXACT, FAST, KERNEL
from redrafter.backends.torch.drafter import Drafter
from redrafter.backends.torch.drafting import TorchDrafter, token_table
from redrafter.backends.torch.fused import fuse_layers
from redrafter.backends.torch.gpu import cuda_trouble, room_for
from redrafter.backends.torch.ops import TorchOps
from redrafter.backends.torch.target import TorchTarget
from redrafter.errors import CorruptModel, InvalidRequest
from redrafter.params import MAX_TREE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """auto: the first CUDA device if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") and not name.startswith("cuda:"):
        raise InvalidRequest(f"device={name!r} is unknown: use cpu, cuda or cuda:N")
    if name != "cpu" and (trouble := cuda_trouble()):
        raise InvalidRequest(f"device={name!r}: {trouble}")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the device multiplies it natively, else float32."""
    if name != "auto":
        if name not in DTYPES:
            raise InvalidRequest(f"dtype={name!r} is unknown: use auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else linear.can_pack(torch.bfloat16, device)
    return torch.bfloat16 if native else torch.float32


def load_target(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    feature_layers: Sequence[int] = (),
    attention: str | None = None,
) -> TorchTarget:
    """A transformers model from a local folder, with one of our attention functions (by default the exact one on the
    CPU, torch's own kernels elsewhere) and, on the CPU, packed weights."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention or (EXACT if device.type == "cpu" else FAST),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CorruptModel(f"{folder}: transformers cannot load it ({first_line}); fetch the model again") from error
    with room_for("the model's weights"):
        return make_target(model.to(device), feature_layers)


def make_target(model: Any, feature_layers: Sequence[int] = ()) -> TorchTarget:
    """A target from a model in memory that was made with one of our attention functions; its linears are swapped."""
    fuse_layers(model)
    if model.config._attn_implementation == KERNEL:
        from redrafter.backends.torch.kernels.layer import fuse_cuda_layers  # needs triton

        fuse_cuda_layers(model)
    target = TorchTarget(model, feature_layers)
    linear.pack_linears(model)
    return target


class TorchBackend(BaseBackend):
    """What the engine asks for (``engine.Backend``), on torch."""

    def __init__(
        self,
        target: TorchTarget,
        drafter: Drafter | None,
        context_limit: int,
        eos_ids: Iterable[int],
        vocabulary: int = 0,
        table: bool = False,
    ) -> None:
        self.ops = TorchOps()
        self.target = target
        self.context_limit = context_limit
        self.eos_ids = frozenset(eos_ids)
        self.drafter = None if drafter is None else bind(target, drafter, vocabulary, table)

    @property
    def device(self) -> torch.device:
        return self.target.device

    def reserve(self, rows: int, tokens: int) -> None:
        """On the CPU the caches grow with use; elsewhere the caller reserves the largest once."""
        cache = self.target.cache
        if rows <= cache.rows and tokens <= cache.slots:
            return
        slots = cache.slots
        if tokens > slots:
            slots = max(tokens, min(2 * slots, self.context_limit + MAX_TREE))
        with room_for(f"a key/value cache of {max(rows, cache.rows)} rows of {slots} tokens"):
            cache.reserve(rows, slots)
            if self.drafter is not None:
                self.drafter.allocate(cache.rows, cache.slots)

    def no_features(self) -> Tensor:
        return torch.zeros(self.target.feature_size, dtype=self.target.dtype, device=self.device)

    def copy_prefix(self, source: int, to: int, tokens: int) -> None:
        self.target.cache.copy_prefix(source, to, tokens)
        if self.drafter is not None:
            self.drafter.copy_prefix(source, to, tokens)

    def swap_rows(self, a: int, b: int, tokens: int) -> None:
        self.target.cache.swap_rows(a, b, tokens)
        if self.drafter is not None:
            self.drafter.swap_rows(a, b, tokens)

    def array(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def floats(self, values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=self.device)

    def host(self, array: Tensor) -> Any:
        return array.tolist()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def mark(self) -> Callable[[], None] | None:
        if self.device.type != "cuda":
            return super().mark()
        event = torch.cuda.Event()
        event.record()
        return event.synchronize


@torch.no_grad()
def bind(
    target: TorchTarget,
    drafter: Drafter,
    vocabulary: int = 0,
    table: bool = False,
    kind: Callable[..., TorchDrafter] = TorchDrafter,
) -> TorchDrafter:
    """A drafter at work on this target: cast, packed, with the target's own embedding and, if tied, its head.

    ``table``: look up what the cell reads of a token (``token_table``): vocab_size x 3 x state_size numbers more
    memory for a gru, and its input product gone from every drafted token.
    """
    config = drafter.config
    drafter = drafter.to(target.device, target.dtype).eval().requires_grad_(False)
    weight = drafter.head.weight if config.head == "own" else target.head_weight
    if config.draft_vocabulary:
        weight = (weight if config.head == "own" else weight[drafter.token_ids])[: vocabulary or None]
    if config.foldable:
        weight = (weight.float() @ drafter.exit.weight.float()).to(target.dtype)
        drafter.set_submodule("exit", nn.Identity())
    linear.pack_linears(drafter)
    rows = token_table(drafter, target.embed) if table else None
    return kind(drafter, target.embed, linear.make_linear(weight), vocabulary, rows)
