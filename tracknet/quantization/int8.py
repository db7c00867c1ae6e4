"""LLM.int8 linear layers (Dettmers et al., NeurIPS 2022) on bitsandbytes' operators.

``Linear8bitLt`` of bitsandbytes keeps its full-precision input alive until backward, does not accept 4-D input on some
devices, and cannot load a state after a forward. The layer here saves only codes and scales for backward, accepts input
of any rank, and its state consists of two plain tensors.
"""

from __future__ import annotations

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from tracknet.quantization import int8_backward, int8_cpu, int8_fused
from tracknet.quantization.operators import operator
from tracknet.quantization.precision import Int8Kernel

ROWS = 8192  # rows that are multiplied at once by the operators of bitsandbytes


def output_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a linear layer's output: that of autocast if it is enabled, else that of the input."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row of ``[n, k]`` by its largest magnitude.

    Returns:
        int8 codes ``[n, k]`` from -127 to 127, and the magnitudes, fp32 ``[n]``.
    """
    # The CUDA kernel accepts only fp16, whose largest value is 65504; the CPU's kernel is fastest in fp32. The clamp
    # follows the conversion, because bf16 would round its bounds to 65536, which is infinite in fp16.
    if x.is_cuda:
        x = x if x.dtype == torch.float16 else x.half().clamp(-65504, 65504)
    codes, scale, _ = bnb.int8_vectorwise_quant(x if x.is_cuda else x.float())
    return codes, scale


def int8_matmul(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Multiply by a quantized weight, with both operands in int8.

    Args:
        x: floating point ``[n, k]``.
        codes: int8 weight ``[m, k]``.
        scale: largest magnitude of each row of the weight, fp32 ``[m]``.

    Returns:
        ``[n, m]``, fp16 on CUDA and fp32 on other devices.
    """
    x_codes, x_scale = quantize_rows(x)
    product = torch.ops.bitsandbytes.int8_linear_matmul(x_codes, codes)
    if x.is_cuda:
        return torch.ops.bitsandbytes.int8_mm_dequant(product, x_scale, scale, dtype=torch.float16)
    return product.float().mul_(x_scale[:, None]).mul_(scale / 127**2)


def _multiply(rows: Tensor, codes: Tensor, scale: Tensor, threshold: float) -> Tensor:
    """Multiply in int8, except activations of at least the threshold, which are multiplied in full precision.

    LLM.int8 (sec. 3.2) treats the whole column of such an outlier in full precision, so the result of a frame depends
    on the other frames in its batch. Here each value is an outlier or not by itself, so batches can be split. The other
    values of the column lose no precision, because each row is quantized by the largest of its remaining values.

    Args:
        rows: floating point ``[n, k]``.
        codes: int8 weight ``[m, k]``.
        scale: largest magnitude of each row of the weight, fp32 ``[m]``.
        threshold: smallest magnitude of an outlier; 0 to multiply everything in int8.

    Returns:
        ``[n, m]``, fp32 if there are outliers, else in the dtype of ``int8_matmul``.
    """
    if threshold > 0:
        is_outlier = rows.abs() >= threshold
        columns = is_outlier.any(dim=0).nonzero().flatten()  # on a GPU, the host waits here for the number of columns
        if columns.numel():
            # Outliers are 0 in the int8 product. Their columns are multiplied in fp32 and added.
            out = int8_matmul(rows.masked_fill(is_outlier, 0), codes, scale)
            weight = codes[:, columns].float() * (scale / 127)[:, None]
            return out.float() + (rows[:, columns] * is_outlier[:, columns]).float() @ weight.T
    return int8_matmul(rows, codes, scale)


def _runs_on_cpu(x: Tensor) -> bool:
    """Return whether to use the product of ``int8_cpu``.

    It requires a CPU with AVX-512 and tensors with content. When shapes are traced, for memory planning or by
    ``torch.compile``, the operators of the GPU are used instead.
    """
    return (
        x.device.type == "cpu"
        and not isinstance(x, FakeTensor)
        and not torch.compiler.is_compiling()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def _is_of_gpu(x: Tensor) -> bool:
    """Return whether a tensor is on a GPU, or is a fake tensor that stands for one (in memory planning)."""
    return x.is_cuda or isinstance(x, FakeTensor)


def _weight_gradient(grad: Tensor, rows: Tensor) -> Tensor:
    """Return ``grad.T @ rows`` in fp32.

    Args:
        grad: gradient of the output, ``[n, m]``.
        rows: input, ``[n, k]``.
    """
    # On a GPU, multiply in the 16 bits of the gradient, as autocast does: its fp32 products are many times slower.
    if grad.dtype != torch.float32 and _is_of_gpu(grad):
        return (grad.T @ rows.to(grad.dtype)).float()
    return grad.float().T @ rows.float()


@operator("int8_linear")
def _linear(
    rows: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    threshold: float,
    kernel: str,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply by a quantized weight and add a bias, with the implementation for the device.

    Args:
        rows: floating point ``[n, k]``, contiguous.
        codes: int8 weight ``[m, k]``.
        scale: largest magnitude of each row of the weight, fp32 ``[m]``.
        bias: bias ``[m]``, or ``None``.
        threshold: smallest magnitude of an outlier; 0 to multiply everything in int8.
        kernel: implementation on a GPU.
        dtype: dtype of the result.

    Returns:
        ``[n, m]`` of ``dtype``.
    """
    if kernel == "triton" and _is_of_gpu(rows) and not _runs_on_cpu(rows):
        return int8_fused.multiply(rows, codes, scale, bias, threshold, dtype)
    out = rows.new_empty(len(rows), len(codes), dtype=dtype)
    if _runs_on_cpu(rows):
        int8_cpu.multiply(rows, codes, scale, bias, threshold, out)
        return out
    # In parts, because codes, int32 products and fp32 results take more memory than input and output.
    for part, part_out in zip(rows.split(ROWS), out.split(ROWS)):
        part_out.copy_(_multiply(part, codes, scale, threshold))
    if bias is not None:
        out += bias.to(dtype)
    return out


def _input_gradient_in_int8(grad: Tensor, codes: Tensor, scale: Tensor, kernel: Int8Kernel) -> Tensor:
    """Return the gradient of the input in int8; the arguments are those of ``int8_backward.input_gradient``."""
    if _runs_on_cpu(grad):
        out = grad.new_empty(len(grad), codes.shape[1])
        int8_cpu.multiply_gradient(grad, codes, scale, out)
        return out
    if kernel == "triton" and _is_of_gpu(grad):
        # The kernels of forward, for the transposed weight: its rows have no scale, which the factor 127 cancels.
        ones = torch.full_like(codes[0], 127, dtype=torch.float32)
        return int8_fused.multiply(grad * (scale / 127), codes.t().contiguous(), ones, None, 0.0, grad.dtype)
    return int8_backward.input_gradient(grad, codes, scale)


class Int8MatMul(torch.autograd.Function):
    """Int8 product with a quantized weight, and its gradients for input, weight and bias.

    ``weight`` only receives a gradient, that of the product in full precision (straight-through); ``None`` if the
    weight is frozen. The values that are multiplied are ``codes`` and ``scale``.
    """

    @staticmethod
    def forward(ctx, x, weight, codes, scale, bias, threshold, kernel, int8_backward):
        dtype = output_dtype(x)
        # The operators read memory row by row, so a transposed input is copied. Any rank becomes a matrix.
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        # Without autocast, which would run the fp32 products of outliers in 16 bits.
        with torch.autocast(x.device.type, enabled=False):
            out = _linear(rows, codes, scale, bias, threshold, kernel, dtype)
        # Codes and scales of a frozen layer exist anyway, so saving them takes no memory. The input is saved only if
        # the weight trains, and of the bias only its dtype is needed.
        ctx.trains_weight = weight is not None and weight.requires_grad
        ctx.bias_dtype = bias.dtype if bias is not None else None
        ctx.kernel, ctx.int8_backward = kernel, int8_backward
        ctx.save_for_backward(codes, scale, *([rows] if ctx.trains_weight else []))
        return out.reshape(*x.shape[:-1], codes.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        codes, scale, *rows = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            if ctx.int8_backward:
                grad_x = _input_gradient_in_int8(flat.contiguous(), codes, scale, ctx.kernel)
            else:
                # Scale the weight rather than the gradient, which has many times as many values.
                grad_x = flat @ (codes * (scale / 127)[:, None]).to(flat.dtype)
            grad_x = grad_x.reshape(*grad.shape[:-1], codes.shape[1])
        if ctx.trains_weight:
            multiply = int8_backward.weight_gradient if ctx.int8_backward else _weight_gradient
            grad_weight = multiply(flat, rows[0])
        if ctx.needs_input_grad[4]:
            # In 16 bits a long sum would stop growing: 256 + 1 is 256 in bf16.
            grad_bias = flat.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        # In the order of the arguments of forward: x, weight, codes, scale, bias, and three settings.
        return grad_x, grad_weight, None, None, grad_bias, None, None, None


class Int8Linear(nn.Linear):
    """Row-wise int8 linear layer.

    A frozen layer stores an int8 ``weight`` and one fp32 ``scale`` per row, a quarter of the size in fp32. With
    ``has_fp16_weight`` it keeps a floating-point weight that is trained with a straight-through gradient and quantized
    again in every forward, which saves no memory.

    Args:
        linear: layer to quantize; its bias is shared and can be trained.
        threshold: smallest magnitude of activations that are multiplied in full precision; 0 for none.
        has_fp16_weight: whether to keep and train the floating-point weight.
        kernel: implementation of the product on a GPU.
        int8_backward: whether to multiply gradients in int8 too.

    Attributes:
        storage_dtype: format of the weight, for summaries.
    """

    storage_dtype = "int8"
    scale: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        threshold: float,
        has_fp16_weight: bool,
        kernel: Int8Kernel = "bitsandbytes",
        int8_backward: bool = False,
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.threshold = threshold
        self.kernel = kernel
        self.int8_backward = int8_backward
        self.has_fp16_weight = has_fp16_weight
        self.bias = linear.bias
        if has_fp16_weight:
            self.weight = linear.weight
        else:
            codes, scale = quantize_rows(linear.weight.detach())
            self.weight = nn.Parameter(codes, requires_grad=False)
            self.register_buffer("scale", scale)  # largest magnitude of each row, fp32 [out_features]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        # Quantize the trained weight again, because the optimizer may have changed it since the last forward.
        if self.has_fp16_weight:
            codes, scale = quantize_rows(self.weight.detach())
            return self._multiply(x, self.weight, codes, scale)
        return self._multiply(x, None, self.weight, self.scale)

    def _multiply(self, x: Tensor, weight: Tensor | None, codes: Tensor, scale: Tensor) -> Tensor:
        """Apply ``Int8MatMul`` with the settings of the layer; ``weight`` receives the gradient of the weight."""
        return Int8MatMul.apply(x, weight, codes, scale, self.bias, self.threshold, self.kernel, self.int8_backward)

    @property
    def W_q(self) -> Tensor:
        """Codes of the weight. With an attribute of this name, peft calls ``dequantize`` to read the weight (DoRA)."""
        return self.weight

    def dequantize(self) -> Tensor:
        """Return the weight that the product uses, fp32 ``[out_features, in_features]``."""
        codes: Tensor = self.weight
        scale = self.scale if not self.has_fp16_weight else None
        if scale is None:
            codes, scale = quantize_rows(self.weight.detach())
        return codes.float() * (scale / 127)[:, None]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold}"
