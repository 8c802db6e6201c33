"""The engine's backend on torch: weights, caches, drafter, and the settings of a batch as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redrafter.algorithm.beam import Reading
from redrafter.algorithm.noise import key_of
from redrafter.algorithm.sampling import Penalties, Sampling
from redrafter.backends.torch import linear
from redrafter.backends.torch.attention import EXACT, FAST
from redrafter.backends.torch.drafter import Drafter
from redrafter.backends.torch.drafting import TorchDrafter
from redrafter.backends.torch.fused import fuse_layers
from redrafter.backends.torch.ops import TorchOps
from redrafter.backends.torch.target import PREFILL_CHUNK, TorchTarget
from redrafter.errors import CorruptModel, InvalidRequest
from redrafter.params import MAX_TREE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """auto: the first CUDA device if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") and not name.startswith("cuda:"):
        raise InvalidRequest(f"device={name!r} is unknown: use cpu, cuda or cuda:N")
    if name != "cpu" and not torch.cuda.is_available():
        raise InvalidRequest(f"device={name!r}: torch {torch.__version__} sees no CUDA device; use --device cpu")
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
    folder: Path, dtype: torch.dtype, device: torch.device, feature_layers: Sequence[int] = ()
) -> TorchTarget:
    """A transformers model from a local folder, with our attention and, on the CPU, packed weights."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=EXACT if device.type == "cpu" else FAST,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CorruptModel(f"{folder}: transformers cannot load it ({first_line}); fetch the model again") from error
    return make_target(model.to(device), feature_layers)


def make_target(model: Any, feature_layers: Sequence[int] = ()) -> TorchTarget:
    """A target from a model in memory that was made with one of our attention functions; its linears are swapped."""
    fuse_layers(model)
    target = TorchTarget(model, feature_layers)
    linear.pack_linears(model)
    return target


class TorchBackend:
    """What the engine asks for (``engine.Backend``), on torch."""

    def __init__(
        self,
        target: TorchTarget,
        drafter: Drafter | None,
        context_limit: int,
        eos_ids: Iterable[int],
        vocabulary: int = 0,
    ) -> None:
        self.ops = TorchOps()
        self.target = target
        self.context_limit = context_limit
        self.eos_ids = frozenset(eos_ids)
        self.drafter = None if drafter is None else bind(target, drafter, vocabulary)

    @property
    def device(self) -> torch.device:
        return self.target.device

    def reserve(self, rows: int, tokens: int) -> None:
        """On the CPU the caches grow with use; elsewhere the caller reserves the largest once."""
        cache = self.target.cache
        if rows <= cache.rows and tokens <= cache.slots:
            return
        whole = self.context_limit + MAX_TREE
        cache.reserve(rows, min(whole, max(tokens, cache.slots, min(2 * cache.slots, whole))))
        if self.drafter is not None:
            self.drafter.allocate(cache.rows, cache.slots)

    def prefill(self, row: int, token_ids: Sequence[int]) -> Tensor:
        ids = self.array(token_ids)
        last = torch.zeros(self.target.feature_size, dtype=self.target.dtype, device=self.device)
        for start in range(0, len(token_ids), PREFILL_CHUNK):
            chunk = ids[start : start + PREFILL_CHUNK]
            features_TF = self.target.prefill(row, chunk, start)
            # The pair of the chunk's last token needs the token after it: it opens the next reading.
            if self.drafter is not None:
                features = torch.cat([last[None], features_TF[:-1]]) if start else features_TF[:-1]
                tokens = ids[max(start, 1) : start + len(chunk)]
                if len(tokens):
                    first = self.array([max(start - 1, 0)])
                    reading = Reading(features[None], tokens[None], first, self.array([len(tokens)]))
                    self.drafter.read(reading, row)
            last = features_TF[-1]
        return last

    def move_row(self, source: int, to: int) -> None:
        self.target.cache.move_row(source, to)
        if self.drafter is not None:
            self.drafter.move_row(source, to)

    def array(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def host(self, array: Tensor) -> Any:
        return array.tolist()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def sampling(self, requests: Sequence[Any]) -> Sampling:
        """Arrays of the requests' SamplingParams (``engine.SamplingHistory``)."""
        params = [r.params for r in requests]
        vocab = self.target.vocab_size

        def column(values: list[float], off: float) -> Tensor | None:
            if all(v == off for v in values):
                return None
            return torch.tensor(values, dtype=torch.float32, device=self.device)

        inverse = column([1 / p.temperature if p.temperature > 0 else 0.0 for p in params], 0.0)
        top_k = [min(p.top_k or vocab, vocab) for p in params]
        log_min_p = column([float(torch.tensor(p.min_p).log()) for p in params], float("-inf"))
        # A greedy row's temperature is 1 in the cuts below, which never remove its largest score.
        return Sampling(
            inverse_temperature=inverse,
            key=None if inverse is None else self.array([key_of(p.seed) for p in params]),
            top_k=None if all(k == vocab for k in top_k) else self.array(top_k),
            top_p=column([p.top_p for p in params], 1.0),
            log_min_p=log_min_p,
            bias=self._bias(params),
            penalties=self._penalties(requests),
        )

    def _bias(self, params: Sequence[Any]) -> Tensor | None:
        if not any(p.logit_bias for p in params):
            return None
        bias = torch.zeros(len(params), self.target.vocab_size, device=self.device)
        for row, p in enumerate(params):
            for token, value in p.logit_bias.items():
                bias[row, token] = value
        return bias

    def _penalties(self, requests: Sequence[Any]) -> Penalties | None:
        def settings(name: str) -> Tensor:
            return torch.tensor([getattr(r.params, name) for r in requests], dtype=torch.float32, device=self.device)

        def counts(name: str) -> Tensor:
            rows = [torch.bincount(self.array(getattr(r, name)), minlength=self.target.vocab_size) for r in requests]
            return torch.stack(rows).float()

        repetition, presence, frequency = map(settings, ("repetition_penalty", "presence_penalty", "frequency_penalty"))
        if bool((repetition == 1).all() & (presence == 0).all() & (frequency == 0).all()):
            return None
        return Penalties(repetition, presence, frequency, counts("prompt_ids"), counts("answer_ids"))


def bind(target: TorchTarget, drafter: Drafter, vocabulary: int = 0) -> TorchDrafter:
    """A drafter at work on this target: cast, packed, with the target's own embedding and, if tied, its head."""
    config = drafter.config
    drafter = drafter.to(target.device, target.dtype).eval().requires_grad_(False)
    if config.head == "own":
        weight = drafter.head.weight
    else:
        weight = target.head_weight
        if config.draft_vocabulary:
            weight = weight[drafter.token_ids]
    if vocabulary and config.draft_vocabulary:
        weight = weight[:vocabulary]
    linear.pack_linears(drafter)
    return TorchDrafter(drafter, target.embed, linear.make_linear(weight), vocabulary)
