"""Tiny random models and drafters for the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from redrafter.algorithm.beam import Reading
from redrafter.backends.torch.attention import EXACT
from redrafter.backends.torch.drafter import Drafter, DrafterConfig
from redrafter.backends.torch.load import TorchBackend, make_target
from redrafter.backends.torch.target import TorchTarget
from redrafter.engine import Engine, Event, RequestStatistics
from redrafter.params import SamplingParams

VOCAB, WIDTH, LAYERS = 96, 32, 3
TINY_SHAPES = ((64, WIDTH), (WIDTH, WIDTH), (96, WIDTH), (WIDTH, 48), (VOCAB, WIDTH))
"""The products of the tiny Llama, [out, in]: q|k|v, out, gate|up, down, head."""
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "gemma2": {"head_dim": 8, "sliding_window": 256, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 256, "query_pre_attn_scalar": 8},
    "phi3": {},
    "olmo2": {},
    "granite": {"logits_scaling": 2.0},
    "cohere": {},
    "glm4": {"head_dim": 8},
    "smollm3": {},
    "starcoder2": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2},
}


def make_model(family: str = "llama", attention: str = EXACT, seed: int = 0, **overrides: Any) -> Any:
    """A random transformers model whose weights are large enough that its choices vary."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**BASE, **FAMILIES[family], **overrides})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def drafter_config(**overrides: Any) -> DrafterConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_target_layers": LAYERS,
        "feature_layers": (0, 2),
        "head": "tied",
        "trunk_layers": 1,
        "trunk_heads": 2,
        "exit_dim": WIDTH,
    }
    return DrafterConfig(**{**values, **overrides})


def make_backend(
    family: str = "llama",
    *,
    drafter: bool = True,
    context: int = 200,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> TorchBackend:
    torch.manual_seed(7)
    config = drafter_config(**overrides)
    target = make_target(make_model(family).to(dtype), config.feature_layers)
    return TorchBackend(target, Drafter(config) if drafter else None, context, eos_ids=[])


def run(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> tuple[list[int], RequestStatistics]:
    """One request to its end: answer ids and statistics."""
    return run_all(engine, [prompt], [params])[0]


def run_all(
    engine: Engine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[tuple[list[int], RequestStatistics]]:
    """All requests together."""
    for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
        engine.add(str(i), prompt, p)
    ids: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    last: dict[str, Event] = {}
    while engine.has_work:
        for event in engine.step():
            assert event.error is None, event.error
            ids[event.request_id].extend(event.tokens)
            last[event.request_id] = event
    return [(ids[str(i)], last[str(i)].statistics) for i in range(len(prompts))]


class ScriptState(NamedTuple):
    script: Tensor
    """[B, 1, S] the answer that each row is going to give, by absolute position"""
    position: Tensor
    """[B, 1] absolute position of the next token to draft"""
    width: int


class ScriptedDrafter:
    """A drafter that knows the answer: ranks it first (an ideal drafter), or last (an adversarial one), or is wrong
    at every ``wrong_every``-th position. Its other scores are arbitrary. One row of text only."""

    token_ids = None

    def __init__(self, text: Sequence[int], *, adversarial: bool = False, wrong_every: int = 0) -> None:
        self.text = torch.tensor([*text, *([0] * 64)])
        self.sign = -1.0 if adversarial else 1.0
        self.wrong_every = wrong_every

    def allocate(self, rows: int, capacity: int) -> None:
        """It keeps nothing."""

    def copy_prefix(self, source: int, to: int, tokens: int) -> None:
        """It keeps nothing."""

    def swap_rows(self, a: int, b: int, tokens: int) -> None:
        """It keeps nothing."""

    def read(self, reading: Reading, row: int = 0) -> None:
        """It keeps nothing."""

    def recall(self, reading: Reading, length: int) -> None:
        """It keeps nothing."""

    def begin(self, reading: Reading) -> ScriptState:
        return ScriptState(self.text[None, None], (reading.first + reading.count + 1)[:, None], 1)

    def extend(self, state: ScriptState, beam_BW: Tensor, token_BW: Tensor) -> ScriptState:
        return ScriptState(state.script, state.position + 1, beam_BW.shape[1])

    def logits(self, state: ScriptState) -> Tensor:
        position = int(state.position[0, 0])
        token = int(self.text[min(position, len(self.text) - 1)])
        if self.wrong_every and position % self.wrong_every == 0:
            token = (token + 1) % VOCAB
        noise = torch.randn(VOCAB, generator=torch.Generator().manual_seed(position))
        noise[token] += 12.0 * self.sign
        return noise.expand(1, state.width, VOCAB).clone()


def set_drafter(backend: TorchBackend, drafter: Any) -> TorchBackend:
    backend.drafter = drafter
    return backend


def target_of(backend: TorchBackend) -> TorchTarget:
    return backend.target
