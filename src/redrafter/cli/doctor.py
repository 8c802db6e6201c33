"""``redrafter doctor``: what this machine, this installation and this cache can do."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from redrafter import __version__

PACKAGES = (
    *("torch", "transformers", "safetensors", "tokenizers", "huggingface-hub", "gguf", "typer", "rich", "triton"),
    *("mlx", "mlx-lm"),
)


def register(app: typer.Typer) -> None:
    app.command("doctor", help="Show versions, devices, CPU bfloat16 support, the cache and the shipped drafters.")(
        doctor
    )


def doctor(as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False) -> None:
    facts = {
        "redrafter": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": _device(),
        "cpu": _cpu(),
        "cache": _cache(),
        "drafters": _drafters(),
    }
    print(json.dumps(facts) if as_json else "\n".join(_lines(facts)))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device() -> dict[str, Any]:
    """What ``--device auto`` and ``--dtype auto`` mean here, and the CUDA devices."""
    import torch

    from redrafter.backends.torch.gpu import cuda_trouble, kernels_trouble
    from redrafter.backends.torch.load import pick_device, pick_dtype
    from redrafter.bench.provenance import output

    auto = pick_device("auto")
    cuda = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        cuda.append({"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)})
    return {
        "auto": str(auto),
        "dtype_auto": str(pick_dtype("auto", auto)).removeprefix("torch."),
        "cuda": cuda,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda_trouble": cuda_trouble(),
        "kernels_trouble": kernels_trouble(),
    }


def _cpu() -> dict[str, Any]:
    import torch

    from redrafter.backends.torch import linear

    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": linear.can_pack(torch.bfloat16, torch.device("cpu")),
        "bfloat16_exact": linear.row_invariant(torch.bfloat16),
    }


def _cache() -> dict[str, Any]:
    """The cache folder and the models in it; a model counts once its manifest is there."""
    from redrafter.models import home
    from redrafter.models.integrity import MANIFEST

    folder = home()
    found = sorted(folder.glob(f"models/*/{MANIFEST}")) + sorted(folder.glob(f"gguf/*/{MANIFEST}"))
    return {"folder": str(folder), "models": [_entry(manifest.parent) for manifest in found]}


def _drafters() -> list[dict[str, Any]]:
    from redrafter.models import ASSETS

    return [_entry(config.parent) for config in sorted(ASSETS.glob("*/config.json"))]


def _entry(folder: Path) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return {"name": folder.name, "mib": round(size / 2**20, 1)}


def _lines(facts: dict[str, Any]) -> list[str]:
    def names(entries: list[dict[str, Any]]) -> str:
        return ", ".join(f"{e['name']} ({e['mib']} MiB)" for e in entries) or "none"

    said = {True: "yes", False: "no"}
    device, cpu, cache = facts["device"], facts["cpu"], facts["cache"]
    return [
        f"redrafter  {facts['redrafter']}, Python {facts['python']}, {facts['platform']}",
        "packages   " + ", ".join(f"{name} {found or 'missing'}" for name, found in facts["packages"].items()),
        f"device     auto is {device['auto']} with {device['dtype_auto']}",
        f"gpu        {_gpu(device)}",
        f"cpu        {cpu['cores']} cores, {cpu['threads']} threads, {cpu['capability']}, "
        f"packed bfloat16 {said[cpu['bfloat16']]}, exact for trees {said[cpu['bfloat16_exact']]}",
        f"cache      {cache['folder']}: {names(cache['models'])}",
        f"drafters   {names(facts['drafters'])}",
    ]


def _gpu(device: dict[str, Any]) -> str:
    """The GPUs, or the one thing that is missing."""
    if device["cuda_trouble"]:
        return f"none: {device['cuda_trouble']}"
    driver = (device["driver"] or "of unknown version").splitlines()[0]
    cards = ", ".join(f"{c['name']} ({c['memory_gib']} GiB)" for c in device["cuda"])
    return f"{cards}, driver {driver}; kernels: {device['kernels_trouble'] or 'can be compiled'}"
