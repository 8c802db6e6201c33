"""Prometheus metrics: ``redrafter:*``, and the same again under the names that load testers of vLLM and SGLang read."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from redrafter.engine import RequestStatistics
from redrafter.server.answers import Answers
from redrafter.server.payloads import histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISH_REASONS = ("stop", "length", "cancelled", "error")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_PREFIX = "redrafter:"


class Metrics:
    """Labels are the model's name and an engine number, never anything a client sent."""

    def __init__(self, model: str, vllm_names: bool = True) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": "0"}
        self.steps = self._counter("spec_decode_num_drafts", "Steps that verified a draft")
        self.drafted = self._counter("spec_decode_num_draft_tokens", "Drafted tokens: the draft length of each step")
        self.accepted = self._counter("spec_decode_num_accepted_tokens", "Drafted tokens that the target agreed to")
        self.accepted_at = self._counter(
            "spec_decode_num_accepted_tokens_per_pos", "Steps that accepted the draft up to this position", "position"
        )
        self.tree_nodes = self._counter("tree_nodes", "Nodes verified in drafted steps, roots included")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self.answer_tokens = self._counter("generation_tokens", "Tokens of answers")
        self.ended = self._counter("request_success", "Requests that ended, by reason", "finished_reason")
        self.rejected = self._counter("admission_rejections", "Requests refused for want of room", "reason")
        self.corrupted = self._counter("corrupted_requests", "Requests that met logits which are not finite")
        self._counter("num_preemptions", "Requests put back into the queue: never, here")
        self.first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token")
        self.gap = self._histogram("inter_token_latency_seconds", "Mean time between an answer's tokens")
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds", "Decoding time over tokens after the first"
        )
        self.whole = self._histogram("e2e_request_latency_seconds", "From arrival to the last token")
        self.queued = self._histogram("request_queue_time_seconds", "From arrival to the beginning of prefill")
        self.prefill = self._histogram("request_prefill_time_seconds", "Reading the prompt")
        self.decode = self._histogram("request_decode_time_seconds", "From the first token to the last")
        for reason in FINISH_REASONS:
            self.ended.labels(**self._labels, finished_reason=reason)
        for reason in ("queue_full",):
            self.rejected.labels(**self._labels, reason=reason)
        self._exposed = CollectorRegistry()
        self._exposed.register(_Exposed(self._registry, self._labels, vllm_names))

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A number that is read whenever somebody asks."""
        gauge = Gauge(_PREFIX + name, text, tuple(self._labels), registry=self._registry)
        gauge.labels(**self._labels).set_function(read)

    def text(self) -> bytes:
        return generate_latest(self._exposed)

    def record(self, answers: Answers) -> None:
        """A request is over, however it ended: every answer of it counts once."""
        self.prompt_tokens.labels(**self._labels).inc(answers.prompt_tokens)
        for index, completion in enumerate(answers.completions):
            reason = "cancelled" if completion is None else completion.finish_reason
            self.ended.labels(**self._labels, finished_reason=reason).inc()
            stats = answers.statistics[index]
            tokens = stats.answer_tokens if completion is None else len(completion.token_ids)
            self._count(stats, tokens)
            first, last = answers.first_token[index], answers.last_token[index]
            if first is not None and completion is not None:
                decoding = last - first
                self._observe(self.first_token, first - answers.arrived)
                self._observe(self.gap, decoding / max(tokens - 1, 1))
                self._observe(self.per_token, decoding / max(tokens - 1, 1))
                self._observe(self.whole, last - answers.arrived)
                self._observe(self.queued, stats.queue_seconds)
                self._observe(self.prefill, stats.prefill_seconds)
                self._observe(self.decode, decoding)

    def reject(self, reason: str) -> None:
        self.rejected.labels(**self._labels, reason=reason).inc()

    def corrupt(self) -> None:
        self.corrupted.labels(**self._labels).inc()

    def _count(self, stats: RequestStatistics, tokens: int) -> None:
        counts = histogram(stats)
        total = sum(counts)
        self.steps.labels(**self._labels).inc(total)
        self.drafted.labels(**self._labels).inc(stats.drafted_tokens)
        self.accepted.labels(**self._labels).inc(sum(d * n for d, n in enumerate(counts)))
        for position in range(len(counts) - 1):
            reached = sum(counts[position + 1 :])
            self.accepted_at.labels(**self._labels, position=str(position)).inc(reached)
        self.tree_nodes.labels(**self._labels).inc(stats.tree_nodes)
        self.answer_tokens.labels(**self._labels).inc(tokens)

    def _counter(self, name: str, text: str, *more: str) -> Counter:
        counter = Counter(_PREFIX + name, text, (*self._labels, *more), registry=self._registry)
        if not more:
            counter.labels(**self._labels)
        return counter

    def _histogram(self, name: str, text: str) -> Histogram:
        made = Histogram(_PREFIX + name, text, tuple(self._labels), registry=self._registry, buckets=_SECONDS)
        made.labels(**self._labels)
        return made

    def _observe(self, histogram: Histogram, seconds: float) -> None:
        histogram.labels(**self._labels).observe(max(seconds, 0.0))


class _Exposed(Collector):
    """Every native metric; then, with ``aliases``, the same under ``vllm:``, and SGLang's three."""

    def __init__(self, native: CollectorRegistry, labels: dict[str, str], aliases: bool) -> None:
        self._native = native
        self._labels = labels
        self._aliases = aliases

    def collect(self) -> Iterable[Metric]:
        native = list(self._native.collect())
        for metric in native:
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
        yield from native
        if self._aliases:
            yield from self._renamed(native)

    def _renamed(self, native: list[Metric]) -> Iterable[Metric]:
        totals: dict[str, float] = {}
        for metric in native:
            alias = Metric(_renamed(metric.name), metric.documentation, metric.type)
            alias.samples = [sample._replace(name=_renamed(sample.name)) for sample in metric.samples]
            totals |= {s.name: s.value for s in metric.samples if s.name.endswith("_total")}
            yield alias
        steps = totals[_PREFIX + "spec_decode_num_drafts_total"]
        drafted = totals[_PREFIX + "spec_decode_num_draft_tokens_total"]
        accepted = totals[_PREFIX + "spec_decode_num_accepted_tokens_total"]
        yield self._one("sglang:spec_accept_length", 1 + accepted / steps if steps else 1.0)
        yield self._one("sglang:spec_accept_rate", accepted / drafted if drafted else 0.0)
        calls = Metric("sglang:spec_verify_calls", "Steps that verified a draft", "counter")
        calls.samples = [Sample("sglang:spec_verify_calls_total", self._labels, steps)]
        yield calls

    def _one(self, name: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, "Over all requests so far", labels=tuple(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family


def _renamed(name: str) -> str:
    return "vllm:" + name.removeprefix(_PREFIX)
