"""Who was judged, and where: what a reader has to know before a verdict means anything."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from fusecheck.report.record import Part

EMULATED = "emulated"
KERNEL_PACKAGES = ("flashinfer-python", "tensorrt-llm", "vllm", "sglang-kernel", "tokenspeed-kernel", "triton")
"""The distributions that bring kernels: a record says which were there."""


def judged(part: Part) -> str:
    """The kernels of the kernel question in words: `13 emulated dataflows on this CPU, tp 2, 4; no real kernel`."""
    names = list(dict.fromkeys(str(subject["backend"]) for subject in part.summary.get("subjects", [])))
    emulated = [name for name in names if name.partition(":")[0] == EMULATED]
    real = [name for name in names if name not in emulated]
    sizes = ", ".join(map(str, sorted({subject["world_size"] for subject in part.summary.get("subjects", [])})))
    known = part.environment.get("kernels") or {}
    told = [f"{name} ({known[name]})" if name in known else name for name in real]
    if emulated:
        flows = "1 emulated dataflow" if len(emulated) == 1 else f"{len(emulated)} emulated dataflows"
        told.append(f"{flows} on this CPU")
    return f"{' and '.join(told)}, tp {sizes}" + ("; no real kernel" if told and not real else "")


def machine(environment: dict[str, Any]) -> str:
    """The machine in one line: GPUs with their driver, or that there is none, and the versions that matter."""
    gpus = [str(gpu) for gpu in environment.get("gpus") or []]
    kinds = [f"{gpus.count(gpu)} × {gpu}" for gpu in dict.fromkeys(gpus)]
    where = ", ".join(kinds) if kinds else "no GPU"
    driver = f", driver {environment['driver']}" if environment.get("driver") else ""
    cpus = f"{environment.get('cpus')} CPU cores, {environment.get('platform', '')}"
    packages = environment.get("packages") or {}
    versions = [f"{name} {packages[name]}" for name in ("fusecheck", "torch", *KERNEL_PACKAGES) if packages.get(name)]
    return "; ".join(filter(None, [where + driver, cpus, ", ".join(versions)]))


def kernels(summary: dict[str, Any]) -> dict[str, str]:
    """The version of each kernel that a package other than Fusecheck brings, by the name of its backend."""
    names = {str(subject["backend"]) for subject in summary.get("subjects") or []}
    modules = {name: name.partition(":")[0].partition(".")[0] for name in names if "." in name or ":" in name}
    owners = metadata.packages_distributions() if modules else {}
    found = {name: owners[module][0] for name, module in sorted(modules.items()) if module in owners}
    return {name: f"{owner} {metadata.version(owner)}" for name, owner in found.items() if owner != "fusecheck"}
