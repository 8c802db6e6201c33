"""Any dense decoder-only causal LM of transformers as a target (DESIGN section 4): its own code, our cache and mask."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from redrafter.algorithm.accept import Accepted
from redrafter.algorithm.tree import TokenTree
from redrafter.backends.torch.attention import EXACT, KERNEL, chain_mask, mask_for
from redrafter.backends.torch.kv_cache import KVCache
from redrafter.errors import UnsupportedModel


class TorchTarget:
    """``prefill``, ``verify``, ``commit`` (algorithm/step.py) over a transformers model.

    The model is loaded with one of our attention functions (``attention.py``); siblings share a position, so
    position_ids are always explicit, and the 4-D mask says which slots a node sees. ``feature_layers``: layers whose
    output is kept beside the last hidden state after the final norm; features are [last ; layer ; layer ..].
    """

    def __init__(self, model: Any, feature_layers: Sequence[int] = ()) -> None:
        self.model = model.eval().requires_grad_(False)
        self.feature_layers = tuple(feature_layers)
        config: Any = model.config
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        base: Any = model.base_model
        layers = getattr(base, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise UnsupportedModel(
                f"{type(model).__name__} has no list of decoder layers under 'layers': it cannot be a target"
            )
        weight = model.get_input_embeddings().weight
        self.device, self.dtype = weight.device, weight.dtype
        self.head_weight: Tensor = model.get_output_embeddings().weight  # a tied draft head needs it unpacked
        self.exact = config._attn_implementation == EXACT
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
        self._groups = heads // kv_heads
        cache_dtype = torch.float64 if self.exact else self.dtype
        kind = KVCache
        self._max_kernel_nodes = 0
        if config._attn_implementation == KERNEL:
            from redrafter.backends.torch.kernels.attention import MAX_NODES  # needs triton
            from redrafter.backends.torch.kernels.commit import KernelCache

            kind, self._max_kernel_nodes = KernelCache, MAX_NODES
        self.cache = kind(len(layers), kv_heads, head_width, cache_dtype, self.device)
        self._base = base
        self._captured: dict[int, Tensor] = {}
        for index in self.feature_layers:
            if not 0 <= index < len(layers):
                raise UnsupportedModel(
                    f"feature layer {index} does not exist: the target has layers 0 to {len(layers) - 1}"
                )
            layers[index].register_forward_hook(self._keep(index))
        base.register_forward_hook(self._keep(-1))
        names = inspect.signature(type(base).forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"

    @property
    def reads_chains(self) -> bool:
        """Whether ``read_chain`` can be used."""
        return self._max_kernel_nodes > 0

    @property
    def feature_size(self) -> int:
        return self.hidden_size * (1 + len(self.feature_layers))

    def _keep(self, index: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self._captured[index] = output if isinstance(output, Tensor) else output[0]

        return hook

    def embed(self, token_ids: Tensor) -> Tensor:
        return nn.functional.embedding(token_ids, self.model.get_input_embeddings().weight)

    def _forward(self, run: nn.Module, ids_BN: Tensor, position_BN: Tensor, mask: Tensor) -> Any:
        """One forward of the model or of its body; afterwards the hooks have captured the features."""
        return run(
            input_ids=ids_BN,
            position_ids=position_BN,
            attention_mask=mask,
            use_cache=True,
            **{self._cache_name: self.cache},
        )

    def _features(self) -> Tensor:
        parts = [self._captured.pop(index) for index in (-1, *self.feature_layers)]
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    def prefill(self, row: int, token_ids: Tensor, start: int) -> Tensor:
        """Read ``token_ids`` [T] of one row at positions start.. into the cache: features [T, F]."""
        position_1T = torch.arange(start, start + len(token_ids), device=self.device)[None]
        limit = start + len(token_ids)
        self.cache.place(row, position_1T, limit)
        slots = torch.arange(limit, device=self.device)
        mask = mask_for(slots[None, None, :] <= position_1T[:, :, None], self._groups, self.exact)
        self._forward(self._base, token_ids[None], position_1T, mask)
        return self._features()[0]

    def read_chain(self, token_ids: Tensor, start_B: Tensor, row_B: Tensor, slot_B: Tensor) -> Tensor:
        """Parts of texts, [B, T] tokens from position ``start_B`` and slot ``slot_B`` of row ``row_B`` on, T at most
        ``MAX_NODES``: features [B, T, F]. Rows and places lie on the device: one graph serves all. Parts of one text
        see each other. Needs the kernels' attention and cache."""
        step_T = torch.arange(token_ids.shape[1], device=self.device)
        self.cache.place(0, self.cache.moved(row_B, slot_B[:, None] + step_T), self.cache.slots)
        self._forward(self._base, token_ids, start_B[:, None] + step_T, chain_mask(len(step_T), start_B, row_B))
        return self._features()

    def verify(self, tree: TokenTree, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        nodes = tree.tokens.shape[1]
        if nodes <= self._max_kernel_nodes:
            slot_BN, position_BN, mask = self._places(tree, lengths_B)
            self.cache.place(0, slot_BN, self.cache.slots)
        else:
            slot_BN = self.cache.first_slots(lengths_B, nodes)[:, None] + torch.arange(nodes, device=self.device)
            lengths_B = lengths_B.clamp(min=0)
            position_BN = lengths_B[:, None] + tree.depth
            limit = self._limit(slot_BN)
            self.cache.place(0, slot_BN, limit)
            mask = self._tree_mask(tree, lengths_B, limit)
        out = self._forward(self.model, tree.tokens, position_BN, mask)
        logits = out.logits if self._max_kernel_nodes else out.logits.float()  # kernels take any dtype
        return logits, self._features()

    def _places(self, tree: TokenTree, lengths_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for the kernels' attention, in one launch."""
        from redrafter.backends.torch.kernels.attention import ancestor_words  # needs triton
        from redrafter.backends.torch.kernels.state import place_nodes

        words = ancestor_words(tree.mask) if tree.ancestors is None else tree.ancestors
        return place_nodes(tree.depth, words, lengths_B, self.cache.slots)

    def _tree_mask(self, tree: TokenTree, lengths_B: Tensor, limit: int) -> Tensor:
        nodes = tree.tokens.shape[1]
        # Slot s holds a committed token, or node s - length of this tree, or nothing yet.
        node_BS = torch.arange(limit, device=self.device) - lengths_B[:, None]
        in_tree_BS = (node_BS >= 0) & (node_BS < nodes)
        index = node_BS.clamp(0, nodes - 1)[:, None, :].expand(-1, nodes, -1)
        visible_BNS = (node_BS < 0)[:, None, :] | (tree.mask.gather(2, index) & in_tree_BS[:, None, :])
        return mask_for(visible_BNS, self._groups, self.exact)

    def _limit(self, slot_BN: Tensor) -> int:
        """Slots that attention must look at: on the CPU those in use, elsewhere all, so that shapes are static."""
        return int(slot_BN.max()) + 1 if self.device.type == "cpu" else self.cache.slots

    def commit(self, lengths_B: Tensor, accepted: Accepted) -> None:
        self.cache.keep_path(lengths_B, accepted.path)
