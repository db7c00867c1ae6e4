"""TFLOP/s of the matrix products of a training step.

Compares 16 bit, int8 with the kernels of bitsandbytes and with those of this project, NF4, and the raw int8 and fp8
products that the GPU offers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from on_gpu.session import Session
from tracknet.quantization import int8, int8_fused
from tracknet.quantization.nf4 import Linear4bit

# Rows (tokens of a batch of 16 windows at 512x288), input and output channels of ViT-S, ViT-B and ViT-L.
SHAPES = ((37344, 384, 1536), (37344, 1536, 384), (37344, 768, 3072), (37344, 1024, 4096), (37344, 4096, 1024))


def measure_kernels(session: Session) -> None:
    """Write one row per shape."""
    for shape in SHAPES:
        item = "kernels {}x{}->{}".format(*shape)
        if session.has_time(10, item):
            with session.guarded(item):
                session.clean()
                session.put("kernel_tflops", shape=item.removeprefix("kernels "), **_measure_shape(session, *shape))


def _measure_shape(session: Session, rows: int, inputs: int, outputs: int) -> dict:
    """Return TFLOP/s by kernel, and the times of quantizing and dequantizing in microseconds.

    Args:
        session: session of the measurement.
        rows: rows of the input.
        inputs: input channels.
        outputs: output channels.
    """
    torch.manual_seed(0)
    device, dtype = session.device, torch.bfloat16
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    x[::97, 5] = 20  # outliers, which LLM.int8 multiplies separately in 16 bit
    weight = torch.randn(outputs, inputs, device=device) * 0.02
    gradient = torch.randn(rows, outputs, device=device, dtype=dtype) * 1e-3
    codes, scale = int8.quantize_rows(weight)
    row: dict[str, object] = {}

    def rate(name: str, action: Callable[[], object]) -> None:
        # A product that this GPU or library does not support is recorded as its error, and the others still run.
        try:
            row[name] = round(2 * rows * inputs * outputs / session.time_ms(action) / 1e9, 1)
        except Exception as error:
            row[name] = repr(error)[:80]

    # 16 bit and int8, forward.
    weight_16 = weight.to(dtype)
    rate("bf16", lambda: F.linear(x, weight_16))
    x_codes = int8_fused.quantize(x, 0.0)[0]
    rate("int8_raw", lambda: torch._int_mm(x_codes, codes.T))
    for threshold in (0.0, 6.0):
        rate(f"bitsandbytes_t{threshold:g}", lambda t=threshold: int8._multiply(x.half(), codes, scale, t))
        rate(f"triton_t{threshold:g}", lambda t=threshold: int8_fused.multiply(x, codes, scale, None, t, dtype))
    row["quantize_us"] = round(session.time_ms(lambda: int8_fused.quantize(x, 0.0)) * 1e3, 1)
    # Backward with respect to the input: the int8 weight is dequantized to 16 bit first.
    rate("int8_backward", lambda: gradient @ (codes * (scale / 127)[:, None]).to(dtype))
    # NF4 dequantizes the weight and multiplies in 16 bit.
    layer = Linear4bit(torch.nn.Linear(inputs, outputs, device=device), "nf4", dtype, True).to(device)
    state = layer._state()
    rate("nf4_forward", lambda: F.linear(x, layer.dequantize(dtype, state)))
    row["nf4_dequantize_us"] = round(session.time_ms(lambda: layer.dequantize(dtype, state)) * 1e3, 1)
    rate("fp8_raw", _fp8_product(x, weight))
    return row


def _fp8_product(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a function that computes the product in fp8 with one scale per row, as supported by the hardware."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scales = [t.abs().amax(1, keepdim=True).float() / largest for t in (x, weight)]
    a, b = ((t.float() / s).to(torch.float8_e4m3fn) for t, s in zip((x, weight), scales))
    return lambda: torch._scaled_mm(
        a, b.T, scale_a=scales[0], scale_b=scales[1].T.contiguous(), out_dtype=torch.bfloat16
    )
