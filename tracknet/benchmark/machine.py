"""What it was measured on."""

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
    """Return ``device``, ``cpu``, ``cores``, ``memory_gb``, ``gpu_gb``, versions and the date."""
    cpu = platform.processor() or platform.machine()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
        cpu = found[1].strip() if found else cpu
    except OSError:
        pass  # no /proc on this system
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
