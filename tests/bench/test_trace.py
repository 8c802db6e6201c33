"""What ``benchmarks/gpu/trace.py`` makes of a profiler's events; the profiler itself wants a GPU."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.trace import LEAST, table, timeline, works


def launch(correlation: int, start: float, kernels: int, each: float = 2.0) -> list[dict[str, Any]]:
    """A graph's kernels, half of them products, which start before their predecessor has ended."""
    names = ["_stream", "_tree_attention"]
    return [
        {"cat": "kernel", "name": names[i % 2], "ts": start + i, "dur": each, "args": {"correlation": correlation}}
        for i in range(kernels)
    ]


def test_steps_and_pauses() -> None:
    events = launch(1, 0.0, LEAST)  # the prompt ends at 51
    for step in range(4):
        events += launch(10 + step, 100.0 + 70.0 * step, LEAST + 10)  # 61 us each
    events.append({"cat": "gpu_memcpy", "name": "copy", "ts": 163.0, "dur": 1.0, "args": {"correlation": 99}})
    found = works(events[::-1])
    assert [work.is_graph for work in found] == [True, True, False, True, True, True]
    lines = table(found)
    assert lines[0] == "prompt 51 us, then a pause of 49"
    assert lines[1] == "4 steps of 61.0 us, pauses of 9.0 between"
    assert sorted(line.split() for line in lines[2:]) == [
        ["_stream", "30", "60.0", "us"],
        ["_tree_attention", "30", "60.0", "us"],
    ]
    assert table(works(launch(1, 0.0, LEAST))) == ["1 graphs: too few to say something"]


def test_a_timeline_has_the_hosts_long_calls_in_their_place() -> None:
    host = [
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize", "ts": 10.0, "dur": 30.0, "args": {}},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 11.0, "dur": 3.0, "args": {}},
        {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 120.0, "dur": 9.0, "args": {}},
    ]
    lines = timeline(launch(1, 0.0, LEAST) + launch(2, 130.0, LEAST) + host)
    assert [line.split()[0] for line in lines] == ["device", "host", "host", "device"]
    assert "cudaStreamSynchronize" in lines[1] and "cudaGraphLaunch" in lines[2]
