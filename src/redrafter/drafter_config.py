"""What shapes a drafter; every backend builds its modules from it. Names no framework."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from redrafter.errors import CorruptModel

CELLS = ("rnn", "sum", "gru", "medusa")
HEADS = ("own", "tied")


@dataclass(frozen=True, kw_only=True)
class DrafterConfig:
    """Everything that shapes a drafter. ``cell="rnn", head="own", feature_layers=()`` is Apple's.

    feature_layers: target layers whose output joins the last hidden state (0 is the first layer's output);
    cell: rnn | sum (Apple's rnn=False: s + e) | gru | medusa (no recurrence: one residual block per depth);
    width: of context, trunk and what the cell reads of a token, 0 for the target's hidden_size; a target of several
    billion needs a drafter no wider than 512 to 1024. Another width means a learned context and a projected embedding;
    context_state: s_0 is the context instead of 0; state_size: 0 for the width;
    exit_dim: width of the residual blocks, 0 for context + state; trunk_layers: layers of the context trunk, run once
    per step, with trunk_heads attention heads (0: none, SwiGLU only) over the last trunk_window tokens;
    draft_vocabulary: number of tokens it can propose, 0 for all of the target's; draft_length: depths trained for.
    """

    vocab_size: int
    hidden_size: int
    num_target_layers: int
    feature_layers: tuple[int, ...] = ()
    width: int = 0
    cell: str = "rnn"
    head: str = "own"
    state_size: int = 0
    context_state: bool = False
    exit_dim: int = 0
    num_blocks: int = 2
    trunk_layers: int = 0
    trunk_heads: int = 0
    trunk_kv_heads: int = 0
    trunk_expansion: float = 2.0
    trunk_window: int = 512
    draft_vocabulary: int = 0
    draft_length: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "feature_layers", tuple(self.feature_layers))
        object.__setattr__(self, "width", self.width or self.hidden_size)
        object.__setattr__(self, "state_size", self.state_size or self.width)
        object.__setattr__(self, "exit_dim", self.exit_dim or self.width + self.state_size)
        object.__setattr__(self, "trunk_kv_heads", self.trunk_kv_heads or self.trunk_heads)
        if self.trunk_heads and (self.width % (2 * self.trunk_heads) or self.trunk_heads % self.trunk_kv_heads):
            raise CorruptModel(
                f"drafter config: trunk_heads={self.trunk_heads}, trunk_kv_heads={self.trunk_kv_heads} do not divide "
                f"width={self.width} into even heads"
            )
        for name, value, allowed in (("cell", self.cell, CELLS), ("head", self.head, HEADS)):
            if value not in allowed:
                raise CorruptModel(
                    f"drafter config: {name}={value!r} is unknown; it must be one of {', '.join(allowed)}"
                )
        same_width = self.cell in ("sum", "medusa") or self.context_state
        if same_width and self.state_size != self.width:
            raise CorruptModel(
                f"drafter config: cell={self.cell!r} with context_state={self.context_state} needs "
                f"state_size={self.width}, the drafter's width, not {self.state_size}"
            )
        if self.draft_vocabulary > self.vocab_size:
            raise CorruptModel(
                f"drafter config: draft_vocabulary={self.draft_vocabulary} is over vocab_size={self.vocab_size}"
            )
        if any(not 0 <= layer < self.num_target_layers for layer in self.feature_layers):
            raise CorruptModel(
                f"drafter config: feature_layers={list(self.feature_layers)} must be in 0..{self.num_target_layers - 1}"
            )

    @property
    def fused(self) -> bool:
        """Whether a learned context replaces the bare last hidden state."""
        return bool(self.feature_layers) or self.trunk_layers > 0 or self.projected

    @property
    def projected(self) -> bool:
        """Whether embeddings are projected, because the drafter is not as wide as they are."""
        return self.width != self.hidden_size

    @property
    def foldable(self) -> bool:
        """Whether a tied head's rows, a copy anyway, times the matrix before them are fewer bytes than the two."""
        return self.head == "tied" and self.draft_vocabulary > 0 and self.exit_dim <= self.hidden_size

    @property
    def feature_size(self) -> int:
        return self.hidden_size * (1 + len(self.feature_layers))

    @property
    def vocabulary(self) -> int:
        return self.draft_vocabulary or self.vocab_size

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DrafterConfig:
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise CorruptModel(
                f"drafter config: unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        for field in fields(cls):
            if field.name not in values:
                if field.default is MISSING:
                    raise CorruptModel(f"drafter config: {field.name} is missing")
                continue
            _check_type(field.name, str(field.type), values[field.name])
        return cls(**values)


def _check_type(name: str, kind: str, value: object) -> None:
    if kind == "tuple[int, ...]":
        ok = isinstance(value, tuple | list) and all(type(item) is int for item in value)
    elif kind == "float":
        ok = type(value) in (int, float) and value >= 0  # type: ignore[operator]
    else:
        ok = type(value).__name__ == kind and not (kind == "int" and value < 0)  # type: ignore[operator]
    if not ok:
        raise CorruptModel(f"drafter config: {name}={value!r} must be of type {kind}, and numbers not negative")
