import pytest
import torch

from tracknet.errors import UserError
from tracknet.quantization import precision
from tracknet.quantization.precision import resolve_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("wanted", "native", "given"),
    [
        ("fp32", True, "fp32"),
        ("fp32", False, "fp32"),
        ("bf16", True, "bf16"),
        ("bf16", False, "fp32"),
        ("fp16", True, "bf16"),
        ("fp16", False, "fp32"),
    ],
)
def test_a_cpu_computes_in_what_it_really_has(monkeypatch, wanted, native, given):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: native)
    dtype, note = resolve_dtype(wanted, CPU, "training.precision")
    assert dtype is precision.DTYPES[given]
    assert (note is None) == (wanted == given)
    if note:
        assert "training.precision" in note and given in note and "\n" not in note


def test_a_gpu_without_bf16_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    with pytest.raises(
        UserError, match=r"training\.precision=bf16 and training\.device=cuda: T4 .* set training\.precision=fp16"
    ):
        resolve_dtype("bf16", CUDA, "training.precision")
    assert resolve_dtype("fp16", CUDA, "training.precision") == (torch.float16, None)
