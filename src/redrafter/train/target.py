"""The frozen target as the trainer sees it: hidden states and head of any dense decoder-only model of transformers.

Legend: B rows, T tokens, H heads, S cache slots, d head width, D hidden size, V vocabulary, F features.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from redrafter.backends.torch.load import pick_device, pick_dtype
from redrafter.errors import CorruptModel, InvalidRequest, UnsupportedModel
from redrafter.models import ModelFiles, check_supported, resolve

ATTENTION = "redrafter_batch"


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, H, T, d] over [B, H_kv, S, d] -> [B, T, H, d].

    A mask of one element means plain causal attention (all of it for a single token): the fused kernels want no mask.
    """
    if kwargs.get("s_aux") is not None:
        raise UnsupportedModel("attention with sinks: training has no kernel for it; use another model")
    rows, heads, length, width = query.shape
    groups = heads // key.shape[1]
    mask = None if attention_mask is None or attention_mask.numel() == 1 else attention_mask
    if kwargs.get("softcap"):
        return _softcapped(query, key, value, mask, scaling, float(kwargs["softcap"])), None
    if length == 1:
        # The heads that share keys become queries of one head, so the cache is read once, not once per head.
        folded = query.reshape(rows, key.shape[1], groups, width)
        if mask is not None:
            mask = mask.expand(rows, 1, groups, key.shape[2])
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
        return out.reshape(rows, 1, heads, width), None
    if mask is not None and groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=mask is None and groups > 1,
    )
    return out.transpose(1, 2).contiguous(), None


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float
) -> Tensor:
    """Attention whose scores are squashed (Gemma 2): no fused kernel does that, so the scores are held in float32."""
    groups, length, slots = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = cap(scores, softcap)
    if mask is None:
        seen = torch.ones(length, slots, dtype=torch.bool, device=query.device).tril(slots - length)
        scores = scores.masked_fill(~seen, float("-inf"))
    else:
        scores = scores + mask
    out = torch.softmax(scores, dim=-1).to(query.dtype) @ value
    return out.transpose(1, 2).contiguous()


class BatchCache:
    """Keys and values of one batch whose rows all have the same number of slots filled.

    One allocation per layer serves batches of any shape with rows x capacity <= ``tokens``.
    """

    def __init__(self, config: PretrainedConfig, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.tokens = tokens
        self._slot = (heads, width)
        size = tokens * heads * width
        layers = range(config.num_hidden_layers)
        self._flat = [[torch.empty(size, dtype=dtype, device=device) for _ in layers] for _ in range(2)]
        self._view: list[list[Tensor]] = [[], []]
        self.first_row, self.rows, self.start = 0, 0, 0

    def shape(self, rows: int, capacity: int) -> None:
        """Lay the storage out for ``rows`` texts of up to ``capacity`` tokens; the contents become meaningless."""
        heads, width = self._slot
        size = rows * heads * capacity * width
        self._view = [[x[:size].view(rows, heads, capacity, width) for x in side] for side in self._flat]
        self.first_row, self.rows, self.start = 0, rows, 0

    def window(self, first_row: int, rows: int, start: int) -> None:
        """The next forward pass holds rows ``first_row``.. and writes slots ``start``.."""
        self.first_row, self.rows, self.start = first_row, rows, start

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self.start + key.shape[2]
        out = []
        for side, new in zip(self._view, (key, value), strict=True):
            cache = side[layer_idx][self.first_row : self.first_row + self.rows]
            cache[:, :, self.start : end] = new
            out.append(cache[:, :, :end])
        return out[0], out[1]

    def keep(self, index: Tensor, filled: int) -> None:
        """Rows ``index`` (ascending) move to the front."""
        for side in self._view:
            for cache in side:
                cache[: len(index), :, :filled] = cache[index, :, :filled]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.start


class TrainingTarget:
    """Hidden states of whole texts, or of one more token per row through a ``BatchCache``."""

    def __init__(self, model: Any, feature_layers: tuple[int, ...] = ()) -> None:
        self.model = model.eval().requires_grad_(False)
        self.decoder = getattr(model, model.base_model_prefix)
        self.config: PretrainedConfig = model.config
        self.embedding: Tensor = model.get_input_embeddings().weight
        output = model.get_output_embeddings()
        if getattr(output, "bias", None) is not None or not hasattr(self.decoder, "layers"):
            raise UnsupportedModel(
                f"{self.config.model_type}: training needs a list of layers and a head without bias; use another model"
            )
        self.head: Tensor = output.weight
        # What transformers does to the head's product: Cohere multiplies, Granite divides, Gemma squashes.
        self.scale = float(getattr(self.config, "logit_scale", None) or 1.0)
        self.scale /= float(getattr(self.config, "logits_scaling", None) or 1.0)
        self.softcap = float(getattr(self.config, "final_logit_softcapping", None) or 0.0)
        self.feature_layers = feature_layers
        self._kept: dict[int, Tensor] = {}
        for layer in feature_layers:
            self.decoder.layers[layer].register_forward_hook(self._keep(layer))
        names = inspect.signature(type(self.decoder).forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str,
        dtype: torch.dtype,
        feature_layers: tuple[int, ...] = (),
        shard: bool = False,
    ) -> TrainingTarget:
        """From a folder that ``redrafter.models`` has checked. Raises CorruptModel if it cannot be loaded.

        ``shard``: every process of the group holds its share of the layers; all of them must then call it together.
        """
        AttentionInterface.register(ATTENTION, attend)
        logging.disable_progress_bar()
        # cuDNN's attention builds a plan per shape, and the cache grows by a slot per token.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Heads are applied in float32 to bf16 numbers, which TF32 holds exactly; the sums are in float32 either way.
        torch.backends.cuda.matmul.allow_tf32 = dtype == torch.bfloat16
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=ATTENTION,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            line = str(error).strip().splitlines()[0]
            raise CorruptModel(f"{folder}: transformers cannot load it ({line}); fetch the model again") from error
        target = cls(model, feature_layers)
        target._shard(device) if shard else model.to(device)
        return target

    def layer_bytes(self) -> tuple[int, int]:
        """Bytes of the layers' weights: those that this process holds between two passes, and all."""
        weights = list(self.decoder.layers.parameters())
        held = [w.to_local() if isinstance(w, DTensor) else w for w in weights]
        return sum(w.nbytes for w in held), sum(w.numel() * w.element_size() for w in weights)

    def _shard(self, device: str) -> None:
        """FSDP2 over the layers, one after the other, so that no device ever holds more than one of them whole. The
        embedding and the head stay whole everywhere: the drafter reads them at every depth."""
        mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
        for layer in self.decoder.layers:
            fully_shard(layer, mesh=mesh)
        whole = set(self.model.parameters()) - set(self.decoder.layers.parameters())
        fully_shard(self.decoder, mesh=mesh, ignored_params=whole)
        for tensor in (*whole, *self.model.buffers()):
            tensor.data = tensor.data.to(device)

    def float_head(self) -> Tensor:
        """[V, D] in float32, the model's scale of the logits included; ``softcap`` is not."""
        return self.head.float() * self.scale

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def feature_size(self) -> int:
        """Numbers per token that ``features`` gives."""
        return self.embedding.shape[1] * (1 + len(self.feature_layers))

    def _keep(self, layer: int) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            self._kept[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def hidden(
        self, tokens_BT: Tensor, position_BT: Tensor, mask: Tensor | None = None, cache: BatchCache | None = None
    ) -> Tensor:
        """[B, T, D] after the final norm. ``mask`` [B, 1, T, S] bool; None is causal."""
        # A four-dimensional mask passes through transformers unchanged; one element of it says "none" (``attend``).
        mask = self.embedding.new_zeros(1, 1, 1, 1) if mask is None else _additive(mask, self.embedding.dtype)
        extra = {} if cache is None else {self._cache_name: cache}
        return self.decoder(
            input_ids=tokens_BT, attention_mask=mask, position_ids=position_BT, use_cache=cache is not None, **extra
        ).last_hidden_state

    @torch.no_grad()
    def features(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, F] of whole texts: the last hidden state, then every feature layer's output in order."""
        position = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        last = self.hidden(tokens_BT, position)
        parts = [last, *(self._kept[layer] for layer in self.feature_layers)]
        self._kept.clear()
        return torch.cat(parts, dim=-1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attended, -inf elsewhere, rows a multiple of 16 apart: so the kernels use it as it is, in every layer."""
    slots = mask.shape[-1]
    storage = torch.zeros(*mask.shape[:-1], -(-slots // 16) * 16, dtype=dtype, device=mask.device)
    return storage[..., :slots].masked_fill_(~mask, float("-inf"))


def cap(logits: Tensor, softcap: float) -> Tensor:
    """The model's own squashing of logits into (-softcap, softcap); 0 is none."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


class OpenModel:
    """A model's files, its context limit, and where and how it is going to run; weights load on ``target``."""

    def __init__(self, name: str, device: str = "auto", dtype: str = "auto") -> None:
        self.files: ModelFiles = resolve(name)
        self.context_limit = check_supported(self.files.config, None)
        self.device = pick_device(device)
        # Packed bfloat16 of the engine does not help batches of texts: the CPU trains in float32 unless asked.
        wanted = "float32" if dtype == "auto" and self.device.type == "cpu" else dtype
        self.dtype = pick_dtype(wanted, self.device)
        if self.dtype == torch.float16:
            raise InvalidRequest("dtype float16 overflows in training: use bfloat16 or float32")

    @property
    def layers(self) -> int:
        return int(self.files.config["num_hidden_layers"])

    def target(self, feature_layers: tuple[int, ...] = (), shard: bool = False) -> TrainingTarget:
        return TrainingTarget.load(self.files.path, str(self.device), self.dtype, feature_layers, shard)
