"""A tensor in a file is the same tensor: content, layout, and nothing left behind."""

import os
from pathlib import Path

import pytest
import torch

from tracknet.memory.mmap import is_mapped, to_mmap

PLAIN = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "tensor",
    [
        PLAIN,
        PLAIN.to(memory_format=torch.channels_last),
        PLAIN.transpose(1, 3),
        PLAIN.permute(3, 0, 2, 1),
        torch.ones(()),
        torch.arange(7, dtype=torch.uint8),
        PLAIN.to(torch.bfloat16),
        PLAIN[0, 0].t(),
    ],
)
def test_what_is_dense_is_laid_out_alike(tmp_path, tensor):
    mapped = to_mmap(tensor, tmp_path)
    assert torch.equal(mapped, tensor) and mapped.dtype == tensor.dtype and mapped.stride() == tensor.stride()
    assert is_mapped(mapped) and not is_mapped(tensor)
    assert mapped.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("tensor", [PLAIN[:, :, ::2], PLAIN[:, 1:], PLAIN[:1].expand(4, 3, 4, 5)])
def test_what_has_gaps_or_repeats_becomes_contiguous(tmp_path, tensor):
    mapped = to_mmap(tensor, tmp_path)
    assert torch.equal(mapped, tensor) and mapped.is_contiguous() and is_mapped(mapped)


def test_a_file_lies_in_its_folder_which_is_made_and_is_nameless_at_once(tmp_path):
    folder = tmp_path / "a/b"
    mapped = [to_mmap(PLAIN, folder) for _ in range(2)]
    assert os.listdir(folder) == []
    names = [Path(tensor.untyped_storage().filename) for tensor in mapped]
    assert all(name.parent == folder and name.name.startswith("tensor-") for name in names) and names[0] != names[1]
    mapped[0].zero_()
    assert torch.equal(mapped[1], PLAIN) and mapped[0].sum() == 0


def test_what_is_written_goes_to_the_file(tmp_path):
    """A private mapping would hold every page that was written in memory."""
    if not Path("/proc/self/maps").is_file():
        pytest.skip("looks at the mappings of a process on Linux")
    mapped = to_mmap(torch.ones(100_000), tmp_path)
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= mapped.data_ptr() < last:
            assert line.split()[1] == "rw-s" and str(tmp_path) in line
            break
    else:
        raise AssertionError("not mapped")


@pytest.mark.parametrize(
    ("tensor", "size"), [(torch.ones(10, 3), 120), (torch.ones(7, dtype=torch.uint8), 7), (torch.ones(0), 1)]
)
def test_room_is_taken_before_it_is_used(tmp_path, monkeypatch, tensor, size):
    asked, real = [], os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", lambda handle, *where: asked.append(where) or real(handle, *where))
    to_mmap(tensor, tmp_path)
    assert asked == [(0, size)]


def test_a_full_disk_is_an_error_that_leaves_neither_file_nor_handle(tmp_path, monkeypatch):
    def full(handle, *where):
        handles.append(handle)
        raise OSError(28, "No space left on device")

    handles = []
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        to_mmap(PLAIN, tmp_path)
    assert os.listdir(tmp_path) == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handles[0])
