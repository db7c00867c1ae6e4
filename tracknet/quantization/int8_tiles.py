"""Sizes of the tiles that the Triton kernels mark for outliers; apart, because a plan has no Triton."""

TILE_ROWS, TILE_DEPTH = 128, 64
