"""Exactness end to end on MLX: speculative ids equal plain ids, and torch's, whatever drafts and however."""
# ruff: noqa: E402 - nothing below may be imported where MLX is absent

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed: pip install 'redrafter[mlx]'")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'redrafter[mlx]'")

import numpy as np

from redrafter.algorithm.beam import Reading
from redrafter.backends.mlx.load import MLXBackend
from redrafter.engine import Engine
from redrafter.errors import NonFiniteLogits
from redrafter.params import PLAIN, DecodeConfig
from tests.mlx_backend.tiny import FAMILIES, open_backend, open_torch, write_drafter, write_model, write_quantised
from tests.test_engine import PROMPT, SETTINGS, params
from tests.test_engine_schedule import assert_equal, at_random
from tests.tiny import VOCAB, ScriptState, run, run_all
from tests.traffic import Visit, play, random_visits

SHAPES = [(1, 1, 1), (1, 1, 6), (2, 3, 2), (8, 8, 8), (64, 4, 8)]
TARGETS = (*FAMILIES, "quantised")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {family: write_model(root / family, family) for family in FAMILIES}
    made["quantised"] = write_quantised(root / "quantised", made["llama"])
    made["drafter"] = write_drafter(root / "drafter")
    made["reduced"] = write_drafter(root / "reduced", draft_vocabulary=40, trunk_layers=0, cell="gru")
    return made


@pytest.fixture(scope="module")
def backends(folders: dict[str, Path]) -> dict[str, MLXBackend]:
    return {name: open_backend(folders[name], folders["drafter"]) for name in TARGETS}


class Scripted:
    """A drafter that knows the answer: ranks it first, or last, or is wrong at every ``wrong_every``-th position."""

    token_ids = None
    cache = None

    def __init__(self, text: list[int], *, adversarial: bool = False, wrong_every: int = 0) -> None:
        self.text = [*text, *([0] * 64)]
        self.sign = -1.0 if adversarial else 1.0
        self.wrong_every = wrong_every

    def allocate(self, rows: int, capacity: int) -> None:
        """It keeps nothing."""

    def read(self, reading: Reading, row: int = 0) -> None:
        """It keeps nothing."""

    def recall(self, reading: Reading, length: int) -> None:
        """It keeps nothing."""

    def begin(self, reading: Reading) -> ScriptState:
        return ScriptState(None, (reading.first + reading.count + 1)[:, None], 1)

    def extend(self, state: ScriptState, beam_BW: mx.array, token_BW: mx.array) -> ScriptState:
        return ScriptState(None, state.position + 1, beam_BW.shape[1])

    def logits(self, state: ScriptState) -> mx.array:
        position = int(state.position[0, 0].item())
        token = self.text[min(position, len(self.text) - 1)]
        if self.wrong_every and position % self.wrong_every == 0:
            token = (token + 1) % VOCAB
        noise = np.random.default_rng(position).standard_normal(VOCAB).astype(np.float32)
        noise[token] += 12.0 * self.sign
        return mx.broadcast_to(mx.array(noise), (1, state.width, VOCAB))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", TARGETS)
def test_speculative_ids_are_plain_ids(backends: dict[str, MLXBackend], name: str, setting: str) -> None:
    backend = backends[name]
    plain, _ = run(Engine(backend, PLAIN), PROMPT, params(setting))
    assert len(plain) == 40
    shape = DecodeConfig(beam_width=4, branching=4, draft_length=4, tree_size=12)
    ids, statistics = run(Engine(backend, shape), PROMPT, params(setting))
    assert ids == plain and statistics.drafted_steps > 0


@pytest.mark.parametrize("setting", ["greedy", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_with_random_ideal_and_adversarial_drafters(
    backends: dict[str, MLXBackend], shape: tuple[int, int, int], setting: str
) -> None:
    backend = backends["llama"]
    asked = params(setting, max_new_tokens=20)
    plain, _ = run(Engine(backend, PLAIN), PROMPT, asked)
    random, text = backend.drafter, PROMPT + plain
    width, branching, length = shape
    try:
        for size in {(1, 1, 1): (2,), (8, 8, 8): (3, 64)}.get(shape, (12,)):
            config = DecodeConfig(beam_width=width, branching=branching, draft_length=length, tree_size=size)
            for drafter in (random, Scripted(text), Scripted(text, adversarial=True), Scripted(text, wrong_every=3)):
                backend.drafter = drafter
                assert run(Engine(backend, config), PROMPT, asked)[0] == plain, (size, type(drafter))
    finally:
        backend.drafter = random


def test_an_ideal_drafter_is_believed(backends: dict[str, MLXBackend]) -> None:
    """Without this the equality above could hold because nothing is ever accepted."""
    backend = backends["qwen3"]
    plain, _ = run(Engine(backend, PLAIN), PROMPT, params("greedy"))
    random = backend.drafter
    try:
        backend.drafter = Scripted(PROMPT + plain)
        shape = DecodeConfig(beam_width=2, branching=2, draft_length=4, tree_size=8)
        ids, statistics = run(Engine(backend, shape), PROMPT, params("greedy"))
    finally:
        backend.drafter = random
    assert ids == plain and statistics.tokens_per_step == 5.0


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_seed_is_the_same_text_on_torch(folders: dict[str, Path], name: str) -> None:
    """The drafts too: the same tokens per step means that both drafters proposed alike."""
    ours = open_backend(folders[name], folders["drafter"])
    theirs = open_torch(folders[name], folders["drafter"])
    shape = DecodeConfig(beam_width=4, branching=4, draft_length=4, tree_size=12, prompt_lookup=0)
    for setting in SETTINGS:
        asked = params(setting, max_new_tokens=24)
        mine, other = (run(Engine(b, shape), PROMPT, asked) for b in (ours, theirs))
        assert mine[0] == other[0], setting
        assert mine[1].accepted_at_depth == other[1].accepted_at_depth, setting
        assert mine[1].unmerged_tokens == other[1].unmerged_tokens, setting


@pytest.mark.parametrize("drafter", ["drafter", "reduced"])
def test_a_ragged_batch_gives_each_request_its_own_answer(folders: dict[str, Path], drafter: str) -> None:
    """Different lengths, settings and ends; more requests than rows, so rows are freed, moved and taken again."""
    backend = open_backend(folders["llama"], folders[drafter])
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, VOCAB, 1 + 7 * i % 40).tolist() for i in range(2 * len(SETTINGS))]
    settings = [params(name, max_new_tokens=3 + 5 * i % 31) for i, name in enumerate([*SETTINGS, *SETTINGS])]
    shape = DecodeConfig(tree_size=20, beam_width=4, draft_length=5)
    together = run_all(Engine(backend, shape, max_batch=5), prompts, settings)
    for prompt, p, (ids, _) in zip(prompts, settings, together, strict=True):
        assert ids == run(Engine(backend, PLAIN), prompt, p)[0]


@pytest.mark.parametrize("count", [1, 7, 40])
def test_a_part_of_the_draft_vocabulary(folders: dict[str, Path], count: int) -> None:
    from redrafter.backends.mlx.drafter import load_drafter
    from tests.mlx_backend.tiny import open_target

    target = open_target(folders["quantised"])
    backend = MLXBackend(target, load_drafter(folders["reduced"]), 200, [], vocabulary=count)
    assert backend.drafter is not None and backend.drafter.token_ids.shape == (count,)
    plain, _ = run(Engine(backend, PLAIN), PROMPT, params("sampled"))
    assert run(Engine(backend, DecodeConfig(tree_size=12)), PROMPT, params("sampled"))[0] == plain


@pytest.mark.parametrize("run_ahead", [False, True])
def test_traffic_with_changing_shapes_and_shared_beginnings(folders: dict[str, Path], run_ahead: bool) -> None:
    """Rows that are swapped, copied in part and read by the drafter late give the answers of one request alone."""
    backend = open_backend(folders["llama"], folders["drafter"])
    visits = random_visits(3, 10)
    expected = [run(Engine(backend, PLAIN, prefix_reuse=False), v.prompt, v.params)[0] for v in visits]
    backend.run_ahead = run_ahead
    answers = play(Engine(backend, at_random(5), max_batch=3), visits)
    assert_equal(visits, answers, expected)
    assert sum(answer.statistics.reused_tokens for answer in answers) > 0


@pytest.mark.parametrize("count", [3, 64, 65, 120, 197, 198])
def test_a_prompt_with_pads_is_read_as_without(folders: dict[str, Path], count: int) -> None:
    """As on CUDA, to the next of a few lengths where the cache has room for it."""
    prompt = np.random.default_rng(count).integers(3, VOCAB, count).tolist()
    padded, bare = (open_backend(folders["llama"], folders["drafter"], 300) for _ in range(2))
    padded.target.steady = True
    for backend in (padded, bare):
        backend.reserve(1, 256)
    assert (padded.prompt_pads(0, count) > 0) == (count != 64) and not bare.prompt_pads(0, count)
    assert padded.prompt_pads(250, count) == 0, "no room"
    features = [backend.prefill(0, prompt) for backend in (padded, bare)]
    assert float(mx.abs(features[0] - features[1]).max()) < 1e-4
    shape = DecodeConfig(tree_size=16, beam_width=4, draft_length=4)
    answers = [run(Engine(backend, shape), prompt, params("sampled")) for backend in (padded, bare)]
    assert answers[0][0] == answers[1][0]
    assert answers[0][1].accepted_at_depth == answers[1][1].accepted_at_depth, "the drafter read the same"


def test_log_probabilities_are_those_of_torch(folders: dict[str, Path]) -> None:
    told = []
    for backend in (
        open_backend(folders["llama"], folders["drafter"]),
        open_torch(folders["llama"], folders["drafter"]),
    ):
        engine = Engine(backend, DecodeConfig(tree_size=12))
        (answer,) = play(engine, [Visit(0, None, PROMPT, params("sampled", logprobs=4))])
        told.append([entry for event in answer.events for entry in event.logprobs or ()])
    assert len(told[0]) == 40
    for mine, theirs in zip(*told, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
        assert [i for i, _ in mine.top] == [i for i, _ in theirs.top]


def test_nan_logits_end_a_request(backends: dict[str, MLXBackend]) -> None:
    backend = backends["llama"]
    verify = backend.target.verify
    backend.target.verify = lambda tree, lengths: (verify(tree, lengths)[0] * float("nan"), verify(tree, lengths)[1])
    try:
        engine = Engine(backend, DecodeConfig(tree_size=8))
        engine.add("bad", PROMPT, params("greedy"))
        events = engine.step()
    finally:
        backend.target.verify = verify
    assert [type(event.error) for event in events] == [NonFiniteLogits]


def test_the_backend_imports_no_torch() -> None:
    """Its own modules; transformers may bring torch when a model's configuration is read."""
    names = ("drafter", "drafting", "kv_cache", "load", "ops", "target")
    code = "import sys\n" + "\n".join(f"import redrafter.backends.mlx.{name}" for name in names)
    code += "\nassert 'torch' not in sys.modules, 'torch'\nassert 'mlx.core' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_command_line(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Files, tokenizer, engine, drafter, text: --compare says that the ids are equal, and torch gives the same text."""
    from redrafter.cli import main
    from tests import fakes

    root = folders["llama"].parent
    model, drafter = root / "spoken", root / "spoken-drafter"
    write_model(model, "llama", vocab_size=280, eos_token_id=279)
    fakes.byte_level().save_pretrained(model)
    write_drafter(drafter, vocab_size=280)
    how = ["generate", "why?", "--model", str(model), "--drafter", str(drafter), "--dtype", "float32", "-q"]
    how += ["--max-new-tokens", "20", "--device", "cpu", "--temperature", "1", "--seed", "5"]
    assert main([*how, "--backend", "mlx", "--compare", "--repeat", "1"]) == 0
    assert capsys.readouterr().out.startswith("equal ids: yes (20 tokens)\n")
    texts = []
    for backend in ("mlx", "torch"):
        assert main([*how, "--backend", backend]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0]
    assert main([*how, "--backend", "mlx", "--threads", "2"]) == 2
    assert "MLX chooses its threads itself" in capsys.readouterr().err


def test_a_quantised_folder_through_the_front_door(folders: dict[str, Path]) -> None:
    from redrafter.load import load
    from redrafter.models import resolve

    engine = load(
        resolve(str(folders["quantised"])), folders["drafter"], backend="mlx", config=DecodeConfig(tree_size=8)
    )
    plain, _ = run(engine.without_speculation(), PROMPT, params("greedy"))
    assert run(engine, PROMPT, params("greedy"))[0] == plain


def test_a_result_names_the_device_that_computed(
    monkeypatch: pytest.MonkeyPatch, backends: dict[str, MLXBackend]
) -> None:
    from redrafter.bench.provenance import machine, peak_memory_bytes

    device = backends["llama"].device
    facts, memory = machine(device), peak_memory_bytes(device)
    assert facts["packages"]["mlx"] and memory["host"]
    on_gpu = device == mx.gpu
    assert (facts["gpu"] is not None, memory["gpu"] is not None) == (on_gpu, on_gpu)
    monkeypatch.setattr(mx, "device_info", lambda device: {"device_name": "Apple M2 Ultra"})
    assert machine(mx.Device(mx.gpu))["device"] == "Apple M2 Ultra"
    assert isinstance(peak_memory_bytes(mx.Device(mx.gpu))["gpu"], int)
