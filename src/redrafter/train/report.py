"""What a run says: a JSONL log always, a progress bar or lines, TensorBoard on request."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from redrafter.errors import InvalidRequest


class TrainProgress(NamedTuple):
    step: int
    fraction: float
    """of the schedule"""
    left: float
    """seconds"""
    loss: float
    hit: list[float]
    """per depth: the drafter's first choice is the target's"""
    anchors_per_second: float
    tokens_per_step: float | None
    """simulated, at the last evaluation"""

    def line(self) -> str:
        hit = " ".join(f"{x:.2f}" for x in self.hit)
        simulated = "" if self.tokens_per_step is None else f"  tokens/step {self.tokens_per_step:.3f}"
        rate = f"{self.anchors_per_second:,.0f} anchors/s"
        return f"step {self.step}  loss {self.loss:.4f}  hit {hit}{simulated}  {rate}  {duration(self.left)} left"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class Reporter:
    """``quiet`` silences the console, never the log. A resumed run drops what the log says of steps it repeats."""

    def __init__(self, folder: Path, step: int, *, tensorboard: Path | None = None, quiet: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        self.quiet = quiet
        if path.is_file():
            path.write_text("".join(_until(path.read_text(encoding="utf-8"), step)), encoding="utf-8")
        self._board = None if tensorboard is None else _board(tensorboard, step)
        self._log = path.open("a", encoding="utf-8")
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            self._bar = Progress(BarColumn(bar_width=20), TaskProgressColumn(), TextColumn("{task.description}"))
            self._task = self._bar.add_task("starting", total=1.0)
            self._bar.start()

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def log(self, line: dict[str, Any]) -> None:
        self._log.write(json.dumps(line, allow_nan=False) + "\n")
        self._log.flush()
        if self._board is not None:
            for name, value in line.items():
                for i, number in enumerate(value if isinstance(value, list) else [value]):
                    if isinstance(number, int | float):
                        tag = f"{name}/{i + 1}" if isinstance(value, list) else name
                        self._board.add_scalar(tag, number, line.get("step", 0))

    def progress(self, progress: TrainProgress) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=progress.fraction, description=progress.line())
        else:
            self.say(progress.line())

    def close(self) -> None:
        self._log.close()
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            self._board.close()


def _until(text: str, step: int) -> list[str]:
    """Lines up to ``step``; a last line that a killed process left half-written is dropped."""
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if json.loads(line).get("step", 0) <= step]


def _board(folder: Path, step: int) -> Any:
    """What an earlier call wrote of steps after ``step`` is hidden: they are done again."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InvalidRequest(
            "TensorBoard was asked for, and its package is not installed: pip install 'redrafter[train]'"
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
