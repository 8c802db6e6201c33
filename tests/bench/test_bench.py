"""``redrafter bench`` on a tiny random model in a folder: what it writes, when it refuses, what Ctrl-C leaves."""

from __future__ import annotations

import hashlib
import json
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from redrafter.backends.torch.checkpoint import save_drafter
from redrafter.backends.torch.drafter import Drafter
from redrafter.bench import control, measure, provenance
from redrafter.cli import bench, main
from redrafter.llm import LLM
from tests import fakes, suite
from tests.tiny import drafter_config, make_model

VOCAB = 280
QUESTIONS = [
    {"id": 81, "category": "mt_bench/writing", "turns": ["a secret harbour?", "and then?"]},
    {"id": 82, "category": "mt_bench/math", "turns": ["1+1"]},
    {"category": "qa", "prompt": "why?"},
    {"category": "qa", "messages": [{"role": "system", "content": "short"}, {"role": "user", "content": "who?"}]},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and an untrained drafter for it."""
    base = tmp_path_factory.mktemp("folders")
    make_model("llama", attention="eager", vocab_size=VOCAB, eos_token_id=VOCAB - 1).save_pretrained(base / "model")
    fakes.byte_level().save_pretrained(base / "model")
    torch.manual_seed(3)
    save_drafter(Drafter(drafter_config(vocab_size=VOCAB)), base / "drafter", {})
    return base


@pytest.fixture
def arguments(folders: Path, tmp_path: Path, monkeypatch) -> list[str]:
    """A short run in an empty folder that stands for a checkout; the result is benchmarks/results/r.json."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "checkout", lambda: None)
    monkeypatch.setattr(provenance, "checkout", lambda: None)
    monkeypatch.setenv(provenance.COMMIT_VARIABLE, "0123abc")
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    shape = ["--beam-width", "2", "--branching", "2", "--draft-length", "3", "--tree-size", "6"]
    model = ["--model", str(folders / "model"), "--drafter", str(folders / "drafter"), "--dtype", "float32"]
    return ["bench", *model, "--device", "cpu", *shape, "--max-new-tokens", "9", "--name", "r", "--prompts", "q.jsonl"]


RESULT = Path("benchmarks/results/r.json")
FIGURES = Path("benchmarks/figures.json")


def result() -> dict[str, Any]:
    return json.loads(RESULT.read_text(encoding="utf-8"))


def test_a_run_writes_its_result_and_a_figure(arguments, folders, monkeypatch, capsys) -> None:
    FIGURES.parent.mkdir()
    FIGURES.write_text('{"another": {"value": 1}}')
    arguments += ["--figure", "exact_prompts=equal_prompts", "--figure", "tau=tokens_per_step.mt_bench"]
    monkeypatch.setattr("sys.argv", ["/some/where/redrafter", *arguments])
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    found = result()
    assert [r["id"] for r in found["prompts"]] == ["81", "82", "3", "4"]
    assert [(r["equal"], r["fork"]) for r in found["prompts"]] == [(True, None)] * 4
    assert sum(r["answer_tokens"] for r in found["prompts"]) == found["summary"]["answer_tokens"] > 9
    assert all(r["seconds"] > r["decode_seconds"] > 0 and r["plain_seconds"] > 0 for r in found["prompts"])
    assert (found["summary"]["equal_prompts"], found["summary"]["forks"], found["partial"]) == (4, 0, False)
    assert found["shape"]["tree_size"] == 6
    assert found["summary"]["drafter_bytes"] == (folders / "drafter" / "model.safetensors").stat().st_size
    sha = hashlib.sha256((folders / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert found["provenance"]["model"]["sha256"] == {"model.safetensors": sha}
    figures = json.loads(FIGURES.read_text())
    assert list(figures) == ["another", "exact_prompts", "tau"]
    figure = figures["exact_prompts"]
    assert (figure["value"], figure["unit"], figure["commit"]) == (4, "prompts", "0123abc")
    assert figure["result"] == "benchmarks/results/r.json"
    assert figure["command"].startswith("redrafter bench --model model --drafter drafter --dtype float32")
    assert figures["tau"]["value"] == found["summary"]["tokens_per_step.mt_bench"] >= 1
    assert "Speed-up over plain decoding" in out and "4 of 4 prompts" in err
    assert not list(RESULT.parent.glob("*partial*"))


def test_neither_prompts_nor_folders_of_this_machine_are_written(arguments, folders, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["redrafter", *arguments])
    assert main([*arguments, "-q"]) == 0
    text = RESULT.read_text(encoding="utf-8")
    assert "harbour" not in text and "short" not in text
    assert str(folders) not in text and str(Path.cwd()) not in text


def test_batches_of_two_answer_as_one_by_one_does(arguments, capsys) -> None:
    assert main([*arguments, "-q", "--json", "--temperature", "1", "--seed", "5"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert main([*arguments, "-q", "--temperature", "1", "--seed", "5", "--batch", "2", "--repeat", "2"]) == 0
    two = result()
    assert [r["ids_sha256"] for r in one["prompts"]] == [r["ids_sha256"] for r in two["prompts"]]
    assert len({r["ids_sha256"] for r in one["prompts"]}) == 4
    assert [r["batch"] for r in two["prompts"]] == [0, 0, 1, 1]
    assert [len(b["plain_seconds"]) for b in two["batches"]] == [2, 2]
    assert two["summary"]["forks"] == 0


def test_the_ways_take_turns_in_going_first(arguments, monkeypatch) -> None:
    ways: list[bool] = []
    generate = LLM.generate

    def watched(llm, *given, speculation=True, **settings):
        ways.append(speculation)
        return generate(llm, *given, speculation=speculation, **settings)

    monkeypatch.setattr(LLM, "generate", watched)
    assert main([*arguments, "-q", "--limit", "3"]) == 0
    assert ways == [False, True, False, True, True, False, False, True]


@pytest.mark.parametrize(("recorded", "runs"), [([0, 5, 5], 2), ([0, 1, 2, 3, 4, 5, 6], 4)])
def test_where_steps_are_recorded_the_first_batch_runs_in_full_before(arguments, monkeypatch, recorded, runs) -> None:
    """``recorded``: graphs before the warm-up and after every pass of it."""
    calls: list[tuple[int, int, bool]] = []
    generate = LLM.generate

    def watched(llm, prompts, params, speculation=True):
        calls.append((len(prompts), params[0].max_new_tokens, speculation))
        return generate(llm, prompts, params, speculation=speculation)

    graphs = property(lambda self: recorded[min(len(calls) // 2, len(recorded) - 1)])
    monkeypatch.setattr("redrafter.backends.torch.load.TorchBackend.graphs", graphs)
    monkeypatch.setattr(LLM, "generate", watched)
    assert main([*arguments, "-q", "--batch", "3", "--max-new-tokens", "12"]) == 0
    timed = [(3, 12, False), (3, 12, True), (1, 12, True), (1, 12, False)]
    assert calls == [(3, 12, False), (3, 12, True)] * runs + timed
    warm_up = result()["settings"]["warm_up"]
    assert warm_up == "the first batch in full until no new graph is recorded, at most 4 times"
    passes = [recorded[min(done, len(recorded) - 1)] for done in (runs, runs + 1, runs + 2)]
    later = [after - before for before, after in pairwise(passes)]
    assert [batch["graphs_recorded"] for batch in result()["batches"]] == later


@pytest.mark.parametrize(
    ("gpu", "before", "said"),
    [
        (False, [8, 8], "8 tokens of the first batch"),
        (True, [9, 9, 8, 8], "the first batch in full, 8 tokens of every other"),
    ],
)
def test_elsewhere_fewer_tokens_warm_up(arguments, monkeypatch, gpu, before, said) -> None:
    """``gpu``: as MLX's backend is on one. Two prompts, both ways."""
    tokens: list[int] = []
    generate = LLM.generate

    def watched(llm, prompts, params, speculation=True):
        tokens.append(params[0].max_new_tokens)
        return generate(llm, prompts, params, speculation=speculation)

    monkeypatch.setattr(LLM, "generate", watched)
    monkeypatch.setattr("redrafter.backends.torch.load.TorchBackend.run_ahead", gpu)
    assert main([*arguments, "-q", "--limit", "2"]) == 0
    assert tokens == before + [9] * 4
    assert result()["settings"]["warm_up"] == said
    assert result()["batches"][0]["graphs_recorded"] is None


def test_only_tokens_per_step(arguments) -> None:
    assert main([*arguments, "-q", "--no-plain", "--category", "mt_bench", "--limit", "1", "--spread"]) == 0
    found = result()
    assert [(r["id"], r["equal"], r["speedup"]) for r in found["prompts"]] == [("81", None, None)]
    assert found["summary"]["tokens_per_step"] >= 1 and "speedup" not in found["summary"]
    assert found["batches"][0]["plain_seconds"] == []


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--figure", "tau=tokens_per_stop"], "tokens_per_step"),
        (["--figure", "tau=tokens_per_step.rag"], "tokens_per_step.mt_bench"),
        (["--figure", "tau=speedup", "--no-plain"], "drop --no-plain"),
        (["--control", "--no-plain"], "--control compares with plain decoding"),
        (["--figure", "Tau"], "KEY=METRIC"),
        (["--figure", "tau=speedup", "--out", ".."], "leave it out"),
        (["--category", "poetry"], "mt_bench/math, mt_bench/writing, qa"),
        (["--name", "../r"], "--name '../r'"),
        (["--prompts", "absent.jsonl"], "absent.jsonl"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(arguments, more, says, monkeypatch, capsys) -> None:
    monkeypatch.setattr("redrafter.cli.options.load_llm", lambda *a, **k: pytest.fail("the model was loaded"))
    assert main([*arguments, *more]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and says in err and len(err.splitlines()) == 1
    assert not FIGURES.exists()


@pytest.mark.parametrize(
    ("line", "says"),
    [("{", "line 1 is not JSON"), ("[]", "JSON list"), ('{"turns": []}', "asks nothing"), ("", "0 prompts")],
)
def test_a_line_that_is_not_understood_is_named(arguments, line, says, capsys) -> None:
    Path("q.jsonl").write_text(line)
    assert main(arguments) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(("load", "warned"), [(3.2, True), (0.4, False), (None, False)])
def test_a_busy_machine_is_said(arguments, monkeypatch, capsys, load, warned: bool) -> None:
    monkeypatch.setattr(bench, "load_average", lambda: load)
    assert main([*arguments, "--limit", "1", "--no-plain"]) == 0
    assert ("warning: the machine is busy (load average 3.2)" in capsys.readouterr().err) == warned


def test_a_figure_needs_a_commit(arguments, monkeypatch, capsys) -> None:
    monkeypatch.delenv(provenance.COMMIT_VARIABLE)
    assert main([*arguments, "--figure", "tau=speedup"]) == 2
    assert "REDRAFTER_COMMIT" in capsys.readouterr().err


def test_a_prompt_that_is_too_long_and_a_missing_drafter(arguments, capsys) -> None:
    assert main([*arguments, "-q", "--max-context", "9"]) == 2
    assert "prompt 81 has" in capsys.readouterr().err
    assert main([*arguments, "-q", "--drafter", "none"]) == 2
    assert "--drafter" in capsys.readouterr().err
    assert not RESULT.exists()


def test_ctrl_c_keeps_what_is_finished_and_writes_no_figure(arguments, monkeypatch, capsys) -> None:
    assert main([*arguments, "-q"]) == 0
    before = RESULT.read_bytes()
    generate, calls = LLM.generate, []

    def interrupted(llm, *given, **settings):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return generate(llm, *given, **settings)

    monkeypatch.setattr(LLM, "generate", interrupted)
    assert main([*arguments, "--figure", "tau=tokens_per_step"]) == 130
    assert RESULT.read_bytes() == before and not FIGURES.exists()
    unfinished = RESULT.with_suffix(".partial.json")
    found = json.loads(unfinished.read_text())
    assert found["partial"] and [r["id"] for r in found["prompts"]] == ["81", "82"]
    assert capsys.readouterr().err.splitlines()[-2:] == [f"result: {unfinished}", "interrupted"]
    assert main(["bench", "--report", str(unfinished), "--figure", "tau=tokens_per_step"]) == 2
    assert not FIGURES.exists()


def test_a_kill_leaves_what_was_finished(arguments, monkeypatch) -> None:
    record, calls = measure._one_batch, []

    def killed(*given) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise SystemExit(9)
        record(*given)

    monkeypatch.setattr(measure, "_one_batch", killed)
    with pytest.raises(SystemExit):
        main([*arguments, "-q"])
    found = json.loads(RESULT.with_suffix(".partial.json").read_text())
    assert found["partial"] and found["summary"]["prompts"] == 2


def test_a_fork_is_listed_with_its_gap(arguments, monkeypatch) -> None:
    generate = LLM.generate

    def forked(llm, *given, speculation=True, **settings):
        answers = generate(llm, *given, speculation=speculation, **settings)
        if speculation:
            for answer in answers:
                ids = answer.token_ids
                object.__setattr__(answer, "token_ids", (*ids[:4], (ids[4] + 1) % VOCAB, *ids[5:]))
        return answers

    monkeypatch.setattr(LLM, "generate", forked)
    assert main([*arguments, "-q", "--limit", "1"]) == 0
    found = result()
    fork = found["prompts"][0]["fork"]
    assert (fork["position"], fork["other_is"]) == (4, "speculative")
    assert fork["other"] == (fork["plain"] + 1) % VOCAB and fork["logit_gap"] > 0
    assert found["summary"]["forks"] == 1


def test_the_control_is_counted_and_a_fork_of_it_is_listed(arguments, monkeypatch, capsys) -> None:
    arguments += ["--control", "--figure", "control=control_forks", "--batch", "2"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    found = result()
    assert [r["control_fork"] for r in found["prompts"]] == [None] * 4
    assert (found["summary"]["control_forks"], found["summary"]["control_prompts"]) == (0, 4)
    assert found["control"]["shape"]["tree_size"] == 6 and found["settings"]["control"]
    assert "0 of 4, control 0 of 4" in out and "the control for forks, 2 of 2 batches" in err
    assert json.loads(FIGURES.read_text())["control"]["value"] == 0
    cut = control.root_alone

    def wrong(choose_accept):
        """Goes on from another token than the target's choice."""
        accept = cut(choose_accept)

        def changed(*given):
            accepted = accept(*given)
            return accepted._replace(bonus=accepted.bonus * 0 + 7, tokens=accepted.tokens * 0 + 7)

        return changed

    monkeypatch.setattr(control, "root_alone", wrong)
    assert main([*arguments, "-q", "--limit", "1"]) == 0
    found = result()
    fork = found["prompts"][0]["control_fork"]
    assert (fork["position"], fork["other"], fork["other_is"]) == (0, 7, "control") and fork["logit_gap"] > 0
    assert (found["summary"]["forks"], found["summary"]["control_forks"]) == (0, 1)
    assert main(["bench", "--report", str(RESULT), "-o", "page.html"]) == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert "0 of 1, control 1 of 1" in page and f"{fork['logit_gap']:.4f}" in page and "control&#x27;s shape" in page


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]


@pytest.mark.parametrize("more", [[], ["--no-plain"]])
def test_the_page_draws_the_result_and_fetches_nothing(arguments, more) -> None:
    assert main([*arguments, "-q", *more]) == 0
    found = result()
    found["provenance"]["machine"]["device"] = "<GPU & co>"
    RESULT.write_text(json.dumps(found))
    assert main(["bench", "--report", str(RESULT), "-o", "page.html"]) == 0
    text = Path("page.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.tags.count("svg") == (2 if more else 3) and page.links == [] and "script" not in page.tags
    depths, categories, prompts = 5, 3, 0 if more else 4  # so deep may a tree of six nodes be
    assert page.tags.count("rect") == depths + categories + prompts
    assert "&lt;GPU &amp; co&gt;" in text and "<GPU" not in text


def test_a_report_needs_a_result_and_a_wish(arguments, capsys) -> None:
    assert main(["bench", "--report", "q.jsonl", "-o", "page.html"]) == 2
    assert "q.jsonl" in capsys.readouterr().err
    assert main([*arguments, "-q", "--no-plain"]) == 0
    assert main(["bench", "--report", str(RESULT)]) == 2
    assert "-o PAGE.html" in capsys.readouterr().err


def test_the_time_of_the_suite_is_a_figure(arguments) -> None:
    suite.record(Path.cwd(), 61.5, 400, "not slow")
    figure = json.loads(FIGURES.read_text())["suite_seconds"]
    assert (figure["value"], figure["unit"], figure["result"]) == (61.5, "s", "benchmarks/results/suite.json")
    assert json.loads(Path(figure["result"]).read_text())["summary"]["tests"] == 400


def test_arguments_lose_this_machines_folders(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["bench", "--out", str(tmp_path / "a" / "b"), "--model=/x/y/model", "--prompts", "../q.jsonl"]
    assert provenance.command_line(given) == "redrafter bench --out a/b --model=model --prompts ../q.jsonl"


def test_this_code_is_of_a_commit() -> None:
    root = provenance.checkout()
    if root is None:
        pytest.skip("not run in a git checkout")
    found = provenance.source()
    assert root == Path(__file__).resolve().parents[2]
    assert len(found["commit"]) == 40 and isinstance(found["dirty"], bool)
