"""Counted operations: those of the formulas of a transformer, and what each mode leaves out."""

import pytest
import torch

from tracknet.config import compose
from tracknet.planning.flops import count_flops, measure_matrix_rate

WIDTH, BLOCKS, TOKENS = 32, 2, 10 * 6 + 1  # of the tiny backbone at 128x72, which is stretched to 140x84


def count(tiny, mode="default", *overrides, size=(128, 72)):
    config = compose("synthetic", "vit_tiny_heatmap", mode, [*tiny("vit"), *overrides])
    return count_flops(config.model, config.training, 3, size)


def forward(tokens):
    """Return the operations of the blocks for three frames: products and attention."""
    return 3 * BLOCKS * (24 * tokens * WIDTH**2 + 4 * tokens**2 * WIDTH)


def test_training_the_blocks_takes_two_units_more_than_their_forward(tiny):
    whole, frozen = count(tiny), count(tiny, "frozen")
    patches = 2 * 3 * 60 * WIDTH * 3 * 14 * 14  # the weight gradient of the patch embedding
    position = whole - frozen - 2 * forward(TOKENS) - patches
    assert 0 <= position < 0.02 * whole  # the interpolation of the position embedding


@pytest.mark.parametrize("mode", ["int8", "qlora"])
def test_frozen_products_have_no_weight_gradient(tiny, mode):
    everything = "training.train_last_blocks=null"
    quantized, whole = count(tiny, mode, everything), count(tiny)
    products = 3 * BLOCKS * 24 * TOKENS * WIDTH**2
    adapters = 0
    if mode == "qlora":  # of rank 16: both halves, forward and twice backward
        adapters = 3 * 2 * 3 * BLOCKS * TOKENS * 16 * (4 * 2 * WIDTH + 2 * 5 * WIDTH)
    assert abs(whole - quantized - products + adapters) < 0.05 * whole


def test_recomputation_is_not_counted(tiny):
    level = "training.memory_optimization.gradient_checkpointing"
    assert count(tiny, "default", f"{level}=full") == count(tiny, "default", f"{level}=none")


def test_the_rate_of_a_product_is_that_of_some_processor():
    assert 1e9 < measure_matrix_rate(torch.device("cpu"), torch.float32) < 1e15
