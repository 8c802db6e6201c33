"""Write the worked example of docs/algorithm.md and its picture, by running the algorithm itself.

PYTHONPATH=src python docs/generate.py            rewrites algorithm.md's generated blocks and tree.svg
PYTHONPATH=src python docs/generate.py --check    says which are stale, exit status 1 if any
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from redrafter.algorithm.accept import Accepted, Choice, choose
from redrafter.algorithm.beam import DraftBeams, Reading, draft
from redrafter.algorithm.sampling import Sampling
from redrafter.algorithm.step import DecodeState, step
from redrafter.algorithm.tree import TokenTree, unmerged_tokens
from redrafter.backends.torch.ops import TorchOps
from redrafter.params import DecodeConfig

HERE = Path(__file__).resolve().parent
OPS = TorchOps()
WORDS = ["The", "cat", "dog", "old", "sat", "ran", "on", "away", "down", "home", "."]
SHAPE = DecodeConfig(beam_width=2, branching=2, draft_length=3, tree_size=8, seed_coupled=False, prompt_lookup=0)
ROOT = WORDS.index("The")

DRAFTER = {
    "The": {"cat": 0.5, "dog": 0.3, "old": 0.1},
    "cat": {"sat": 0.5, "ran": 0.4},
    "dog": {"ran": 0.6, "sat": 0.2},
    "sat": {"on": 0.7, "down": 0.2},
    "ran": {"away": 0.6, "on": 0.3},
}
"""The example's drafter: the chance of the next word given the last one. What is left goes to the other words."""

TARGET = {"The": "cat", "The cat": "ran", "The cat ran": "home", "The dog": "ran"}
"""The example's target: what it says after a text. After anything else it ends the sentence."""


class Example(NamedTuple):
    beams: DraftBeams
    tree: TokenTree
    choice: Choice
    accepted: Accepted


class WordDrafter:
    """The state of a beam is its last word."""

    token_ids = None

    def begin(self, reading: Reading) -> Tensor:
        return reading.tokens[:, -1:]

    def extend(self, state: Tensor, beam_BW: Tensor, token_BW: Tensor) -> Tensor:
        return token_BW

    def logits(self, state: Tensor) -> Tensor:
        table = torch.zeros(len(WORDS), len(WORDS))
        for row, word in enumerate(WORDS):
            said = DRAFTER.get(word, {})
            rest = [w for w in WORDS if w not in said]
            weight = {w: rank + 1 for rank, w in enumerate(rest)}  # all different, so that there are no ties
            left = 1 - sum(said.values())
            for column, other in enumerate(WORDS):
                table[row, column] = said.get(other, left * weight.get(other, 0) / sum(weight.values()))
        return table.log()[state]


class WordTarget:
    """Reads every node's text off the mask, as attention does, and looks it up."""

    vocab_size = len(WORDS)

    def verify(self, tree: TokenTree, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.zeros(*tree.tokens.shape, len(WORDS))
        for node in range(tree.tokens.shape[1]):
            logits[0, node, WORDS.index(TARGET.get(text_of(tree, node), "."))] = 1.0
        return logits, logits[..., :1]

    def commit(self, lengths_B: Tensor, accepted: Accepted) -> None:
        """Nothing to keep: the example is one step."""


def text_of(tree: TokenTree, node: int) -> str:
    seen = tree.mask[0, node].nonzero().flatten().tolist()
    return " ".join(WORDS[int(tree.tokens[0, j])] for j in seen)


def run() -> Example:
    one, root = torch.ones(1, dtype=torch.int64), torch.tensor([ROOT])
    state = DecodeState(Reading(torch.zeros(1, 1, 1), root[:, None], 0 * one, one), root, one, Sampling())
    target, drafter = WordTarget(), WordDrafter()
    _, accepted, tree = step(OPS, target, drafter, state, SHAPE)
    logits, _ = target.verify(tree, state.lengths)
    beams = draft(OPS, drafter, state.reading, root, SHAPE)
    return Example(beams, tree, choose(OPS, logits, tree, state.sampling, None), accepted)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source_block(example: Example) -> str:
    return f"```python\n{inspect.getsource(step).rstrip()}\n```"


def settings_block(example: Example) -> str:
    rows = [[name, str(getattr(SHAPE, name))] for name in ("beam_width", "branching", "draft_length", "tree_size")]
    return table(["setting", "here"], rows)


def pool_block(example: Example) -> str:
    beams, tree = example.beams, example.tree
    slots = {text_of(tree, node): node for node in range(tree.tokens.shape[1])}
    rows: list[list[str]] = []
    texts: list[str] = []
    survivors = surviving_slots(beams)
    for slot in range(beams.tokens.shape[1]):
        parent = int(beams.parent[0, slot])
        texts.append(f"{texts[parent] if parent >= 0 else WORDS[ROOT]} {WORDS[int(beams.tokens[0, slot])]}")
        chance = math.exp(float(beams.score[0, slot]))
        node = slots.get(texts[slot])
        rows.append(
            [
                str(slot),
                str(int(beams.depth[0, slot])),
                texts[slot],
                "root" if parent < 0 else str(parent),
                f"{chance:.3f}",
                "yes" if slot in survivors else "",
                "" if node is None else str(node),
            ]
        )
    return table(["slot", "depth", "path", "parent", "path probability", "beam survives", "tree node"], rows)


def surviving_slots(beams: DraftBeams) -> set[int]:
    """The best ``beam_width`` slots of every depth."""
    survivors: set[int] = set()
    for depth in range(1, beams.draft_length + 1):
        slots = [s for s in range(beams.tokens.shape[1]) if int(beams.depth[0, s]) == depth]
        survivors |= set(sorted(slots, key=lambda s: -float(beams.score[0, s]))[: SHAPE.beam_width])
    return survivors


def children(tree: TokenTree, node: int) -> list[int]:
    return [c for c in range(1, tree.tokens.shape[1]) if int(tree.parent[0, c]) == node]


def word(tree: TokenTree, node: int) -> str:
    return WORDS[int(tree.tokens[0, node])]


def tree_block(example: Example) -> str:
    tree, accepted = example.tree, accepted_nodes(example)
    lines: list[str] = []

    def draw(node: int, lead: str, branch: str, below: str) -> None:
        mark = "  <- accepted" if node in accepted and node else ""
        lines.append(f"{lead}{branch}{node} {word(tree, node)}{mark}")
        kids = children(tree, node)
        for kid in kids:
            last = kid == kids[-1]
            draw(kid, lead + below, "`-- " if last else "|-- ", "    " if last else "|   ")

    draw(0, "", "", "")
    return "```text\n" + "\n".join(lines) + "\n```"


def merged_block(example: Example) -> str:
    nodes, unmerged = example.tree.tokens.shape[1], int(unmerged_tokens(OPS, example.tree)[0])
    return (
        f"Side by side, each with its own copy of its beginning, the same paths would take {unmerged} tokens; merged "
        f"they take {nodes}. Merging removes {1 - nodes / unmerged:.0%}."
    )


def mask_block(example: Example) -> str:
    tree = example.tree
    nodes = range(tree.tokens.shape[1])
    head = ["node", "position", *[str(j) for j in nodes]]
    rows = []
    for i in nodes:
        marks = ["x" if tree.mask[0, i, j] else "" for j in nodes]
        rows.append([f"{i} {word(tree, i)}", f"n + {int(tree.depth[0, i])}", *marks])
    return table(head, rows)


def accepted_nodes(example: Example) -> set[int]:
    return set(example.accepted.path[0].tolist())


def choice_block(example: Example) -> str:
    tree, rows = example.tree, []
    for node in range(tree.tokens.shape[1]):
        parent = int(tree.parent[0, node])
        asked = WORDS[int(example.choice.token[0, parent])]
        match = f"parent chose {asked}: {'yes' if asked == word(tree, node) else 'no'}" if node else "it is the root"
        chosen = WORDS[int(example.choice.token[0, node])]
        rows.append([str(node), text_of(tree, node), chosen, match, "yes" if node in accepted_nodes(example) else ""])
    return table(["node", "text so far", "the target says next", "is the node what was asked for?", "accepted"], rows)


def accepted_block(example: Example) -> str:
    a = example.accepted
    length = int(a.length[0])
    emitted = " ".join(WORDS[t] for t in a.tokens[0, : length + 1].tolist())
    return table(
        ["field of Accepted", "value", "meaning"],
        [
            ["path", str(a.path[0].tolist()), "nodes whose keys and values are kept; the last one repeats"],
            ["length", str(length), "drafted tokens accepted"],
            ["bonus", WORDS[int(a.bonus[0])], "the target's own next token: the next root"],
            ["tokens", emitted, f"what is emitted: {length + 1} tokens for one forward of the target"],
        ],
    )


def picture(example: Example) -> str:
    """The tree from left to right; what is accepted is filled, what the target said instead is dashed."""
    tree, accepted = example.tree, accepted_nodes(example)
    place: dict[int, tuple[float, float]] = {}
    leaves = 0

    def settle(node: int) -> float:
        nonlocal leaves
        heights = [settle(kid) for kid in children(tree, node)]
        if not heights:
            heights = [60.0 * leaves]
            leaves += 1
        y = (heights[0] + heights[-1]) / 2
        place[node] = (40 + 150 * int(tree.depth[0, node]), y + 40)
        return y

    settle(0)
    width, height = 40 + 150 * (SHAPE.draft_length + 1), 60 * leaves + 40
    last = int(example.accepted.path[0, -1])
    bonus = (place[last][0] + 150, max(y for _, y in place.values()) + 60)
    height = max(height, int(bonus[1]) + 40)
    shapes = [f'<rect width="{width}" height="{height}" fill="#ffffff"/>']
    for node in range(1, tree.tokens.shape[1]):
        kept = node in accepted
        shapes.append(_edge(place[int(tree.parent[0, node])], place[node], kept, dashed=False))
    shapes.append(_edge(place[last], bonus, kept=True, dashed=True))
    for node, (x, y) in sorted(place.items()):
        shapes += _box(x, y, f"{node}  {word(tree, node)}", "#1f5fae" if node in accepted else "#ffffff")
    shapes += _box(*bonus, f"bonus  {WORDS[int(example.accepted.bonus[0])]}", "#1b7f4b")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    title = "<title>The token tree of the worked example and its accepted path</title>"
    return "\n".join([head + ' role="img" font-family="sans-serif" font-size="14">', title, *shapes, "</svg>"]) + "\n"


def _edge(a: tuple[float, float], b: tuple[float, float], kept: bool, dashed: bool) -> str:
    colour, width = ("#1b7f4b", 2.5) if dashed else ("#1f5fae", 2.5) if kept else ("#9aa3ad", 1.5)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    ends = f'x1="{a[0] + 90:g}" y1="{a[1]:g}" x2="{b[0]:g}" y2="{b[1]:g}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"{dash}/>'


def _box(x: float, y: float, label: str, fill: str) -> list[str]:
    border, ink = ("#9aa3ad", "#22272e") if fill == "#ffffff" else (fill, "#ffffff")
    return [
        f'<rect x="{x:g}" y="{y - 16:g}" width="90" height="32" rx="6" fill="{fill}" stroke="{border}"/>',
        f'<text x="{x + 45:g}" y="{y + 5:g}" text-anchor="middle" fill="{ink}">{escape(label)}</text>',
    ]


BLOCKS = {
    "source": source_block,
    "settings": settings_block,
    "pool": pool_block,
    "tree": tree_block,
    "merged": merged_block,
    "mask": mask_block,
    "choice": choice_block,
    "accepted": accepted_block,
}


def generate() -> dict[Path, str]:
    """The files as they should be."""
    example = run()
    page = (HERE / "algorithm.md").read_text()
    for name, block in BLOCKS.items():
        begin, end = f"<!-- generated: {name} -->", "<!-- end -->"
        pattern = re.compile(re.escape(begin) + r"\n.*?" + re.escape(end), re.S)
        if len(pattern.findall(page)) != 1:
            raise SystemExit(f"docs/algorithm.md must hold the block {begin!r} .. {end!r} exactly once")
        content = f"{begin}\n{block(example)}\n{end}"
        page = pattern.sub(lambda _, content=content: content, page)
    return {HERE / "algorithm.md": page, HERE / "tree.svg": picture(example)}


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    stale = [path for path, text in generate().items() if not path.is_file() or path.read_text() != text]
    if arguments:
        for path in stale:
            print(f"docs/{path.name} is stale: run PYTHONPATH=src python docs/generate.py", file=sys.stderr)
        return 1 if stale else 0
    for path, text in generate().items():
        path.write_text(text)
    print(f"{len(stale)} files changed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
