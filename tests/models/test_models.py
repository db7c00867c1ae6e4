"""Every family, patch and size goes in; what comes out is aligned with the picture."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    ConvNextConfig,
    ConvNextV2Config,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ConvNextConfig,
    DINOv3ViTConfig,
    ViTConfig,
)

from tracknet.errors import UserError
from tracknet.models.architectures import ARCHITECTURES, known_architecture
from tracknet.models.backbone import BackboneConfig
from tracknet.models.decoder import DecoderConfig
from tracknet.models.families import FAMILIES
from tracknet.models.heatmap_model import ModelConfig, build_model
from tracknet.models.pretrained import build_backbone, describe_backbone

VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
CNX = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]}
CONFIGS = {
    "vit": ViTConfig(**VIT, patch_size=8, image_size=64),
    "dinov2": Dinov2Config(**VIT, patch_size=14, image_size=56),
    "dinov2_with_registers": Dinov2WithRegistersConfig(**VIT, patch_size=14, image_size=56),
    "dinov3_vit": DINOv3ViTConfig(**VIT, patch_size=16, num_register_tokens=4),
    "convnext": ConvNextConfig(**CNX),
    "convnextv2": ConvNextV2Config(**CNX),
    "dinov3_convnext": DINOv3ConvNextConfig(**CNX),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        AutoModel.from_config(config).save_pretrained(root / name)
    return root


def test_every_family_is_tested():
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("wh", [(128, 72), (64, 40)])
def test_a_family_loads_from_a_folder_and_runs_at_any_size(folders, family, wh):
    name = "vit_heatmap" if FAMILIES[family].kind == "vit" else "convnext_fpn_heatmap"
    config = ModelConfig(name, BackboneConfig(str(folders / family)), DecoderConfig(channels=32))
    model = build_model(config, 3)
    logits = model(torch.randint(0, 256, (2, 3, 3, wh[1], wh[0]), dtype=torch.uint8))
    assert logits.shape == (2, 3, wh[1] // 2, wh[0] // 2) and logits.dtype == torch.float32
    # At the start every cell is a ball with the probability of the prior.
    assert abs(logits.sigmoid().mean() - 0.01) < 0.005
    logits.sum().backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    # ConvNeXt's norm after pooling lies behind the last map.
    assert all("layernorm" in n or "layer_norm" in n for n in idle)


@pytest.mark.parametrize("family", CONFIGS)
def test_pretrained_weights_are_really_loaded(folders, family):
    loaded = build_backbone(BackboneConfig(str(folders / family)))
    original = AutoModel.from_pretrained(folders / family).state_dict()
    assert all(torch.equal(t, original[n]) for n, t in loaded.hf.state_dict().items())
    random = build_backbone(BackboneConfig(str(folders / family), weights="random"))
    assert not all(torch.equal(t, original[n]) for n, t in random.hf.state_dict().items())


@pytest.mark.parametrize("family", CONFIGS)
def test_the_maps_lie_on_the_picture(folders, family):
    """A bright spot changes the map most where it lies, in x and in y."""
    backbone = build_backbone(BackboneConfig(str(folders / family)))
    dark = torch.full((1, 3, 96, 160), 100, dtype=torch.uint8)
    spot = dark.clone()
    spot[..., 20:24, 124:128] = 255
    with torch.no_grad():
        for before, after in zip(backbone(dark), backbone(spot)):
            change = (after - before).abs().sum(dim=1)[0]
            y, x = divmod(int(change.argmax()), change.shape[1])
            assert abs((x + 0.5) / change.shape[1] - 126 / 160) < 1 / change.shape[1] + 0.01
            assert abs((y + 0.5) / change.shape[0] - 22 / 96) < 1 / change.shape[0] + 0.01


def test_dinov2_maps_equal_transformers_own(folders):
    backbone = build_backbone(BackboneConfig(str(folders / "dinov2")))
    x = torch.randint(0, 256, (1, 3, 56, 56), dtype=torch.uint8)
    with torch.no_grad():
        out = backbone.hf(pixel_values=(x / 255 - backbone.mean) / backbone.std).last_hidden_state[:, 1:]
        ours = backbone(x)[-1].flatten(2).transpose(1, 2)
    assert torch.allclose(ours, out, atol=1e-6)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_saved_architecture_builds_the_same_without_its_files(folders, family):
    backbone = build_backbone(BackboneConfig(str(folders / family)))
    again = build_backbone(BackboneConfig("gone/away"), saved={**describe_backbone(backbone), "base": None})
    again.load_state_dict(backbone.state_dict(), strict=True)
    x = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(backbone.eval()(x), again.eval()(x)))


@pytest.mark.parametrize("name", ["vit_tiny", "convnext_tiny"])
def test_the_embedded_backbones_load(name):
    backbone = build_backbone(BackboneConfig(f"embedded/{name}"))
    with torch.no_grad():
        assert all(torch.isfinite(m).all() for m in backbone(torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8)))


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if "small" in n or "tiny" in n])
def test_well_known_ones_build_at_random_without_the_hub(name):
    build_backbone(BackboneConfig(name, weights="random"))


def test_architectures_belong_to_families():
    assert {known_architecture(n).model_type for n in ARCHITECTURES} <= set(FAMILIES)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BackboneConfig("facebook/dinov2-small"), ["model.backbone.name=facebook/dinov2-base", "embedded/vit_tiny"]),
        (
            BackboneConfig("facebook/dinov3-vits16-pretrain-lvd1689m"),
            ["license gate", "facebook/dinov2-small", "hf auth login"],
        ),
        (BackboneConfig("embedded/vit_tinny"), ["embedded/vit_tiny", "did you mean"]),
        (BackboneConfig("./nowhere"), ["no such folder"]),
    ],
)
def test_a_backbone_that_cannot_be_had_names_the_alternatives(config, words):
    with pytest.raises(UserError) as error:
        build_backbone(config)
    for word in words:
        assert word in str(error.value)


def test_a_foreign_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="model_type is 'bert'; supported are vit"):
        build_backbone(BackboneConfig(str(tmp_path)))


def test_a_wrong_pairing_names_the_right_model(folders):
    with pytest.raises(UserError, match="use --model convnext_fpn_heatmap"):
        build_model(ModelConfig("vit_heatmap", BackboneConfig(str(folders / "convnext"))), 3)


def test_tracknet_v2_is_the_classical_one():
    model = build_model(ModelConfig("tracknet_v2", None), 3)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(11.3e6, rel=0.01)
    assert model(torch.zeros(1, 3, 3, 40, 64, dtype=torch.uint8)).shape == (1, 3, 40, 64)


def test_wasb_hrnet_is_the_size_that_was_published():
    """1.48 M parameters and 28.2 GMAC at 512x288 (BMVC 2023, table 3)."""
    model = build_model(ModelConfig("wasb_hrnet", None), 3)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.48e6, rel=0.01)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert model(torch.zeros(1, 3, 3, 40, 64, dtype=torch.uint8)).shape == (1, 3, 40, 64)
    assert counter.get_total_flops() / 2 * (512 * 288) / (64 * 40) == pytest.approx(28.2e9, rel=0.01)


def test_without_the_detail_branch_the_decoder_still_runs(folders):
    config = ModelConfig("vit_heatmap", BackboneConfig(str(folders / "vit")), DecoderConfig(32, detail=False))
    assert build_model(config, 3)(torch.zeros(1, 3, 3, 40, 64, dtype=torch.uint8)).shape == (1, 3, 20, 32)


def test_a_file_that_lacks_weights_is_refused(folders, tmp_path):
    """transformers would start them at random and go on."""
    folder = tmp_path / "b"
    shutil.copytree(folders / "dinov2", folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.mlp.fc1.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of the weights, such as encoder\.layer\.1\.mlp\.fc1\.weight"):
        build_backbone(BackboneConfig(str(folder)))


@pytest.mark.parametrize("damage", ["truncated", "other shape", "config"])
def test_a_damaged_folder_is_refused(folders, tmp_path, damage):
    folder = tmp_path / "b"
    shutil.copytree(folders / "dinov2", folder)
    path = folder / "model.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "config":
        (folder / "config.json").write_text("{")
    else:
        tensors = load_file(path)
        tensors["encoder.layer.1.mlp.fc1.weight"] = torch.zeros(3, 3)
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.backbone\.name=|config\.json: damaged"):
        build_backbone(BackboneConfig(str(folder)))


@pytest.mark.parametrize(
    "content", ["{", '{"image_mean": 0.5}', '{"image_mean": [0.5, 0.5]}', '{"image_std": [0, 1, 1]}']
)
def test_damaged_constants_are_refused(folders, tmp_path, content):
    folder = tmp_path / "b"
    shutil.copytree(folders / "dinov2", folder)
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        build_backbone(BackboneConfig(str(folder)))


def test_a_revision_is_for_hub_ids(folders):
    with pytest.raises(UserError, match=r"revision=abc selects a version of a hub id"):
        build_backbone(BackboneConfig(str(folders / "dinov2"), revision="abc"))
