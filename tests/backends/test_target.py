"""The adapter on every family, against transformers' own eager model; bits of tree nodes against plain decoding."""

from __future__ import annotations

import pytest
import torch

from redrafter.algorithm.accept import Accepted
from redrafter.algorithm.tree import TokenTree
from redrafter.backends.torch import kv_cache
from redrafter.backends.torch.attention import FAST
from redrafter.backends.torch.linear import row_invariant
from redrafter.backends.torch.load import TorchBackend, make_target
from redrafter.engine import Engine
from redrafter.errors import OutOfMemory, UnsupportedModel
from redrafter.params import PLAIN, DecodeConfig, SamplingParams
from tests.tiny import FAMILIES, TINY_SHAPES, VOCAB, drafter_config, make_backend, make_model, run

PROMPT = [5, 17, 33, 8, 90, 41, 41, 12, 60, 3, 77, 24, 9]
FAR = SamplingParams(max_new_tokens=40)


def chain(tokens: list[int]) -> TokenTree:
    n = len(tokens)
    depth = torch.arange(n)[None]
    mask = torch.tril(torch.ones(n, n, dtype=torch.bool))[None]
    return TokenTree(torch.tensor([tokens]), (depth - 1).clamp(min=0), depth, mask, torch.ones(1, n, dtype=torch.bool))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exact_and_computes_what_transformers_computes(family: str) -> None:
    backend = make_backend(family)
    config = DecodeConfig(tree_size=24, beam_width=4)
    for params in (FAR, SamplingParams(max_new_tokens=40, temperature=3.0, seed=1)):
        speculative, _ = run(Engine(backend, config), PROMPT, params)
        plain, _ = run(Engine(backend, PLAIN), PROMPT, params)
        assert speculative == plain
    assert len(set(plain)) > 5  # a model that repeats itself would prove little
    with torch.no_grad():
        expected = make_model(family, "eager")(torch.tensor([PROMPT + plain])).logits[0, len(PROMPT) :]
    backend.prefill(0, PROMPT)
    logits, _ = backend.target.verify(chain(plain), torch.tensor([len(PROMPT)]))
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_fast_attention_gives_the_same_ids_in_float32(family: str) -> None:
    config = drafter_config()
    target = make_target(make_model(family, FAST), config.feature_layers)
    fast, _ = run(Engine(TorchBackend(target, None, 200, []), PLAIN), PROMPT, FAR)
    assert fast == run(Engine(make_backend(family), PLAIN), PROMPT, FAR)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.0)])
def test_a_nodes_logits_equal_plain_decoding(dtype: torch.dtype, tolerance: float) -> None:
    """A chain of 1..40 nodes, and a chain hidden among unrelated siblings in scattered slots, against one row: in
    bfloat16 bit for bit."""
    if tolerance == 0 and not row_invariant(dtype, TINY_SHAPES):
        pytest.skip("rows of packed products depend on their number on this CPU")
    backend = make_backend(drafter=False, dtype=dtype, feature_layers=())
    text = torch.randint(3, VOCAB, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    length = torch.tensor([len(PROMPT)])
    backend.reserve(1, 150)
    backend.prefill(0, PROMPT)
    plain = []
    for i, token in enumerate(text):
        logits, _ = backend.target.verify(chain([token]), length + i)
        plain.append(logits[0, 0])
    for count in (2, 3, 7, 16, 40):
        logits, _ = backend.target.verify(chain(text[:count]), length)
        torch.testing.assert_close(logits[0], torch.stack(plain[:count]), rtol=0, atol=tolerance)
    mixed = interleaved(text[:20])
    logits, _ = backend.target.verify(mixed, length)
    torch.testing.assert_close(logits[0, ::2], torch.stack(plain[:20]), rtol=0, atol=tolerance)


def interleaved(tokens: list[int]) -> TokenTree:
    """The chain at even slots; every odd slot is a wrong sibling of the node before it."""
    n = 2 * len(tokens)
    ids = [t if i % 2 == 0 else (t + 1) % VOCAB for i, t in enumerate(t for t in tokens for _ in range(2))]
    parent = [max(i - 2, 0) if i % 2 == 0 else max(i - 3, 0) for i in range(n)]
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        mask[i, i] = True
        if i:
            mask[i] |= mask[parent[i]]
    depth = torch.tensor([i // 2 if i % 2 == 0 else max(i // 2, 1) for i in range(n)])
    live = torch.ones(1, n, dtype=torch.bool)
    return TokenTree(torch.tensor([ids]), torch.tensor([parent]), depth[None], mask[None], live)


def test_committed_slots_equal_a_fresh_prefill() -> None:
    """Move a path that lies in scattered slots; the cache must hold what reading the text at once gives."""
    backend = make_backend(drafter=False, feature_layers=())
    backend.reserve(1, 120)
    backend.prefill(0, PROMPT)
    length = torch.tensor([len(PROMPT)])
    text = [4, 9, 33, 71]
    backend.target.verify(interleaved(text), length)
    path = torch.tensor([[0, 2, 4, 6]])
    accepted = Accepted(
        path, torch.tensor([3]), torch.tensor([8]), torch.tensor([[9, 33, 71, 8]]), torch.tensor([True])
    )
    backend.target.commit(length, accepted)
    used = len(PROMPT) + 4
    kept = backend.target.cache.keys[:, 0, :, :used].clone(), backend.target.cache.values[:, 0, :, :used].clone()
    backend.prefill(0, PROMPT + text)
    torch.testing.assert_close(backend.target.cache.keys[:, 0, :, :used], kept[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(backend.target.cache.values[:, 0, :, :used], kept[1], rtol=0, atol=1e-5)


def test_free_slots_are_never_read() -> None:
    backend = make_backend()
    config = DecodeConfig(tree_size=16)
    clean, _ = run(Engine(backend, config), PROMPT, FAR)
    backend.target.cache.keys.fill_(float("nan"))
    backend.target.cache.values.fill_(float("nan"))
    backend.held.clear()  # what the first request left is gone
    assert run(Engine(backend, config), PROMPT, FAR)[0] == clean


def test_prefill_in_chunks_equals_one_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make_backend()
    whole, _ = run(Engine(backend, DecodeConfig(tree_size=16)), PROMPT, FAR)
    monkeypatch.setattr("redrafter.backends.base.PREFILL_CHUNK", 5)
    assert run(Engine(backend, DecodeConfig(tree_size=16)), PROMPT, FAR)[0] == whole


def test_more_rows_do_not_make_rows_longer() -> None:
    backend = make_backend()
    for rows in range(1, 6):
        backend.reserve(rows, 40)
    assert (backend.target.cache.rows, backend.target.cache.slots) == (5, 40)
    backend.reserve(2, 41)
    assert (backend.target.cache.rows, backend.target.cache.slots) == (5, 80)


def test_a_cache_that_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make_backend()
    monkeypatch.setattr(kv_cache, "free_bytes", lambda device: 1000)
    with pytest.raises(OutOfMemory, match="lower max_context or max_batch"):
        backend.reserve(4, 150)
    engine = Engine(backend, PLAIN)
    engine.add("a", PROMPT, FAR)
    (event,) = engine.step()
    assert event.finish_reason == "error" and isinstance(event.error, OutOfMemory)
    monkeypatch.undo()
    assert len(run(engine, PROMPT, FAR)[0]) == 40  # the engine still serves


def test_what_cannot_be_run_exactly_is_refused() -> None:
    model = make_model("llama")
    model.config.num_key_value_heads = 4
    backend = TorchBackend(make_target(model), None, 100, [])
    backend.reserve(1, 50)
    with pytest.raises(UnsupportedModel, match="needs 4 heads"):
        backend.prefill(0, PROMPT)
    with pytest.raises(UnsupportedModel, match="layers 0 to 2"):
        make_target(make_model("llama"), (7,))
