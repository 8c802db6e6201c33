"""Write the table of figures into README.md from benchmarks/figures.json; with --check, only say whether it is stale.

A figure is ``key -> {value, unit, result, command, device, commit, date}``; ``result`` is the path of the JSON of the
run that measured it. Nothing is written by hand between the two markers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
FIELDS = ("value", "unit", "result", "command", "device", "commit", "date")
# What a key means, in words. A key that is not here is shown as it is.
MEANING = {
    "tau_mtbench_greedy_n64": "tokens per step (bonus counted), MT-bench first turns, greedy, at most 64 nodes",
    "tau_mtbench_t1_n64": "the same at temperature 1, seed-coupled beams",
    "tree_tokens_removed_share": "share of tokens that merging shared prefixes removes",
    "cpu_speedup_mtbench_bf16": "speculative over plain decoding, two CPU cores, bf16, same engine",
    "cpu_forks_bf16": "answers that differ from plain decoding, two CPU cores, bf16",
    "exact_fp32_prompts": "prompts compared with plain decoding, float32",
    "exact_fp32_forks": "of these, greedy answers that differ",
    "exact_fp32_forks_t1": "of these, answers at temperature 1 that differ",
    "serve_fuzz_failures": "failures among the requests that schemathesis makes, 1,000 an operation",
    "serve_malformed_5xx": "5xx answers to malformed requests made by hand",
    "serve_streams_held": "streams at once, each complete and as the request alone gives it, tiny model",
    "serve_disconnects_leaked": "rows and requests left behind by 500 clients that went away",
    "serve_soak_memory_growth": "growth of the server's memory from request 1,000 to 10,000",
    "serve_ttft_delay_chunks": "chunks of a 2,000-token prompt read between two steps of running streams, at most",
    "serve_cpu_speedup_c1": "one chat through HTTP, speculation over plain, two CPU cores",
    "serve_cpu_worst": "the same, the worst of 1, 4 and 8 chats at once",
    "serve_gpu7b_speedup_c8": "7B-shape instrument through HTTP, 8 chats at once, speculation over plain",
    "serve_gpu7b_speedup_c1": "7B-shape instrument through HTTP, one chat, speculation over plain",
    "serve_gpu7b_speedup_c32": "7B-shape instrument through HTTP, 32 chats at once, speculation over plain",
    "serve_http_overhead_b8": "7B-shape instrument, 8 chats at once: what HTTP adds to the engine's time",
    "suite_seconds": "time of the test suite",
    "tau_other_greedy_n64": "tokens per step, the other categories, greedy, at most 64 nodes",
    "drafter_megabytes": "the shipped drafter's weights",
    "draft_bytes_per_depth": "bytes that the drafter reads per drafted token",
    "gain_distillation": "distillation over cross-entropy on the same texts, tokens per step",
    "gain_recurrent_over_medusa": "recurrent cell over Medusa heads, tokens per step",
    "datagen_tokens_per_second": "answer tokens that `redrafter data` makes, kept",
    "train_kills_survived": "random kills of a training run that ended with the same checkpoint, of 200",
    "damaged_checkpoints_loaded": "damaged checkpoints that loaded silently, of 1,000",
    "ddp_scaling_2gpu": "training on two GPUs over one, anchors per second",
    "gpu7b_plain_bandwidth_share": "7B-shape instrument: plain decoding's share of the bandwidth for reading",
    "gpu7b_verify64_ratio": "7B-shape instrument: forward over 64 nodes over that over one",
    "gpu7b_step_extra_share": "7B-shape instrument: draft, tree, accept and commit over a plain step",
    "gpu7b_overhead": "7B-shape instrument: tokens per step over speed-up",
    "gpu7b_speedup_greedy": "7B-shape instrument: speculative over plain decoding, tokens per second, greedy, batch 1",
    "gpu7b_speedup_t1": "7B-shape instrument: the same at temperature 1",
    "gpu7b_speedup_batch8": "7B-shape instrument: the same, greedy, batch 8",
    "gpu7b_speedup_batch32": "7B-shape instrument: the same, greedy, batch 32",
    "gpu7b_start_seconds": "7B-shape instrument: from the command to the first request",
    "gpu135m_speedup_greedy": "SmolLM2-135M itself: speculative over plain, tokens per second, greedy, batch 1",
    "gpu135m_plain_tokens_per_second": "SmolLM2-135M itself: plain decoding, batch 1",
    "gpu_worst_adaptive": "smallest speed-up of both models, batches 1, 4, 8, 32, greedy and temperature 1, adaptive",
    "gpu7b_forks": "7B-shape instrument, bf16: answers of 80 that differ from plain decoding, 64 nodes",
    "gpu7b_control_forks": "the same of plain decoding whose steps verify 64 nodes and accept none",
    "gpu_fp32_forks": "answers on the GPU that differ from plain decoding, float32",
    "mlx_cpu_equal_prompts": "prompts with equal ids on torch and MLX, float32",
    "mlx_cuda_speedup_greedy": "7B-shape instrument on MLX, float32: speculative over plain, tokens per second, greedy",
    "mlx_plain_vs_mlxlm": "7B-shape instrument on MLX: our plain decoding over mlx-lm's own",
}


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as a Markdown table, sorted by key. ValueError names a figure with a missing field."""
    if not figures:
        return "No figure has been measured for this version yet."
    rows = ["| what | value | device | measured by | date, commit |", "|---|---|---|---|---|"]
    for key, figure in sorted(figures.items()):
        missing = [field for field in FIELDS if field not in figure]
        if missing:
            raise ValueError(f"figure {key!r} lacks {', '.join(missing)}: measure it again with its command")
        value = figure["value"]
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        rows.append(
            f"| {MEANING.get(key, f'`{key}`')} | {shown} {figure['unit']} | {figure['device']} "
            f"| `{figure['command']}` ([result]({figure['result']})) | {figure['date']}, {str(figure['commit'])[:10]} |"
        )
    return "\n".join(rows)


def updated(readme: str, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The README with everything between the markers replaced. ValueError unless each marker is there once."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README.md must hold {BEGIN} and {END} once each, in this order: put them back")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table(figures)}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str], root: Path = ROOT) -> int:
    readme = root / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = updated(old, json.loads((root / "benchmarks" / "figures.json").read_text(encoding="utf-8")))
    if arguments == ["--check"]:
        if old != new:
            print("README.md is stale: run python docs/figures.py", file=sys.stderr)
        return int(old != new)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
