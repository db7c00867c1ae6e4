"""TFLOP/s of the products that a step consists of: 16 bit, int8 as bitsandbytes and our kernels do it, NF4, and what
the card could do."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from on_gpu.session import Session
from tracknet.quantization import int8, int8_fused
from tracknet.quantization.nf4 import Linear4bit

# Rows of a batch of 16 windows at 512x288, input and output channels of ViT-S, -B and -L.
SHAPES = ((37344, 384, 1536), (37344, 1536, 384), (37344, 768, 3072), (37344, 1024, 4096), (37344, 4096, 1024))


def measure_kernels(session: Session) -> None:
    """Put a row for each shape."""
    for shape in SHAPES:
        item = "kernels {}x{}->{}".format(*shape)
        if session.has_time(10, item):
            with session.guarded(item):
                session.clean()
                session.put("kernel_tflops", shape=item.removeprefix("kernels "), **_measure_shape(session, *shape))


def _measure_shape(session: Session, rows: int, inputs: int, outputs: int) -> dict:
    torch.manual_seed(0)
    device, dtype = session.device, torch.bfloat16
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    x[::97, 5] = 20  # outliers, which LLM.int8 multiplies apart
    weight = torch.randn(outputs, inputs, device=device) * 0.02
    gradient = torch.randn(rows, outputs, device=device, dtype=dtype) * 1e-3
    codes, scale = int8.quantize_rows(weight)
    row: dict[str, object] = {}

    def rate(name: str, action: Callable[[], object]) -> None:
        # One product that this card or library lacks leaves the others.
        try:
            row[name] = round(2 * rows * inputs * outputs / session.time_ms(action) / 1e9, 1)
        except Exception as error:
            row[name] = repr(error)[:80]

    weight_16 = weight.to(dtype)
    rate("bf16", lambda: F.linear(x, weight_16))
    x_codes = int8_fused.quantize(x, 0.0)[0]
    rate("int8_raw", lambda: torch._int_mm(x_codes, codes.T))
    for threshold in (0.0, 6.0):
        rate(f"bitsandbytes_t{threshold:g}", lambda t=threshold: int8._multiply(x.half(), codes, scale, t))
        rate(f"triton_t{threshold:g}", lambda t=threshold: int8_fused.multiply(x, codes, scale, None, t, dtype))
    row["quantize_us"] = round(session.time_ms(lambda: int8_fused.quantize(x, 0.0)) * 1e3, 1)
    rate("int8_backward", lambda: gradient @ (codes * (scale / 127)[:, None]).to(dtype))
    layer = Linear4bit(torch.nn.Linear(inputs, outputs, device=device), "nf4", dtype, True).to(device)
    state = layer._state()
    rate("nf4_forward", lambda: F.linear(x, layer.dequantize(dtype, state)))
    row["nf4_dequantize_us"] = round(session.time_ms(lambda: layer.dequantize(dtype, state)) * 1e3, 1)
    rate("fp8_raw", _fp8_product(x, weight))
    return row


def _fp8_product(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a product in fp8 with a scale for each row, as the hardware offers it."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scales = [t.abs().amax(1, keepdim=True).float() / largest for t in (x, weight)]
    a, b = ((t.float() / s).to(torch.float8_e4m3fn) for t, s in zip((x, weight), scales))
    return lambda: torch._scaled_mm(
        a, b.T, scale_a=scales[0], scale_b=scales[1].T.contiguous(), out_dtype=torch.bfloat16
    )
