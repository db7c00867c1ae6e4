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
def test_a_cpu_computes_in_what_it_really_has(monkeypatch, said, wanted, native, given):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: native)
    assert resolve_dtype(wanted, CPU, "training.precision") is precision.DTYPES[given]
    assert len(said) == (wanted != given)
    for line in said:
        assert "training.precision" in line and given in line and "\n" not in line


def test_a_gpu_without_bf16_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    with pytest.raises(
        UserError, match=r"training\.precision=bf16 and training\.device=cuda: T4 .* set training\.precision=fp16"
    ):
        resolve_dtype("bf16", CUDA, "training.precision")
    assert resolve_dtype("fp16", CUDA, "training.precision") is torch.float16


@pytest.mark.parametrize(
    ("capabilities", "has"),
    [
        ({}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, False),
    ],
)
def test_a_cpu_has_bf16_where_it_says_so(monkeypatch, capabilities, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert precision.cpu_has_bf16() is has
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert precision.cpu_has_bf16() is False  # of an older torch nothing can be known


@pytest.mark.parametrize("wanted", ["fp16", "bf16", "fp32"])
def test_a_gpu_computes_in_what_was_asked_for(monkeypatch, wanted):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation) or True
    )
    assert resolve_dtype(wanted, CUDA, "training.precision") is precision.DTYPES[wanted]
    assert asked == ([False] if wanted == "bf16" else [])  # emulated, it would be slower than fp32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    if wanted != "bf16":
        assert resolve_dtype(wanted, CUDA, "training.precision") is precision.DTYPES[wanted]


def test_nothing_is_computed_on_meta(monkeypatch, said):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    assert resolve_dtype("fp16", torch.device("meta"), "training.precision") is torch.float16 and not said


def test_names_of_dtypes_are_those_of_torch():
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    assert wanted == precision.DTYPES
