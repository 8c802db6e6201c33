"""What speculation holds beside plain decoding, counted tensor by tensor against sums by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from redrafter.backends.torch.drafter import Drafter
from redrafter.backends.torch.load import TorchBackend, make_target
from redrafter.bench import memory
from redrafter.bench.measure import Plan
from redrafter.bench.memory import drafter_bytes, kept_bytes, spare_cache_bytes, storages
from redrafter.bench.prompts import BenchPrompt
from redrafter.engine import Engine
from redrafter.llm import LLM
from redrafter.params import DecodeConfig, SamplingParams
from redrafter.text import Tokenizer
from tests import fakes
from tests.tiny import VOCAB, WIDTH, drafter_config, make_model

SHAPE = DecodeConfig(beam_width=2, branching=2, draft_length=3, tree_size=6)
CPU = torch.device("cpu")


@pytest.fixture
def plain_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr("redrafter.backends.torch.linear.can_pack", lambda *_: False)


def make(table: bool = False, **config: Any) -> TorchBackend:
    torch.manual_seed(0)
    drafter = Drafter(drafter_config(**config))
    backend = TorchBackend(make_target(make_model(), drafter.config.feature_layers), drafter, 50, {2}, table=table)
    backend.reserve(3, 60)
    return backend


TEXTS = 8 * 3 * (60 + 65)


def of_modules(drafter: Drafter) -> int:
    return sum(x.numel() * x.element_size() for x in (*drafter.parameters(), *drafter.buffers()))


def test_the_drafters_own_memory_is_its_weights_its_table_its_head_and_its_caches(plain_linears: None) -> None:
    backend = make(table=True, cell="gru", draft_vocabulary=40)
    assert backend.drafter is not None
    config = backend.drafter.drafter.config
    caches = 2 * 4 * config.trunk_layers * 3 * (60 + 64) * config.trunk_kv_heads * (config.width // config.trunk_heads)
    table, head = 4 * VOCAB * 3 * config.state_size, 4 * 40 * WIDTH
    assert drafter_bytes(backend) == of_modules(backend.drafter.drafter) + table + head + caches + TEXTS


def test_a_head_that_is_the_targets_counts_nothing_more(plain_linears: None) -> None:
    backend = make(trunk_layers=0, exit_dim=WIDTH)
    assert backend.drafter is not None
    target = storages(backend.target, CPU)
    assert backend.target.head_weight.untyped_storage().data_ptr() in target
    assert drafter_bytes(backend) == of_modules(backend.drafter.drafter) + TEXTS


def test_views_of_one_tensor_count_once_and_other_devices_not() -> None:
    whole = torch.zeros(100)
    held = {"a": [whole[:10], whole[50:]], "b": (whole.view(10, 10), torch.zeros(5, dtype=torch.int64))}
    assert sorted(storages(held, CPU).values()) == [40, 400]
    assert storages(held, torch.device("cuda")) == {}
    assert storages([torch.nn.Linear(3, 2, device="meta"), len, whole.sum], CPU) == {}


def test_spare_slots_are_those_beyond_the_context() -> None:
    backend = make()
    cache = backend.target.cache
    everything = cache.keys.nbytes + cache.values.nbytes
    assert spare_cache_bytes(backend) == everything * (60 - 50 - 2) // 60
    backend.context_limit = 59
    assert spare_cache_bytes(backend) == 0


def test_what_is_only_for_speculation_is_taken_off_plain_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's counter is played: 5000 bytes in plain steps, 7000 in speculative ones, over all that is there."""
    target = make_target(make_model(vocab_size=280), (0, 2))
    backend = TorchBackend(target, Drafter(drafter_config(vocab_size=280)), 60, [])
    backend.reserve(2, 90)
    backend.recorded = torch.zeros(25)  # type: ignore[attr-defined]
    assert kept_bytes(backend) == 100
    sizes: list[int] = []
    step = backend.step

    def watched(state: Any, config: DecodeConfig) -> Any:
        sizes.append(config.tree_size)
        return step(state, config)

    def peak_of(device: torch.device, run: Callable[[], Any]) -> int:
        sizes.clear()
        run()
        assert len(set(sizes)) == 1
        return 10**6 + {1: 5000, SHAPE.tree_size: 7000}[sizes[0]]

    monkeypatch.setattr(backend, "step", watched)
    monkeypatch.setattr(memory, "peak_of", peak_of)
    llm = LLM(Engine(backend, SHAPE, 2), Tokenizer(fakes.byte_level(), "tiny"))
    batch = [BenchPrompt("a", "x", "who?"), BenchPrompt("b", "x", "why?")]
    found = memory.memory(llm, SHAPE, batch, Plan(params=SamplingParams(max_new_tokens=5, ignore_eos=True)))
    only = found["drafter_resident_bytes"] + found["spare_cache_bytes"]
    assert found["drafter_resident_bytes"] > 0 and found["spare_cache_bytes"] > 0
    assert found["speculative_peak_memory_bytes"] == 10**6 + 7000 - 100
    assert found["plain_peak_memory_bytes"] == 10**6 + 5000 - 100 - only
    assert found["memory_overhead_bytes"] == 2000 + only
    assert found["memory_overhead"] == found["speculative_peak_memory_bytes"] / found["plain_peak_memory_bytes"]
