"""LLM.int8 linear layers (Dettmers et al., NeurIPS 2022) on bitsandbytes' operators.

bitsandbytes' own ``Linear8bitLt`` keeps its full-precision input alive through backward, accepts no 4-D input on some
devices, and cannot reload after a forward. This layer saves only codes and scales, takes any rank, and its state is two
plain tensors.
"""

from __future__ import annotations

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from tracknet.quantization import int8_cpu, int8_fused
from tracknet.quantization.precision import Int8Kernel

ROWS = 8192  # that are multiplied at a time


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer would give here: autocast's where it is on, else the input's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row of ``[n, k]`` by its largest magnitude; return int8 codes and that magnitude (fp32 ``[n]``)."""
    # The CUDA kernel takes fp16 only, which ends at 65504; the CPU's is fastest in fp32.
    if x.is_cuda:
        x = x if x.dtype == torch.float16 else x.half().clamp(-65504, 65504)  # in bf16, 65504 is 65536
    codes, scale, _ = bnb.int8_vectorwise_quant(x if x.is_cuda else x.float())
    return codes, scale


def int8_matmul(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Multiply ``[n, k]`` by the quantized weight ``[m, k]``, both sides in int8; fp16 on CUDA, fp32 elsewhere."""
    x_codes, x_scale = quantize_rows(x)
    product = torch.ops.bitsandbytes.int8_linear_matmul(x_codes, codes)
    if x.is_cuda:
        return torch.ops.bitsandbytes.int8_mm_dequant(product, x_scale, scale, dtype=torch.float16)
    return product.float().mul_(x_scale[:, None]).mul_(scale / 127**2)


def _multiply(rows: Tensor, codes: Tensor, scale: Tensor, threshold: float) -> Tensor:
    """Multiply in int8, but activations of at least the threshold in full precision.

    LLM.int8 (sec. 3.2) takes the whole column of such an activation, so that what a frame gives depends on the frames
    that it is batched with. Here each value is judged by itself: batches can be split, and the other values of the
    column lose nothing, since each row is quantized by the largest of what is left in it.
    """
    if threshold > 0:
        large = rows.abs() >= threshold
        columns = large.any(dim=0).nonzero().flatten()
        if columns.numel():
            out = int8_matmul(rows.masked_fill(large, 0), codes, scale)
            weight = codes[:, columns].float() * (scale / 127)[:, None]
            return out.float() + (rows[:, columns] * large[:, columns]).float() @ weight.T
    return int8_matmul(rows, codes, scale)


def _runs_on_cpu(x: Tensor) -> bool:
    """Whether the product is taken here and now by a CPU that can; what is traced (a plan for a GPU, a compiled block)
    is the GPU's way."""
    return (
        x.device.type == "cpu"
        and not isinstance(x, FakeTensor)
        and not torch.compiler.is_compiling()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def _is_of_gpu(x: Tensor) -> bool:
    """Whether a tensor is on a GPU, or stands for one that is (in a plan)."""
    return x.is_cuda or isinstance(x, FakeTensor)


def _weight_gradient(grad: Tensor, rows: Tensor) -> Tensor:
    """Multiply ``grad.T @ rows``, fp32: on a GPU in the gradient's 16 bits, as autocast does, since its fp32 products
    are many times slower."""
    if grad.dtype != torch.float32 and _is_of_gpu(grad):
        return (grad.T @ rows.to(grad.dtype)).float()
    return grad.float().T @ rows.float()


class Int8MatMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, codes, scale, bias, threshold, kernel):
        dtype = output_dtype(x)
        # The operators read memory row by row, so a transposed input is copied.
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        with torch.autocast(x.device.type, enabled=False):
            if _runs_on_cpu(rows):
                out = rows.new_empty(len(rows), len(codes), dtype=dtype)
                int8_cpu.multiply(rows, codes, scale, bias, threshold, out)
            elif kernel == "triton" and _is_of_gpu(rows):
                out = int8_fused.multiply(rows, codes, scale, bias, threshold, dtype)
            else:
                out = rows.new_empty(len(rows), len(codes), dtype=dtype)
                # In parts, because codes, int32 products and fp32 results take more than what goes in and out.
                for part, part_out in zip(rows.split(ROWS), out.split(ROWS)):
                    part_out.copy_(_multiply(part, codes, scale, threshold))
                if bias is not None:
                    out += bias.to(dtype)
        ctx.trains_weight = weight is not None and weight.requires_grad
        ctx.bias_dtype = bias.dtype if bias is not None else None
        ctx.save_for_backward(codes, scale, *([rows] if ctx.trains_weight else []))
        return out.reshape(*x.shape[:-1], codes.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        codes, scale, *rows = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            # The weight is scaled rather than the gradient, of which there is many times as much.
            grad_x = flat @ (codes * (scale / 127)[:, None]).to(flat.dtype)
            grad_x = grad_x.reshape(*grad.shape[:-1], codes.shape[1])
        if ctx.trains_weight:
            grad_weight = _weight_gradient(flat, rows[0])
        if ctx.needs_input_grad[4]:
            grad_bias = flat.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_weight, None, None, grad_bias, None, None


class Int8Linear(nn.Linear):
    """Linear layer whose product is taken in int8.

    Frozen, it stores int8 ``weight`` and fp32 ``scale`` per row, a quarter of fp32. With ``has_fp16_weight`` it keeps a
    floating-point weight that trains, quantized afresh in every forward (straight-through gradient): no memory is
    saved.

    Attributes:
        threshold: activations of at least this magnitude take the full-precision path; 0 = none do.
        kernel: what multiplies on a GPU.
        storage_dtype: how the weight is kept, for people.
    """

    storage_dtype = "int8"
    scale: Tensor

    def __init__(self, linear: nn.Linear, threshold: float, has_fp16_weight: bool, kernel: Int8Kernel = "bitsandbytes"):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.threshold = threshold
        self.kernel = kernel
        self.has_fp16_weight = has_fp16_weight
        self.bias = linear.bias
        if has_fp16_weight:
            self.weight = linear.weight
        else:
            codes, scale = quantize_rows(linear.weight.detach())
            self.weight = nn.Parameter(codes, requires_grad=False)
            self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        if self.has_fp16_weight:
            codes, scale = quantize_rows(self.weight.detach())
            return Int8MatMul.apply(x, self.weight, codes, scale, self.bias, self.threshold, self.kernel)
        return Int8MatMul.apply(x, None, self.weight, self.scale, self.bias, self.threshold, self.kernel)

    @property
    def W_q(self) -> Tensor:
        """The codes, by the name whose presence tells peft to call ``dequantize`` where it needs the weight (DoRA)."""
        return self.weight

    def dequantize(self) -> Tensor:
        """Return the weight that is multiplied by, fp32 ``[out, in]``."""
        codes: Tensor = self.weight
        scale = self.scale if not self.has_fp16_weight else None
        if scale is None:
            codes, scale = quantize_rows(self.weight.detach())
        return codes.float() * (scale / 127)[:, None]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold}"
