"""Interpolation of a ViT's position embedding as two small matrix products.

Bicubic interpolation is linear and separable, so it multiplies the rows and the columns of the table by fixed matrices.
The operator that transformers calls in every forward processes one output position per thread and takes milliseconds
on a GPU, both ways.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def interpolate_by_product_(embeddings: nn.Module, patch_size: int, antialias: bool) -> None:
    """Replace the interpolation of a position embedding; its results stay the same except for rounding.

    Args:
        embeddings: module with ``position_embeddings``, ``[1, 1 + n * n, c]`` for the class token and a square of
            patches, and with the method ``interpolate_pos_encoding``, which is replaced.
        patch_size: width and height of a patch in pixels.
        antialias: whether the original interpolation filters before it makes the table smaller.
    """
    module: Any = embeddings
    module.interpolate_pos_encoding = partial(
        _interpolate, module, module.interpolate_pos_encoding, patch_size, antialias, {}
    )


def _interpolate(
    embeddings: Any,
    original: Any,
    patch_size: int,
    antialias: bool,
    cache: dict,
    tokens: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """Return the position embedding for an image size.

    Args:
        embeddings: module with ``position_embeddings``.
        original: the method that this function replaces.
        patch_size: width and height of a patch in pixels.
        antialias: as for ``interpolate_by_product_``.
        cache: matrices by sizes and device.
        tokens: embedded patches and class token, ``[n, 1 + patches, c]``.
        height: height of the image in pixels.
        width: width of the image in pixels.
    """
    if torch.compiler.is_compiling():  # also in export, where the matrices would have no content
        return original(tokens, height, width)
    table = embeddings.position_embeddings
    side = round((table.shape[1] - 1) ** 0.5)
    size = (height // patch_size, width // patch_size)
    if size == (side, side):
        return table
    key = (side, size, table.device)
    if isinstance(tokens, FakeTensor):  # in memory planning: only shapes count, and tensors of another step are invalid
        cache[key] = [table.new_empty(length, side, dtype=torch.float32) for length in size]
    elif key not in cache:
        cache[key] = [_matrix(side, length, antialias, table.device) for length in size]
    rows, columns = cache[key]
    with torch.autocast(table.device.type, enabled=False):
        patches = torch.einsum("nhwc,ah,bw->nabc", table[:, 1:].unflatten(1, (side, side)).float(), rows, columns)
    return torch.cat([table[:, :1], patches.flatten(1, 2).to(table.dtype)], dim=1)


def _matrix(side: int, length: int, antialias: bool, device: torch.device) -> Tensor:
    """Return the matrix that interpolates ``side`` values to ``length``, fp32 ``[length, side]``."""
    # Training saves it for backward, also if it was first computed in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        # An image whose columns are the unit vectors: its rows are interpolated, its columns stay.
        units, size = torch.eye(side)[None, None], (length, side)
        matrix = F.interpolate(units, size=size, mode="bicubic", align_corners=False, antialias=antialias)[0, 0]
        return matrix.to(device)
