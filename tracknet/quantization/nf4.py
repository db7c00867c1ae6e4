"""4-bit linear layers (QLoRA, Dettmers et al., NeurIPS 2023) on bitsandbytes' operators.

The state consists of plain tensors that load strictly, before and after any number of forwards. Evaluation never
repacks the codes, so training can continue after it.
"""

from __future__ import annotations

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tracknet.quantization.int8 import output_dtype

_STORAGE = {"uint8": torch.uint8, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
BLOCK = 64  # weights per scale
NESTED_BLOCK = 256  # scales per second-level scale, with double quantization


class _MatMul4bit(torch.autograd.Function):
    """Product with a frozen 4-bit weight, which forward and backward dequantize on the fly."""

    @staticmethod
    def forward(ctx, x, layer, *state):
        # Backward does not need the input, because the weight has no gradient. Codes and scales are arguments and are
        # saved as tensors: when the weights of a block are streamed, the layer has them on the device only in forward.
        ctx.layer = layer
        ctx.save_for_backward(*state)
        dtype = output_dtype(x)
        # The layer's compute dtype applies, not autocast's; only the result is converted to autocast's dtype.
        with torch.autocast(x.device.type, enabled=False):
            weight = layer.dequantize(layer.compute_dtype, state)
            return F.linear(x.to(layer.compute_dtype), weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        state = ctx.saved_tensors
        # Without a gradient scaler, gradients arrive in fp32 or bf16 and may underflow in fp16, so they are multiplied
        # in fp32. Scaled gradients arrive in fp16.
        unscaled = ctx.layer.compute_dtype == torch.float16 and grad.dtype != torch.float16
        weight = ctx.layer.dequantize(torch.float32 if unscaled else ctx.layer.compute_dtype, state)
        return (grad.to(weight.dtype) @ weight).to(grad.dtype), None, *([None] * len(state))


class Linear4bit(nn.Linear):
    """Frozen linear layer with a 4-bit weight that is multiplied in ``compute_dtype``.

    Args:
        linear: layer to quantize; its bias is shared and can be trained.
        quant_type: ``nf4`` or ``fp4``.
        compute_dtype: dtype of the dequantized weight and of the product.
        use_double_quant: whether to quantize the scales too, from 0.5 to 0.127 bits per weight.
        quant_storage: nominal dtype of the packed bytes: ``uint8``, ``fp16``, ``bf16`` or ``fp32``.

    Attributes:
        weight: packed codes, two per byte, ``[elements, 1]``.
        storage_dtype: ``quant_type``, for summaries.
        nested: ``use_double_quant``.
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
        # bitsandbytes quantizes blocks of the flattened weight, so any shape fits.
        codes, state = bnb.quantize_4bit(
            linear.weight.detach().float().contiguous(),
            blocksize=BLOCK,
            compress_statistics=use_double_quant,
            quant_type=quant_type,
        )
        # View the bytes as another dtype, padded to full elements. bitsandbytes itself would drop last bytes that do
        # not fill an element.
        codes = codes.flatten()
        storage = _STORAGE[quant_storage]
        codes = F.pad(codes, (0, -len(codes) % storage.itemsize))
        self.weight = nn.Parameter(codes.view(storage)[:, None], requires_grad=False)
        # The state is stored as buffers, not as bitsandbytes' QuantState, so that it moves and loads with the module.
        self.register_buffer("absmax", state.absmax)
        self.register_buffer("code", state.code, persistent=False)  # constants of the format
        if use_double_quant:
            self.register_buffer("nested_absmax", state.state2.absmax)
            self.register_buffer("nested_code", state.state2.code, persistent=False)
            self.register_buffer("offset", state.offset)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        out = _MatMul4bit.apply(x, self, *self._state())
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _state(self) -> tuple[Tensor, ...]:
        """Return codes, scales and constants in the order that ``dequantize`` expects."""
        nested = (self.nested_absmax, self.nested_code, self.offset) if self.nested else ()
        return (self.weight, self.absmax, self.code, *nested)

    def dequantize(self, dtype: torch.dtype = torch.float32, state: tuple[Tensor, ...] | None = None) -> Tensor:
        """Return the dequantized weight.

        Args:
            dtype: dtype of the result.
            state: tensors to use instead of the layer's own, in the order of ``_state``.

        Returns:
            Weight ``[out_features, in_features]``.
        """
        weight, absmax, code, *nested = state or self._state()
        # Recover the packed bytes, without the padding of the storage dtype.
        num_bytes = -(-self.in_features * self.out_features // 2)
        codes = weight.detach().flatten().view(torch.uint8)[:num_bytes, None]
        # With double quantization, bitsandbytes dequantizes the scales first: second-level scales plus an offset.
        state2 = offset = None
        if nested:
            offset = nested[2]
            state2 = bnb.QuantState(nested[0], code=nested[1], blocksize=NESTED_BLOCK, dtype=torch.float32)
        shape = torch.Size((self.out_features, self.in_features))
        quant_state = bnb.QuantState(absmax, shape, code, BLOCK, self.quant_type, dtype, offset, state2)
        return bnb.dequantize_4bit(codes, quant_state)

    @property
    def W_q(self) -> Tensor:
        """Packed codes. With an attribute of this name, peft calls ``dequantize`` to read the weight (DoRA)."""
        return self.weight

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quant_type={self.quant_type}, compute_dtype={self.compute_dtype}"
