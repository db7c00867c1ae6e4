"""4-bit linear layers (QLoRA, Dettmers et al., NeurIPS 2023) on bitsandbytes' operators.

The state is plain tensors that load strictly, before and after any number of forwards, and evaluation never repacks the
codes, so training may go on after it.
"""

from __future__ import annotations

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tracknet.quantization.int8 import output_dtype

_STORAGE = {"uint8": torch.uint8, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
BLOCK = 64  # weights that share one scale
NESTED_BLOCK = 256  # scales that share one scale, under double quantization


class _MatMul4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer, *state):
        ctx.layer = layer
        ctx.save_for_backward(*state)
        dtype = output_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            weight = layer.dequantize(layer.compute_dtype, state)
            return F.linear(x.to(layer.compute_dtype), weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        state = ctx.saved_tensors
        # fp16 has no room for gradients that no scaler enlarged; scaled ones come in fp16 themselves.
        unscaled = ctx.layer.compute_dtype == torch.float16 and grad.dtype != torch.float16
        weight = ctx.layer.dequantize(torch.float32 if unscaled else ctx.layer.compute_dtype, state)
        return (grad.to(weight.dtype) @ weight).to(grad.dtype), None, *([None] * len(state))


class Linear4bit(nn.Linear):
    """Frozen linear layer whose weight is stored in 4 bits and multiplied in ``compute_dtype``.

    Attributes:
        quant_type: ``nf4`` or ``fp4``; also as ``storage_dtype``.
        compute_dtype: dtype of the dequantized weight and of the product.
        nested: whether the scales are quantized too (0.5 bit per weight becomes 0.127).

    ``quant_storage`` (uint8, fp16, bf16, fp32) is the dtype that the packed bytes pass for.
    """

    def __init__(
        self,
        linear: nn.Linear,
        quant_type: str,
        compute_dtype: torch.dtype,
        use_double_quant: bool,
        quant_storage: str = "uint8",
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.quant_type = self.storage_dtype = quant_type
        self.compute_dtype = compute_dtype
        self.nested = use_double_quant
        self.bias = linear.bias
        codes, state = bnb.quantize_4bit(
            linear.weight.detach().float().contiguous(),
            blocksize=BLOCK,
            compress_statistics=use_double_quant,
            quant_type=quant_type,
        )
        # The same bytes under another dtype; bitsandbytes itself would drop the last ones where they do not fill an
        # element.
        codes = codes.flatten()
        storage = _STORAGE[quant_storage]
        codes = F.pad(codes, (0, -len(codes) % storage.itemsize))
        self.weight = nn.Parameter(codes.view(storage)[:, None], requires_grad=False)
        self.register_buffer("absmax", state.absmax)
        self.register_buffer("code", state.code, persistent=False)  # the constants of the format
        if use_double_quant:
            self.register_buffer("nested_absmax", state.state2.absmax)
            self.register_buffer("nested_code", state.state2.code, persistent=False)
            self.register_buffer("offset", state.offset)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        out = _MatMul4bit.apply(x, self, *self._state())
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _state(self) -> tuple[Tensor, ...]:
        nested = (self.nested_absmax, self.nested_code, self.offset) if self.nested else ()
        return (self.weight, self.absmax, self.code, *nested)

    def dequantize(self, dtype: torch.dtype = torch.float32, state: tuple[Tensor, ...] | None = None) -> Tensor:
        """Return the weight that the codes stand for, ``[out, in]``."""
        weight, absmax, code, *nested = state or self._state()
        num_bytes = -(-self.in_features * self.out_features // 2)
        codes = weight.detach().flatten().view(torch.uint8)[:num_bytes, None]
        state2 = offset = None
        if nested:
            offset = nested[2]
            state2 = bnb.QuantState(nested[0], code=nested[1], blocksize=NESTED_BLOCK, dtype=torch.float32)
        shape = torch.Size((self.out_features, self.in_features))
        quant_state = bnb.QuantState(absmax, shape, code, BLOCK, self.quant_type, dtype, offset, state2)
        return bnb.dequantize_4bit(codes, quant_state)

    @property
    def W_q(self) -> Tensor:
        """The codes, by the name whose presence tells peft to call ``dequantize`` where it needs the weight (DoRA)."""
        return self.weight

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quant_type={self.quant_type}, compute_dtype={self.compute_dtype}"
