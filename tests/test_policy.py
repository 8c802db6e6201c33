"""The adaptive policy on simulated machines: what it settles on, and what it loses against the best fixed choice."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from redrafter.params import PLAIN, DecodeConfig
from redrafter.policy import PROBE_EVERY, PROBE_STEPS, Adaptive, Fixed, Timed, bucket_of


def shape(width: int, length: int, nodes: int) -> DecodeConfig:
    return DecodeConfig(beam_width=width, branching=width, draft_length=length, tree_size=nodes, prompt_lookup=0)


# Acceptance per depth, the drafter's usual text: larger trees have more.
ACCEPTANCE = {
    PLAIN: 0.0,
    shape(4, 3, 8): 0.80,
    shape(4, 5, 12): 0.82,
    shape(4, 6, 24): 0.84,
    shape(4, 8, 32): 0.85,
    shape(8, 8, 64): 0.87,
}
SMALL, LARGE = shape(4, 3, 8), shape(8, 8, 64)


def mean_tokens(config: DecodeConfig, exponent: float = 1.0) -> float:
    length = config.draft_length if config.speculative else 0
    return 1 + sum(ACCEPTANCE[config] ** (exponent * k) for k in range(1, length + 1))


@dataclass
class Machine:
    """A step costs a pass over the weights, the part of its nodes that is over ``free``, and a drafter's passes."""

    weights: float = 1.0
    free: int = 64
    per_node: float = 0.01
    per_depth: float = 0.01
    noise: float = 0.05
    exponent: float = 1.0
    """of the acceptance: over 1 the text is harder for the drafter than usual"""
    random: random.Random = field(default_factory=lambda: random.Random(1))

    def seconds(self, rows: int, config: DecodeConfig) -> float:
        nodes = rows * config.tree_size
        drafting = self.per_depth * config.draft_length if config.speculative else 0.0
        return self.weights + self.per_node * max(0, nodes - self.free) + drafting

    def timed(self) -> list[Timed]:
        return [Timed(c, mean_tokens(c), self.seconds(1, c)) for c in ACCEPTANCE]

    def accepted(self, config: DecodeConfig) -> int:
        count = 0
        while config.speculative and count < config.draft_length:
            if self.random.random() >= ACCEPTANCE[config] ** self.exponent:
                break
            count += 1
        return count

    def best(self, rows: int) -> float:
        """Tokens per second and request of the best fixed shape."""
        return max(mean_tokens(c, self.exponent) / self.seconds(rows, c) for c in ACCEPTANCE)


def play(policy: Any, machine: Machine, steps: int, rows: int = 1) -> tuple[Counter[DecodeConfig], float]:
    """Steps by shape, and expected tokens per second and request over the best fixed shape's."""
    used: Counter[DecodeConfig] = Counter()
    tokens = seconds = 0.0
    for _ in range(steps):
        config = policy.choose(rows)
        used[config] += 1
        tokens += mean_tokens(config, machine.exponent)
        seconds += machine.seconds(rows, config)
        taken = machine.seconds(rows, config) * machine.random.uniform(1 - machine.noise, 1 + machine.noise)
        policy.observe(config, [machine.accepted(config) for _ in range(rows)], taken)
    return used, tokens / seconds / machine.best(rows)


def test_a_good_drafter_gets_a_big_tree() -> None:
    machine = Machine()
    policy = Adaptive(machine.timed())
    assert policy.shapes[0] == LARGE and set(policy.shapes) == set(ACCEPTANCE)
    used, share = play(policy, machine, 2000)
    assert used.most_common(1)[0][0] == LARGE and share > 0.97


@pytest.mark.parametrize(("gain", "chosen"), [(1.01, SMALL), (1.02, LARGE)])
def test_of_shapes_that_promise_alike_the_one_with_the_shorter_step_comes_first(
    gain: float, chosen: DecodeConfig
) -> None:
    timed = [Timed(PLAIN, 1.0, 1.0), Timed(SMALL, 3.0, 1.1), Timed(LARGE, 3.0 * 1.2 / 1.1 * gain, 1.2)]
    assert Adaptive(timed).choose(1) == chosen


def test_a_useless_drafter_is_turned_off_and_stays_off() -> None:
    machine = Machine(per_depth=0.06, exponent=1e3)
    policy = Adaptive(machine.timed())
    assert policy.choose(1) != PLAIN
    play(policy, machine, 60)
    used, share = play(policy, machine, 3000)
    assert used[PLAIN] > 0.99 * 3000 and share > 0.99
    assert sum(used.values()) > used[PLAIN], "it is tried again now and then"


def test_speculation_comes_back_with_its_acceptance() -> None:
    machine = Machine(exponent=1e3)
    policy = Adaptive(machine.timed())
    play(policy, machine, 1000)
    machine.exponent = 1.0
    play(policy, machine, 600)
    used, share = play(policy, machine, 1000)
    assert used[PLAIN] < 30 and share > 0.97


def test_many_rows_get_smaller_trees() -> None:
    machine = Machine(per_node=0.02)
    policy = Adaptive(machine.timed())
    chosen = []
    for rows in (1, 4, 8, 32):
        play(policy, machine, 400, rows)
        used, share = play(policy, machine, 1000, rows)
        chosen.append(used.most_common(1)[0][0].tree_size)
        assert share > 0.97, rows
    assert chosen == sorted(chosen, reverse=True) and chosen[0] == 64 and chosen[-1] == 1
    assert policy.choose(1) == LARGE, "what one row costs is still known"


def test_a_busy_moment_at_start_up_is_corrected() -> None:
    """The best shape seemed half again as slow as it is."""
    machine = Machine()
    timed = [t._replace(step_seconds=1.5 * t.step_seconds) if t.config == LARGE else t for t in machine.timed()]
    policy = Adaptive(timed)
    assert policy.shapes[0] != LARGE
    play(policy, machine, 1500)
    used, _ = play(policy, machine, 500)
    assert used.most_common(1)[0][0] == LARGE


def test_a_machine_that_gets_slower_for_large_trees() -> None:
    """The batch stays and its cost grows, as when another process takes cores."""
    machine = Machine()
    policy = Adaptive(machine.timed())
    play(policy, machine, 500)
    machine.free, machine.per_node = 8, 0.08
    play(policy, machine, 500)
    used, share = play(policy, machine, 1000)
    assert used[LARGE] < 30 and share > 0.97


MACHINES: dict[str, dict[str, Any]] = {
    "gpu": {},
    "cpu": {"free": 1, "per_node": 0.03},
    "slow drafter": {"per_depth": 0.12},
}


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5, 2.5, 4.0, 1e3])
@pytest.mark.parametrize("rows", [1, 3, 8, 20])
@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_little_is_lost_against_the_best_fixed_shape(machine: dict[str, Any], rows: int, exponent: float) -> None:
    simulated = Machine(**machine, exponent=exponent)
    policy = Adaptive(simulated.timed())
    play(policy, simulated, 300, rows)
    _, share = play(policy, simulated, 3000, rows)
    assert share > 0.97


def test_never_slower_than_plain_beyond_the_probes() -> None:
    """A drafter whose steps cost three plain ones and are worth two."""
    machine = Machine(per_depth=0.6, exponent=1.8)
    policy = Adaptive(machine.timed())
    used, share = play(policy, machine, 4000)
    assert machine.best(1) == 1.0 and share > 0.97 and used[PLAIN] > 0.97 * 4000


def test_the_same_observations_give_the_same_choices() -> None:
    def choices() -> list[DecodeConfig]:
        machine, seen = Machine(), []
        policy = Adaptive(machine.timed())
        for step in range(700):
            machine.exponent = 6.0 if 200 < step < 500 else 1.0
            seen.append(policy.choose(1 + step % 3))
            policy.observe(seen[-1], [machine.accepted(seen[-1])], 1.0)
        return seen

    assert choices() == choices() and len(set(choices())) > 1


def test_steps_that_ended_or_were_not_alone_teach_no_time() -> None:
    machine = Machine()
    policy = Adaptive(machine.timed())
    before = policy.table()
    policy.observe(LARGE, [], 50.0)
    assert policy.table() == before
    for _ in range(5):
        policy.observe(LARGE, [8], None)
    assert [line.step_seconds for line in policy.table()] == [line.step_seconds for line in before]
    policy.observe(LARGE, [8], 50.0)  # the first of its kind: it may have compiled something
    assert [line.step_seconds for line in policy.table()] == [line.step_seconds for line in before]
    policy.observe(LARGE, [8], 50.0)
    after = {line.config: line.step_seconds for line in policy.table()}
    assert machine.seconds(1, LARGE) < after[LARGE] < 1.5 * machine.seconds(1, LARGE), "an outlier is not believed"


def test_the_step_that_lets_the_drafter_catch_up_teaches_no_time() -> None:
    policy = Adaptive(Machine().timed())
    for _ in range(2):
        policy.observe(PLAIN, [0], 1.0)
        policy.observe(LARGE, [3], 1.0)
    seconds = {line.config: line.step_seconds for line in policy.table()}
    for _ in range(2):
        policy.observe(PLAIN, [0], 1.0)
        policy.observe(LARGE, [3], 9.0)
    assert {line.config: line.step_seconds for line in policy.table()} == seconds


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("per_node", [0.01, 0.03])
def test_what_a_change_of_shape_costs_is_not_learnt_as_the_shapes_own(per_node: float, rows: int) -> None:
    """The step after a change takes twice its time, as where the drafter catches up or a graph is loaded anew."""
    machine = Machine(per_node=per_node)
    policy = Adaptive(machine.timed())
    before = None
    for _ in range(4000):
        config = policy.choose(rows)
        late = 2.0 if config != before else 1.0
        before = config
        seconds = late * machine.seconds(rows, config) * machine.random.uniform(0.95, 1.05)
        policy.observe(config, [machine.accepted(config) for _ in range(rows)], seconds)
    table = policy.forecast(rows)
    assert sum(line.observed >= 5 for line in table) >= 2, "others than the one in use are still timed"
    for line in table:
        assert line.step_seconds == pytest.approx(machine.seconds(rows, line.config), rel=0.1), line


def test_the_table_says_what_is_believed() -> None:
    machine = Machine()
    policy = Adaptive(machine.timed())
    play(policy, machine, 100, rows=3)
    table = policy.table()
    assert [line.rows for line in table] == [1] * 6 + [4] * 6
    (chosen,) = [line for line in table if line.chosen]
    assert chosen.rows == 4 and chosen.observed > 50
    assert chosen.tokens_per_second == max(line.tokens_per_second for line in table if line.rows == 4)
    plain = next(line for line in table if line.rows == 4 and line.config == PLAIN)
    assert (
        plain.observed
        and plain.tokens_per_step == 1.0
        and plain.step_seconds == pytest.approx(machine.seconds(3, PLAIN), rel=0.1)
    )
    assert Fixed(LARGE).table() == []


def test_other_shapes_are_tried_now_and_then() -> None:
    machine = Machine(per_depth=0.0)
    policy = Adaptive(machine.timed())
    used, _ = play(policy, machine, 20 * PROBE_EVERY)
    tried = [config for config in used if config != LARGE]
    assert tried and sum(used[c] for c in tried) <= 20 * PROBE_STEPS


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (32, 32), (33, 64)])
def test_buckets_are_powers_of_two(rows: int, bucket: int) -> None:
    assert bucket_of(rows) == bucket


def test_what_was_timed_for_more_rows_is_believed_from_the_first_step_on() -> None:
    """One row says that a large tree is nearly free; eight were timed and say otherwise."""
    one = [Timed(PLAIN, 1.0, 1.0), Timed(SMALL, 2.0, 1.1), Timed(LARGE, 3.0, 1.2)]
    eight = [Timed(PLAIN, 1.0, 1.0, 8), Timed(SMALL, 2.0, 1.5, 8), Timed(LARGE, 3.0, 9.0, 8)]
    guessing, knowing = Adaptive(one), Adaptive([*one, *eight])
    assert guessing.choose(8) == knowing.choose(1) == LARGE
    assert knowing.choose(8) == knowing.choose(5) == SMALL
    seconds = {(line.config, line.observed): line.step_seconds for line in knowing.forecast(7)}
    assert seconds == {(t.config, 1): t.step_seconds for t in eight}
    knowing.observe(SMALL, [1] * 8, 30.0)  # other settings may have been recorded
    assert seconds == {(line.config, line.observed): line.step_seconds for line in knowing.forecast(8)}


@pytest.mark.parametrize("seed", range(6))
def test_a_batch_soon_follows_a_change_of_text(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Times of 32 rows of SmolLM2-135M on one H200: two nodes a row are best while it samples, twelve where it is
    greedy. Two nodes say little of what twelve would give, and an answer takes a hundred steps."""
    two, twelve = shape(2, 1, 2), shape(4, 11, 12)
    milliseconds = {PLAIN: 0.66, two: 0.745, twelve: 1.42}
    for config, acceptance in ((two, 0.73), (twelve, 0.745)):
        monkeypatch.setitem(ACCEPTANCE, config, acceptance)
    monkeypatch.setattr(Machine, "seconds", lambda machine, rows, config: milliseconds.get(config, 99.0))
    timed = [Timed(c, mean_tokens(c), s, rows) for c, s in milliseconds.items() for rows in (1, 32)]
    machine, policy = Machine(exponent=2.0, random=random.Random(seed)), Adaptive(timed)
    play(policy, machine, 100, 32)
    assert play(policy, machine, 200, 32)[0][two] > 180
    machine.exponent = 1.0
    assert play(policy, machine, 60, 32)[0][two] < 20
    assert play(policy, machine, 200, 32)[0][twelve] > 180


def test_nothing_is_tried_that_was_not_timed_for_so_many_rows() -> None:
    """Neither when the rows change in the middle of a try: a recording would keep requests waiting."""
    shapes = list(ACCEPTANCE)
    timed = Machine().timed()
    timed += [t._replace(rows=4) for t in timed if t.config in (PLAIN, *shapes[3:])]
    timed += [t._replace(rows=8) for t in timed if t.rows == 1 and t.config in (PLAIN, *shapes[1:4])]
    policy, machine, used = Adaptive(timed), Machine(), set()
    for step in range(4000):
        rows = 1 + step % 8
        config = policy.choose(rows)
        used.add((bucket_of(rows), config))
        assert config in [policy.shapes[i] for i in policy.offered(bucket_of(rows))], (step, rows)
        policy.observe(config, [machine.accepted(config)] * rows, machine.seconds(rows, config))
    assert len(used) > 6


def test_what_was_not_timed_is_guessed_from_what_was() -> None:
    one = [Timed(PLAIN, 1.0, 1.0), Timed(SMALL, 2.0, 1.1), Timed(LARGE, 3.0, 1.2)]
    policy = Adaptive([*one, Timed(PLAIN, 1.0, 1.0, 8), Timed(SMALL, 2.0, 4.0, 8)])
    lines = {line.config: line for line in policy.forecast(8)}
    assert lines[SMALL].step_seconds == 4.0 and lines[LARGE].observed == 0
    assert lines[LARGE].step_seconds > 4.0, "eight large trees take longer than eight small ones"


def test_plain_alone_is_plain() -> None:
    policy = Adaptive([Timed(PLAIN, 1.0, 0.5)])
    assert {policy.choose(n % 4 + 1) for n in range(500)} == {PLAIN}
