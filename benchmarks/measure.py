"""Seconds, peak memory and a record of both, alike on a CPU and on a GPU."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).parents[1]
MIB = 2**20
FLUSHED_MIB = 256  # several times the last-level cache of any GPU


class Clock:
    """Seconds of calls on one device; on a GPU its last-level cache is overwritten before each.

    Args:
        budget_seconds: what the repeats of one measurement may take together.
        least, most: how many repeats there are at the least and at the most.
    """

    def __init__(self, device: torch.device, *, budget_seconds: float, least: int, most: int = 50) -> None:
        self.device = device
        self.budget_seconds, self.least, self.most = budget_seconds, least, most
        self._cache = torch.empty(FLUSHED_MIB * MIB, dtype=torch.int8, device=device) if self._on_gpu else None

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def seconds(self, act: Callable[[], Any], *, share: float = 1.0) -> list[float]:
        """The seconds of each of as many calls as a share of the budget allows, after calls that warm up."""
        act()
        (once,) = self.seconds_of(act, 1)
        affordable = int(share * self.budget_seconds / max(once, 1e-6))
        return self.seconds_of(act, min(self.most, max(self.least, affordable)))

    def seconds_of(self, act: Callable[[], Any], count: int) -> list[float]:
        """The seconds of each of so many calls."""
        # nothing waits between the rounds: while the cache is overwritten, the CPU is already launching the call
        marks = []
        for _ in range(count):
            if self._cache is not None:
                self._cache.zero_()
            start = self._mark()
            act()
            marks.append((start, self._mark()))
        if self._on_gpu:
            torch.cuda.synchronize(self.device)
            return [start.elapsed_time(end) / 1e3 for start, end in marks]
        return [end - start for start, end in marks]

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def peak_mib(act: Callable[[], Any], device: torch.device) -> float:
    """What the allocator held at its peak during a call, less what it held before: exact, the same at every run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        act()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        act()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    live = peak = 0
    for _, change in sorted(changes, key=lambda at: at[0]):
        live += change
        peak = max(peak, live)
    return peak / MIB


def resident_mib(act: Callable[[], Any]) -> float:
    """By how much the resident memory of this process grew at its peak during a call (Linux only).

    Meant for a fresh process: what an earlier call freed may still be resident, and would not be counted.
    """
    Path("/proc/self/clear_refs").write_text("5")  # makes the peak the present value
    before = _status_mib("VmRSS")
    act()
    return _status_mib("VmHWM") - before


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def commit() -> str:
    """The commit of this checkout, and whether what is measured has changes; "unknown" outside of one."""

    def git(*arguments: str) -> str | None:
        run = subprocess.run(("git", *arguments), cwd=REPOSITORY, capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else None

    head = git("rev-parse", "HEAD") if shutil.which("git") else None
    if head is None:
        return "unknown"
    return head + (" with changes" if git("status", "--porcelain", "kernels", "diffdistill") else "")


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = [line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    cores = sorted(os.sched_getaffinity(0))
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} thread(s) on core(s) {cores}"


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


class Record:
    """What has been measured so far, kept as JSON on disk after every row, so that a stopped run keeps what it has."""

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = header
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, section: str, **row: Any) -> dict[str, Any]:
        self.content.setdefault(section, []).append(row)
        self.save()
        print(section, json.dumps({name: _short(value) for name, value in row.items()}), flush=True)
        return row

    def save(self) -> None:
        if self.path is not None:
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.content, indent=1) + "\n")
            partial.replace(self.path)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return f"{len(value)} values" if len(value) > 4 else [_short(item) for item in value]
    return value


def header(device: torch.device, seed: int, **more: Any) -> dict[str, Any]:
    """What must be known to repeat a measurement."""
    return {
        "command": f"python benchmarks/{Path(sys.argv[0]).name} " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "hardware": hardware(device),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "triton", "numpy", "jvp_flash_attention")},
        },
        "seed": seed,
        **more,
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
