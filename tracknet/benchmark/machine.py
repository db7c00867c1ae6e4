"""Description of the machine that a benchmark ran on."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

import psutil
import torch


def describe_machine(device: torch.device) -> dict[str, object]:
    """Return a description of the machine, as stored in ``result.json``.

    Returns:
        ``device`` (name of the GPU, or cores and CPU), ``cpu``, ``cores`` (available to this process), ``threads`` (of
        torch), ``memory_gb``, ``gpu_gb`` and ``cuda`` (``None`` without a GPU), ``date`` and ``versions``.
    """
    cpu = platform.processor() or platform.machine()
    # On Linux, platform.processor() returns the architecture at best; /proc/cpuinfo contains the name of the model.
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
        cpu = match[1].strip() if match else cpu
    except OSError:
        pass  # no /proc on this system
    # The affinity mask respects taskset and containers, os.cpu_count() does not.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": gpu.name if gpu else f"{cores} cores of {cpu}",
        "cpu": cpu,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu_gb": round(gpu.total_memory / 1e9, 1) if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("tracknet", "torch", "bitsandbytes", "peft", "transformers")},
    }
