"""What is said of memory is what the operating system says, and what tensors take is counted to the byte."""

import math
import os
import sys

import psutil
import pytest
import torch

from tracknet.memory.meter import (
    LiveBytes,
    available_bytes,
    count_flushes,
    counts,
    measure_memory,
    reset_peak,
)
from tracknet.memory.mmap import to_mmap

CPU = torch.device("cpu")


def test_on_a_cpu_memory_is_what_the_process_has_of_the_machine():
    found = measure_memory(CPU)
    assert list(found) == ["allocated_gb", "cached_gb", "peak_gb"]
    assert (
        found["allocated_gb"] == found["cached_gb"] == pytest.approx(psutil.Process().memory_info().rss / 1e9, rel=0.05)
    )
    resource = pytest.importorskip("resource")
    assert found["peak_gb"] == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, rel=0.05)
    assert found["peak_gb"] >= 0.99 * found["allocated_gb"]


def test_a_peak_stays_when_what_made_it_is_gone():
    before = measure_memory(CPU)["allocated_gb"]
    content = torch.ones(50_000_000)
    there = measure_memory(CPU)["allocated_gb"]
    del content
    reset_peak(CPU)  # which a CPU's cannot be
    after = measure_memory(CPU)
    assert there > before + 0.15 and after["allocated_gb"] < there - 0.15 and after["peak_gb"] > there - 0.01


def test_a_system_without_proc_says_what_it_had_at_most(monkeypatch):
    def missing(path, *args, **kwargs):
        raise FileNotFoundError(path)

    monkeypatch.setattr("builtins.open", missing)
    found = measure_memory(CPU)
    assert found["allocated_gb"] == found["cached_gb"] == found["peak_gb"] > 0.01


def test_a_system_without_rusage_says_that_it_does_not_know(monkeypatch):
    monkeypatch.setattr("tracknet.memory.meter.resource", None)
    found = measure_memory(CPU)
    assert list(found) == ["allocated_gb", "cached_gb", "peak_gb"] and all(map(math.isnan, found.values()))
    assert 0 < available_bytes(CPU) <= psutil.virtual_memory().total


def test_macos_tells_a_peak_in_bytes(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(sys, "platform", "darwin")
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert measure_memory(CPU)["peak_gb"] == pytest.approx(maximum / 1e9, rel=0.05)


def test_on_a_gpu_memory_is_what_its_allocator_says(monkeypatch):
    device, reset = torch.device("cuda", 1), []

    def says(name, value):
        monkeypatch.setattr(torch.cuda, name, {device: value}.__getitem__)

    says("memory_allocated", 3 * 10**9)
    says("memory_reserved", 5 * 10**9)
    says("max_memory_allocated", 4 * 10**9)
    says("mem_get_info", (10**9, 80 * 10**9))
    says("memory_stats", {"num_alloc_retries": 7})
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    assert measure_memory(device) == {"allocated_gb": 3.0, "cached_gb": 5.0, "peak_gb": 4.0}
    assert available_bytes(device) == 3 * 10**9  # what is free, and what the allocator holds for nobody
    assert count_flushes(device) == 7
    reset_peak(device)
    assert reset == [device]


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Writes the files of a container's memory limit; without them it is a machine that has none."""
    monkeypatch.setattr("tracknet.memory.meter.Path", {"/sys/fs/cgroup": tmp_path}.__getitem__)

    def write(limit, used, stat):
        for name, text in (("max", limit), ("current", used), ("stat", stat)):
            (tmp_path / f"memory.{name}").write_text(f"{text}\n")

    return write


def test_what_is_available_is_what_the_machine_and_the_container_leave(group):
    machine = psutil.virtual_memory().available
    assert available_bytes(CPU) == pytest.approx(machine, rel=0.2)  # no container
    group(70_000_000, 50_000_000, "anon 30\ninactive_file 10000000\nactive_file 5")
    assert available_bytes(CPU) == 30_000_000  # the cache of files gives way
    group(70_000_000, 50_000_000, "anon 30")
    assert available_bytes(CPU) == 20_000_000
    group(70_000_000, 90_000_000, "inactive_file 1")
    assert available_bytes(CPU) == 0
    for limit, used, stat in (("max", 50, "inactive_file 1"), ("many", 50, "inactive_file 1"), (1, 2, "x")):
        group(limit, used, stat)
        assert available_bytes(CPU) == pytest.approx(machine, rel=0.2)


def test_what_is_available_ends_with_the_address_space(group):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + 2**26
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        found = available_bytes(CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert 2**25 < found <= 2**26


def test_a_cpu_gives_no_cache_back():
    assert count_flushes(CPU) == 0


def test_what_takes_memory_of_a_device(tmp_path):
    real, meta = torch.ones(3), torch.ones(3, device="meta")
    assert counts(real, None) and counts(real, "cpu") and not counts(real, "cuda")
    assert not counts(meta, None) and not counts(meta, "meta")
    assert not counts(to_mmap(real, tmp_path), None) and os.listdir(tmp_path) == []


def test_live_bytes_are_those_of_new_storages_and_the_peak_is_their_largest_sum():
    x = torch.ones(1000)
    with LiveBytes([x]) as meter:
        a = x + 1
        assert (meter.live, meter.peak) == (4000, 4000)
        views = a[:10], a.view(10, 100), x[5:]
        assert meter.live == 4000
        b = torch.ones(500, dtype=torch.float64)
        assert (meter.live, meter.peak) == (8000, 8000)
        del a
        assert meter.live == 8000  # the views are still there
        del views
        assert (meter.live, meter.peak) == (4000, 8000)
        c = torch.ones(10, dtype=torch.uint8)
        assert (meter.live, meter.peak) == (4010, 8000)
        parts = x.sort()
        assert (meter.live, meter.peak) == (4010 + 4000 + 8000, 16010)
        del b, c, parts
        torch.add(x, 1, out=x)
        assert meter.live == 0
    after = torch.ones(1000)
    assert meter.live == 0 and meter.peak == 16010 and after.numel() == 1000


def test_live_bytes_of_another_device_are_none():
    with LiveBytes(device_type="cuda") as meter:
        torch.ones(1000)
    with LiveBytes() as everything:
        kept = torch.ones(1000, device="meta")
    assert meter.peak == everything.peak == 0 and kept.is_meta


def test_what_existed_counts_where_it_was_not_passed_in():
    x = torch.ones(1000)
    with LiveBytes() as meter:
        view = x[:5]
        assert meter.live == 4000
        del view, x
        assert (meter.live, meter.peak) == (0, 4000)
