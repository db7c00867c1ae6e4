"""Size of the tiles that the Triton kernels mark for outliers.

A separate module, because memory planning needs it without Triton.
"""

TILE_ROWS, TILE_DEPTH = 128, 64  # rows, and values of each row, per tile
