"""Acceptance in answers and on /metrics: the identities that load testers check, and the names that they read."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from redrafter.engine import RequestStatistics
from redrafter.params import DecodeConfig
from redrafter.server.payloads import histogram, speculative_decoding
from tests.server.client import chat, events
from tests.server.serving import SHAPE, Running, running, tiny_llm


@pytest.fixture(scope="module")
def run() -> Iterator[Running]:
    with running(request_metrics="detailed") as run:
        yield run


def samples(run: Running) -> dict[str, float]:
    """Every sample without its common labels."""
    response = httpx2.get(run.url + "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "tiny" and sample.labels["engine"] == "0"
            rest = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found[sample.name + "".join(f"{{{k}={v}}}" for k, v in rest.items())] = sample.value
    return found


def check(spec: dict) -> None:
    counts = spec["acceptance_histogram"]
    accepted = sum(depth * count for depth, count in enumerate(counts))
    assert all(type(count) is int and count >= 0 for count in counts)
    assert len(counts) == spec["num_spec_tokens"] + 1
    assert sum(counts) == spec["num_spec_steps"]
    assert accepted == spec["num_accepted_draft_tokens"] <= spec["num_draft_tokens"]
    assert spec["mean_acceptance_length"] == pytest.approx(1 + accepted / max(sum(counts), 1))
    assert spec["draft_acceptance_rate"] == pytest.approx(accepted / max(spec["num_draft_tokens"], 1))


@pytest.mark.parametrize("seed", range(4))
def test_the_identities_hold_in_both_forms(run: Running, seed: int) -> None:
    whole = chat(run.url, seed=seed, max_tokens=30).json()["metrics"]
    last = events(chat(run.url, seed=seed, max_tokens=30, stream=True, stream_options={"include_usage": True}))[-1]
    assert last["choices"] == []
    for metrics in (whole, last["metrics"]):
        spec = metrics["speculative_decoding"]
        check(spec)
        assert spec["num_spec_tokens"] == SHAPE.deepest and spec["num_spec_steps"] > 0
        assert sum(spec["per_step_accepted"]) == spec["num_accepted_draft_tokens"]
        assert len(spec["per_step_accepted"]) == spec["num_spec_steps"]
        assert spec["per_step_drafted"] == [SHAPE.deepest] * spec["num_spec_steps"]
        assert (
            metrics["time_to_first_token_ms"] > 0 and metrics["generation_time_ms"] > metrics["time_to_first_token_ms"]
        )
        assert metrics["tokens_per_second"] == pytest.approx(30e3 / metrics["generation_time_ms"])
    assert whole["speculative_decoding"] == last["metrics"]["speculative_decoding"]


def test_steps_of_different_drafts_keep_the_identities() -> None:
    stats = RequestStatistics()
    for length, accepted in ((2, 2), (5, 0), (5, 4), (1, 1)):
        stats.count_step(DecodeConfig(draft_length=length, prompt_lookup=0), accepted, 8, 16)
    assert histogram(stats) == [1, 1, 1, 0, 1, 0]
    spec = speculative_decoding(stats)
    check(spec)
    assert (spec["num_draft_tokens"], spec["num_accepted_draft_tokens"]) == (13, 7)


def test_metrics_can_be_turned_off_or_kept_short() -> None:
    with running(request_metrics="none") as run:
        assert "metrics" not in chat(run.url).json()
    with running(request_metrics="summary") as run:
        assert "per_step_accepted" not in chat(run.url).json()["metrics"]["speculative_decoding"]


def test_counters_add_up_what_the_answers_told() -> None:
    with running() as run:
        before = samples(run)
        told = [chat(run.url, seed=seed, max_tokens=20).json() for seed in range(3)]
        chat(run.url, max_tokens=20, stream=True)
        chat(run.url, n=2, stop=["never said"])
        after = samples(run)
        specs = [body["metrics"]["speculative_decoding"] for body in told]
        for prefix in ("redrafter:", "vllm:"):
            grown = {k.removeprefix(prefix): after[k] - before.get(k, 0) for k in after if k.startswith(prefix)}
            assert grown["spec_decode_num_drafts_total"] >= sum(s["num_spec_steps"] for s in specs)
            accepted = grown["spec_decode_num_accepted_tokens_total"]
            name = "spec_decode_num_accepted_tokens_per_pos_total{{position={}}}"
            positions = [grown[name.format(p)] for p in range(SHAPE.deepest)]
            assert sum(positions) == accepted and positions == sorted(positions, reverse=True)
            assert grown["spec_decode_num_draft_tokens_total"] == SHAPE.deepest * grown["spec_decode_num_drafts_total"]
            assert grown["generation_tokens_total"] == 3 * 20 + 20 + 2 * 8
            assert grown["prompt_tokens_total"] == 5 * told[0]["usage"]["prompt_tokens"]
            assert grown["request_success_total{finished_reason=length}"] == 6
            for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time"):
                assert grown[f"{name}_seconds_count"] == 6
            assert (after[prefix + "num_requests_running"], after[prefix + "num_requests_waiting"]) == (0, 0)
            assert 0 <= after[prefix + "kv_cache_usage_perc"] <= 1
        steps = after["vllm:spec_decode_num_drafts_total"]
        assert after["sglang:spec_verify_calls_total"] == steps
        assert after["sglang:spec_accept_length"] == pytest.approx(
            1 + after["vllm:spec_decode_num_accepted_tokens_total"] / steps
        )


def test_lines_are_as_vllms_own_benchmark_reads_them(run: Running) -> None:
    chat(run.url)
    lines = [x for x in httpx2.get(run.url + "/metrics").text.splitlines() if x.startswith("vllm:spec_decode")]
    names = {line.partition("{")[0] for line in lines}
    assert names == {
        "vllm:spec_decode_num_drafts_total",
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_per_pos_total",
    }
    assert any('position="0"' in line for line in lines)


def test_other_names_only_if_wanted() -> None:
    with running(vllm_names=False) as run:
        chat(run.url)
        assert {name.partition(":")[0] for name in samples(run)} == {"redrafter"}


def test_without_a_drafter_nothing_is_drafted() -> None:
    with running(tiny_llm(drafter=False)) as run:
        spec = chat(run.url).json()["metrics"]["speculative_decoding"]
        check(spec)
        assert (spec["num_spec_steps"], spec["mean_acceptance_length"]) == (0, 1.0)
        assert httpx2.get(run.url + "/v1/redrafter/info").json()["drafter"] is None
