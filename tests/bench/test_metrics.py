"""The arithmetic of a run's summary on numbers that can be done by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from redrafter.bench.metrics import acceptance_per_depth, known_metrics, looping, quartiles, summarise
from redrafter.bench.prompts import load_prompts
from redrafter.bench.report import forks_said
from tests.bench.cases import BATCHES, RECORDS

README = Path(__file__).resolve().parents[2] / "benchmarks" / "README.md"


def test_the_summary_of_three_prompts() -> None:
    found = summarise(RECORDS, BATCHES)
    assert found["prompts"] == 3 and found["answer_tokens"] == 60 and found["steps"] == 20
    assert found["tokens_per_step"] == 3.0
    assert found["tokens_per_step_no_loops"] == pytest.approx(40 / 15)
    assert (found["looping_prompts"], found["tokens_per_step_looping"]) == (1, 4.0)
    # Sums first: 10 + 20 + 2 (the median of 1, 2, 9) over 4 + 10 + 2.
    assert (found["plain_seconds"], found["speculative_seconds"]) == (32, 16)
    assert found["speedup"] == 2.0
    assert (found["speedup_q1"], found["speedup_median"], found["speedup_q3"]) == (1.5, 2.0, 2.25)
    assert found["plain_tokens_per_second"] == 64 / 32
    assert found["speculative_tokens_per_second"] == 60 / 16
    assert found["speedup_per_token"] == pytest.approx(60 / 16 / 2)
    assert (found["forks"], found["equal_prompts"]) == (1, 2)
    assert found["removed_share"] == pytest.approx(1 - 160 / 400)
    assert found["acceptance_per_depth"] == [0.9, 0.5, 0.1]
    assert found["tokens_per_step.mt_bench"] == 40 / 10
    assert found["tokens_per_step.qa"] == found["tokens_per_step.other"] == 2.0
    assert found["tokens_per_step_by_category"] == {"mt_bench/math": 4.0, "mt_bench/stem": 4.0, "qa": 2.0}


def test_forks_of_the_control_are_counted_over_the_prompts_that_it_has_answered() -> None:
    fork = {"position": 4, "logit_gap": 0.01, "other_is": "control"}
    records = [{**RECORDS[0], "control_fork": fork}, {**RECORDS[1], "control_fork": None}, RECORDS[2]]
    found = summarise(records, BATCHES)
    assert (found["control_forks"], found["control_prompts"]) == (1, 2)
    assert forks_said(found) == "1 of 3, control 1 of 2"
    assert "control_forks" not in summarise(RECORDS, BATCHES)
    assert forks_said(summarise(RECORDS, BATCHES)) == "1 of 3"


def test_without_plain_runs_nothing_is_compared() -> None:
    records = [{**r, "equal": None, "speedup": None, "plain_answer_tokens": None} for r in RECORDS]
    found = summarise(records, [{**b, "plain_seconds": []} for b in BATCHES])
    assert found["tokens_per_step"] == 3.0
    assert not {"speedup", "forks", "plain_seconds"} & found.keys()


def test_of_no_prompt_there_is_no_ratio() -> None:
    found = summarise([], [])
    assert found["prompts"] == 0 and found["tokens_per_step"] is None and found["removed_share"] is None
    assert found["acceptance_per_depth"] == []
    assert "speedup" not in found


@pytest.mark.parametrize("plain", [True, False])
def test_every_number_of_the_summary_can_be_a_figure_and_is_explained(plain: bool) -> None:
    found = summarise(RECORDS, BATCHES) if plain else summarise([{**r, "equal": None} for r in RECORDS], BATCHES)
    known = known_metrics(["mt_bench", "qa"], plain)
    numbers = {name for name, value in found.items() if isinstance(value, int | float)}
    added_by_the_run = {"drafter_bytes", "start_seconds", "peak_memory_bytes"}
    assert set(known) == numbers | added_by_the_run
    text = README.read_text(encoding="utf-8")
    everything = known_metrics(["mt_bench", "qa"], plain, baseline=True, cuda=True, control=True)
    assert [name for name in everything if f"`{name.partition('.')[0]}" not in text] == []


def test_groups_are_known_before_the_run() -> None:
    assert "tokens_per_step.other" not in known_metrics(["mt_bench"], True)
    assert {"tokens_per_step.mt_bench", "tokens_per_step.other"} <= known_metrics(["qa", "mt_bench"], True).keys()


def test_an_answer_that_says_the_same_again_is_looping() -> None:
    assert looping([1, 2, 3, 4] * 8)
    assert not looping(range(32))
    assert not looping([1, 1, 1])
    # Eight 4-grams, of which five (62.5 %) are distinct; one repetition more and it is 5 of 9.
    assert not looping([1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1])
    assert looping([1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2])


def test_depths_that_some_runs_never_had_count_as_never_accepted() -> None:
    records = [{"accepted_at_depth": [4, 2], "drafted_steps": 6}, {"accepted_at_depth": [], "drafted_steps": 2}]
    assert acceptance_per_depth(records) == [0.5, 0.25]


def test_quartiles_of_few() -> None:
    assert quartiles([2.0]) == (2.0, 2.0, 2.0)
    assert quartiles([1.0, 3.0]) == (1.5, 2.0, 2.5)


def test_a_line_separator_inside_a_prompt_does_not_end_its_line(tmp_path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one\u2028two"}\n{"prompt": "three"}\n', encoding="utf-8")
    assert load_prompts(file).total == 2
