"""Where a number came from: code, command, machine, weights. Nothing of it names a person, a host or a home folder."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from redrafter import __version__
from redrafter.files import sha256
from redrafter.models import ModelFiles
from redrafter.models.integrity import MANIFEST, read_json

COMMIT_VARIABLE = "REDRAFTER_COMMIT"
"""Says which commit the code is, where it was copied without its git history."""
RECORDED_ENVIRONMENT = (
    *("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "MKL_NUM_THREADS", "KMP_AFFINITY"),
    *("MLX_USE_CUDA_GRAPHS", "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER"),
)


def output(*command: str) -> str | None:
    """What a command prints; None if it is not installed or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def checkout() -> Path | None:
    """The git checkout that this code is part of; None for an installed copy."""
    here = Path(__file__).resolve()
    tracked = output("git", "-C", str(here.parent), "ls-files", here.name)
    top = output("git", "-C", str(here.parent), "rev-parse", "--show-toplevel") if tracked else None
    return Path(top) if top else None


def source() -> dict[str, Any]:
    """Version, commit, and whether tracked files outside of benchmarks/ and README.md differ from it. The variable
    wins: a copy on another machine may carry an older history than its files."""
    root, named = checkout(), os.environ.get(COMMIT_VARIABLE)
    if root is None or named:
        return {"version": __version__, "commit": named, "dirty": None}
    changed = output("git", "-C", str(root), "status", "--porcelain", "-uno", "--", ".", ":!benchmarks", ":!README.md")
    return {
        "version": __version__,
        "commit": output("git", "-C", str(root), "rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
    }


def portable(argument: str) -> str:
    """An argument without this machine's folders: an absolute path, also behind ``--option=``, is made relative to the
    current folder if it is inside and is cut to its last part if not."""
    option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    if not os.path.isabs(value):
        return argument
    path = Path(value)
    inside = path.is_relative_to(Path.cwd())
    return option + equals + (str(path.relative_to(Path.cwd())) if inside else path.name)


def command_line(arguments: Sequence[str]) -> str:
    return shlex.join(["redrafter", *(portable(argument) for argument in arguments)])


def machine(device: Any) -> dict[str, Any]:
    """The processor, its threads, the versions, and the GPU (under CUDA its clocks). ``device`` is torch's or MLX's."""
    import torch

    affinity = getattr(os, "sched_getaffinity", None)
    facts: dict[str, Any] = {
        "platform": platform.system(),
        "cpu": cpu_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "environment": {name: os.environ[name] for name in RECORDED_ENVIRONMENT if name in os.environ},
        "packages": {name: _version(name) for name in ("torch", "transformers", "triton", "mlx", "mlx-lm")},
        "python": platform.python_version(),
        "gpu": None,
    }
    if device.type == "cuda":
        facts["gpu"] = {
            "name": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "clocks": output(
                "nvidia-smi",
                f"--id={device.index or 0}",
                "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit",
                "--format=csv,noheader",
            ),
        }
    elif _on_mlx_gpu(device):
        import mlx.core as mx

        facts["gpu"] = {"name": mx.device_info(device)["device_name"]}
    threads = f"{facts['threads']} thread{'s' if facts['threads'] > 1 else ''}"
    facts["device"] = facts["gpu"]["name"] if facts["gpu"] else f"{facts['cpu']}, {threads}"
    return facts


def _on_mlx_gpu(device: Any) -> bool:
    return type(device).__module__ == "mlx.core" and str(device.type).endswith("gpu")


def load_average() -> float | None:
    """Processes that wanted a core, averaged over the last minute; None where the system does not count them."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def cpu_name() -> str:
    """The processor's model name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def weights(folder: Path) -> dict[str, Any]:
    """{bytes, sha256 of each safetensors file}: as the manifest says, else counted here."""
    manifest = read_json(folder / MANIFEST)["files"] if (folder / MANIFEST).is_file() else {}
    files = sorted(folder.glob("*.safetensors"))
    return {
        "bytes": sum(file.stat().st_size for file in files),
        "sha256": {f.name: manifest[f.name]["sha256"] if f.name in manifest else sha256(f) for f in files},
    }


def models(files: ModelFiles, drafter: Path | None) -> dict[str, Any]:
    """The target's and the drafter's names and weights."""
    return {
        "model": {"name": portable(files.name), **weights(files.path)},
        "drafter": None if drafter is None else {"name": drafter.name, **weights(drafter)},
    }


def peak_memory_bytes(device: Any) -> dict[str, int | None]:
    """The most this process has held so far: resident on the host, and allocated on the GPU by torch or MLX."""
    import torch

    host = None
    if sys.platform != "win32":
        import resource

        # Kilobytes on Linux, bytes on macOS.
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    gpu = None
    if device.type == "cuda":
        gpu = torch.cuda.max_memory_allocated(device)
    elif _on_mlx_gpu(device):
        import mlx.core as mx

        gpu = mx.get_peak_memory()
    return {"host": host, "gpu": gpu}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
