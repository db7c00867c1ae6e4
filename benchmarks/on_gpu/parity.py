"""Numerical parity on the GPU: int8 with each kernel against float64, and NF4 against the CPU."""

from __future__ import annotations

import torch

from on_gpu.session import Session
from tracknet.quantization import int8
from tracknet.quantization.nf4 import Linear4bit

SHAPES = ((384, 1536), (1536, 384), (1024, 4096), (200, 72))  # input and output channels
KERNELS = ("bitsandbytes", "triton")


def measure_parity(session: Session) -> None:
    """Write rows with the largest relative errors, the propagation of NaN and infinity, and the difference of NF4."""
    for measure in (_int8, _special_values, _nf4):
        with session.guarded(f"parity {measure.__name__.strip('_')}"):
            measure(session)


def _int8(session: Session) -> None:
    """Write the largest relative error of int8 layers by kernel, dtype and threshold, against float64."""
    worst: dict[str, float] = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for inputs, outputs in SHAPES:
            linear = torch.nn.Linear(inputs, outputs, device=session.device)
            codes, scale = int8.quantize_rows(linear.weight.detach())
            weight = codes.double() * (scale.double() / 127)[:, None]
            for rows in (1, 129, 9336):
                torch.manual_seed(rows)
                x = torch.randn(rows, inputs, device=session.device).to(dtype)
                x[rows // 2, inputs // 3], x[0, 1] = 30, -9
                exact = x.double() @ weight.T + linear.bias.double()
                for threshold in (0.0, 6.0):
                    for kernel in KERNELS:
                        y = int8.Int8Linear(linear, threshold, False, kernel).to(session.device)(x)
                        error = float((y.double() - exact).norm() / exact.norm())
                        name = f"{kernel}_{str(dtype).removeprefix('torch.')}_t{threshold:g}"
                        # NaN compares false with everything and would be lost in max(), so it counts as infinite.
                        worst[name] = max(worst.get(name, 0.0), error if error == error else float("inf"))
    session.put("parity_int8", **worst)


def _special_values(session: Session) -> None:
    """Write which rows of the output are finite if single rows of the input contain NaN, infinity or 6e4."""
    linear, row = torch.nn.Linear(384, 384, device=session.device), {}
    for kernel in KERNELS:
        for dtype in (torch.float16, torch.bfloat16):
            x = torch.randn(64, 384, device=session.device).to(dtype)
            x[3, 3], x[5, 5], x[7, 7] = float("nan"), float("inf"), 6e4
            y = int8.Int8Linear(linear, 6.0, False, kernel).to(session.device)(x)
            rows = {"nan": y[3], "inf": y[5], "6e4": y[7], "others": y[8:]}
            finite = [name for name, values in rows.items() if bool(values.isfinite().all())]
            row[f"{kernel}_{str(dtype).removeprefix('torch.')}"] = f"finite: {' '.join(finite)}"
    session.put("parity_special", **row)


def _nf4(session: Session) -> None:
    """Write whether NF4 codes quantized on the GPU equal those of the CPU, and the largest difference of the values."""
    linear = torch.nn.Linear(384, 1024)
    on_cpu = Linear4bit(linear, "nf4", torch.bfloat16, True)
    moved = torch.nn.Linear(384, 1024, device=session.device)
    moved.load_state_dict(linear.state_dict())
    on_device = Linear4bit(moved, "nf4", torch.bfloat16, True)
    values = [layer.dequantize(torch.float32, layer._state()).cpu() for layer in (on_cpu, on_device)]
    session.put(
        "parity_nf4",
        codes_equal=bool(torch.equal(on_cpu.weight.cpu(), on_device.weight.cpu())),
        largest_difference=float((values[0] - values[1]).abs().max()),
    )
