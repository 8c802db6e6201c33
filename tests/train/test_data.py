"""Data: every format of prompts, where answers start, and the same bytes however often the writer is killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from redrafter.cli import main
from redrafter.errors import InvalidRequest, ModelNotFound
from redrafter.files import sha256
from redrafter.train.chat import chat_frame, encode, render
from redrafter.train.prompts import read_prompts
from redrafter.train.samples import Samples, shard_counts

ROOT = Path(__file__).resolve().parents[2]
SIZES = "rows=16 prompt_rows=16 max_new=20 max_prompt=16 pool=2 loop_share=0.3 heldout_one_in=5 cache_tokens=2048"


def command(model: Path, out: Path, *more: str) -> list[str]:
    sets = [x for setting in SIZES.split() for x in ("--set", setting)]
    return ["data", "--model", str(model), "--out", str(out), "--device", "cpu", *sets, *more]


def jsonl(path: Path, *records: object) -> str:
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n")
    return str(path)


TALK = [("user", "w1"), ("assistant", "w2"), ("user", "w3")]


def test_every_format_becomes_messages(tmp_path: Path) -> None:
    human = {"user": "human", "assistant": "gpt"}
    talk = [{"role": role, "content": text} for role, text in TALK]
    source = jsonl(
        tmp_path / "p.jsonl",
        {"messages": talk},
        {"conversations": [{"from": human[role], "value": text} for role, text in TALK]},
        {"prompt": "w7", "category": "qa"},
        {"turns": ["w8", "w9"]},
    )
    last = read_prompts([source])
    assert [p.messages for p in last[:2]] == [talk, talk]
    assert [p.messages[0]["content"] for p in last[2:]] == ["w7", "w8"]
    assert last[2].category == "qa"
    each = read_prompts([source], "each")
    assert [len(p.messages) for p in each] == [1, 3, 1, 3, 1, 1]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"text": "a"}, 'p.jsonl:1: no prompt found among text; use "messages"'),
        ({"prompt": 3}, "no prompt found"),
        ({"messages": []}, "expected a list of turns"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role='tool'"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no user turn"),
        ([1], "a JSON list"),
    ],
)
def test_a_wrong_record_is_named(tmp_path: Path, record: object, says: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        read_prompts([jsonl(tmp_path / "p.jsonl", record)])
    assert says in str(error.value)


def test_hub_data_sets_say_what_they_need(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'redrafter\[train\]'"):
        read_prompts(["owner/name:train"])
    with pytest.raises(InvalidRequest, match="no such file"):
        read_prompts(["not-there.jsonl"])


def test_hub_data_sets_are_read_as_files_are(monkeypatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> list[dict[str, object]]:
        asked.append((name, split))
        if name == "owner/gone":
            raise FileNotFoundError("Dataset 'owner/gone'\n doesn't exist")
        rows = [{"prompt": "w1"}, {"conversations": [{"from": "human", "value": "w2"}]}]
        return [*rows, {"text": "?"}] if split == "bad" else rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = read_prompts(["owner/name", "owner/name:train_sft"])
    assert [p.messages[-1]["content"] for p in found] == ["w1", "w2"] * 2
    assert asked == [("owner/name", "train"), ("owner/name", "train_sft")]
    with pytest.raises(InvalidRequest, match="owner/name:bad:3: no prompt found"):
        read_prompts(["owner/name:bad"])
    with pytest.raises(ModelNotFound, match=r"'owner/gone' could not be loaded \(Dataset 'owner/gone' doesn't exist\)"):
        read_prompts(["owner/gone"])


def test_answers_start_where_the_template_ends(model_folder: Path, tmp_path: Path, capsys) -> None:
    talk = {"messages": [{"role": role, "content": text} for role, text in TALK]}
    prompts = jsonl(tmp_path / "p.jsonl", talk, *({"prompt": f"w{i} w{i + 1} w7"} for i in range(24)))
    out = tmp_path / "data"
    assert main(command(model_folder, out, "--prompts", prompts, "--turns", "each", "--tokens", "900", "-q")) == 0
    report = json.loads(capsys.readouterr().out)
    counts, samples = report["counts"], Samples([out])
    assert len(samples) == counts["kept"] > 20
    assert counts["kept_answer_tokens"] == (samples.end - samples.begin - samples.answer_start).sum() >= 900
    assert 0 < counts["kept_sampled"] == samples.sampled.sum() < len(samples)
    assert counts["kept"] + counts["answers_looping"] + counts.get("answers_too_short", 0) == (
        counts["answers"] + counts.get("kept_looping", 0)
    )
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    context = encode(tokenizer, [render(tokenizer, talk["messages"])])[0]
    before, after = (encode(tokenizer, [part])[0] for part in chat_frame(tokenizer))
    starts = set()
    for i in range(len(samples)):
        text, start = samples.text(i).tolist(), int(samples.answer_start[i])
        starts.add(tuple(text[:start]))
        assert text[: len(before)] == before and text[start - len(after) : start] == after
        assert 0 not in text[start:-1]
        assert (text[-1] == 0) == bool(samples.ended[i])
    assert tuple(context) in starts, "the answer to the last turn has the whole conversation as its context"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["shards"] == {p.name: sha256(p) for p in out.glob("shard-*")}
    assert len(manifest["model_sha256"]) == 64 and manifest["settings"]["max_new"] == 20


def hashes(out: Path) -> dict[str, str]:
    return {p.name: sha256(p) for p in sorted(out.glob("*")) if p.suffix in (".safetensors", ".json")}


def test_kills_change_nothing(model_folder: Path, tmp_path: Path, capsys) -> None:
    assert main(command(model_folder, tmp_path / "whole", "--tokens", "2500", "-q")) == 0
    killed = tmp_path / "killed"
    arguments = [sys.executable, "-m", "redrafter.cli", *command(model_folder, killed, "--tokens", "2500")]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    rng, struck = random.Random(0), 0
    for _ in range(2):
        child = subprocess.Popen(arguments, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before, limit = len(list(killed.glob("*-*"))), time.monotonic() + 60
        while child.poll() is None and len(list(killed.glob("*-*"))) < before + 2 and time.monotonic() < limit:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        struck += child.poll() is None
        child.kill()
        child.wait()
    assert struck >= 1
    (killed / ".tmp-shard-00099.safetensors").write_bytes(b"half")
    assert main(command(model_folder, killed, "--tokens", "2500", "-q")) == 0
    assert hashes(killed) == hashes(tmp_path / "whole")
    assert not list(killed.glob(".tmp-*"))
    # A longer run begins with the shorter one's shards.
    assert main(command(model_folder, killed, "--tokens", "2900", "-q")) == 0
    shards = {k: v for k, v in hashes(tmp_path / "whole").items() if k.startswith("shard")}
    assert shards.items() <= hashes(killed).items()
    assert sum(shard_counts(p).get("kept_answer_tokens", 0) for p in killed.glob("shard-*")) >= 2900


def test_another_seed_or_model_is_refused_in_the_same_folder(model_folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "data"
    assert main(command(model_folder, out, "--seconds", "1", "-q")) == 0
    assert main(command(model_folder, out, "--seconds", "1", "--seed", "4", "-q")) == 2
    assert "begun with seed=0, not 4" in capsys.readouterr().err
    assert main(command(model_folder, out, "--set", "colour=3")) == 2
    assert "'colour' is no setting of data" in capsys.readouterr().err
    assert main(command(model_folder, out, "--no-own")) == 2
    assert "nothing to answer" in capsys.readouterr().err
