"""Position embeddings that are interpolated by products: those of transformers, and their gradients."""

import pytest
import torch
from transformers import AutoModel, Dinov2Config, Dinov2WithRegistersConfig, ViTConfig

from tracknet.models.families import FAMILIES

SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14, "image_size": 98}


@pytest.mark.parametrize("config", [Dinov2Config(**SIZE), Dinov2WithRegistersConfig(**SIZE), ViTConfig(**SIZE)])
@pytest.mark.parametrize("size", [(56, 126), (98, 98), (28, 42), (140, 154)])
def test_interpolation_and_gradient_are_those_of_transformers(config, size):
    torch.manual_seed(0)
    hf = AutoModel.from_config(config)
    embeddings, (height, width) = hf.embeddings, size
    table = embeddings.position_embeddings
    torch.nn.init.normal_(table)
    tokens = torch.zeros(1, 1 + height * width // 14**2, 32)
    wanted = embeddings.interpolate_pos_encoding(tokens, height, width)
    grad = torch.randn_like(wanted)
    (wanted_gradient,) = torch.autograd.grad(wanted, table, grad)
    FAMILIES[config.model_type].prepare(hf)
    for _ in range(2):  # the second time with the matrices of the first
        out = embeddings.interpolate_pos_encoding(tokens, height, width)
        (gradient,) = torch.autograd.grad(out, table, grad)
        assert torch.allclose(out, wanted, atol=1e-5) and torch.allclose(gradient, wanted_gradient, atol=1e-5)


def test_matrices_of_a_prediction_serve_training_too():
    hf = AutoModel.from_config(Dinov2Config(**SIZE))
    FAMILIES["dinov2"].prepare(hf)
    tokens = torch.zeros(1, 1 + 4 * 9, 32)
    with torch.inference_mode():
        hf.embeddings.interpolate_pos_encoding(tokens, 56, 126)
    hf.embeddings.interpolate_pos_encoding(tokens, 56, 126).sum().backward()
    assert hf.embeddings.position_embeddings.grad.isfinite().all()
