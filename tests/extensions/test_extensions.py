"""A loss, a layout, a backbone family and adapters that are added from outside the package, one file each."""

import importlib
import shutil

import pytest
import torch
import yaml
from transformers import AutoModel, SwinConfig

import tracknet
from tracknet.api.plan import planner_of
from tracknet.api.train import train_run
from tracknet.config import compose
from tracknet.data.layouts import LAYOUTS
from tracknet.data.splits import read_split
from tracknet.errors import UserError
from tracknet.models.components import component_by_name
from tracknet.models.families import FAMILIES
from tracknet.quantization.adapters import ADAPTERS, adapted_layers
from tracknet.quantization.merge import merge_
from tracknet.quantization.parts import describe_parts
from tracknet.registry import Registry
from tracknet.training.losses import LOSSES, LossConfig, heatmap_loss, loss_normalizer

FRAMES = torch.randint(0, 256, (1, 3, 3, 72, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def extensions():
    """Import the extensions, which registers them, and remove what they registered for the tests of other modules."""
    registries = [LOSSES, LAYOUTS, FAMILIES, ADAPTERS]
    built_in = [dict(registry) for registry in registries]
    for name in ("js_loss", "yaml_layout", "swin_family", "ia3_adapter"):
        importlib.import_module(f"tests.extensions.{name}")
    assert [len(a) - len(b) for a, b in zip(registries, built_in)] == [1, 1, 1, 1]
    yield
    for registry, names in zip(registries, built_in):
        for name in registry.keys() - names.keys():
            del registry[name]


def train(overrides, folder, model="vit_tiny_heatmap", mode="default"):
    """Train a few steps; return the run, loaded again, after checking that it computes what the trained model did."""
    config = compose("synthetic", model, mode, [*overrides, "training.max_steps=3"])
    trained = train_run(config, folder / "runs" / "r")
    assert trained is not None
    return tracknet.load(folder / "runs" / "r", device="cpu", checkpoint="last")


# --- loss


def test_a_loss_that_is_no_sum_over_cells_splits_like_any_other(rallies):
    torch.manual_seed(0)
    config = LossConfig(name="jensen_shannon", options={"temperature": 2.0})
    logits = torch.randn(4, 3, 36, 64, requires_grad=True)
    batch = {
        "frames": torch.zeros(4, 3, 3, 72, 128, dtype=torch.uint8),
        "xy": torch.rand(4, 3, 2) * 60,
        "visible": torch.rand(4, 3) > 0.4,
        "weight": torch.rand(4, 3),
    }
    whole = torch.autograd.grad(heatmap_loss(logits, batch, config) / loss_normalizer(batch, config), logits)[0]
    assert loss_normalizer(batch, config) == (batch["weight"] * batch["visible"]).sum()
    parts = [{k: v[s] for k, v in batch.items()} for s in (slice(0, 1), slice(1, 4))]
    normalizer = sum(loss_normalizer(part, config) for part in parts)
    losses = [heatmap_loss(logits[s], part, config) for s, part in zip((slice(0, 1), slice(1, 4)), parts)]
    split = torch.autograd.grad(sum(losses) / normalizer, logits)[0]
    assert torch.allclose(whole, split, rtol=1e-5, atol=1e-9) and whole.abs().max() > 0


def test_a_loss_trains_to_the_same_weights_whatever_the_micro_batch(tiny, tmp_path):
    base = [*tiny("vit"), "training.loss.name=jensen_shannon", "training.precision=fp32"]
    runs = [train([*base, f"training.micro_batch_size={size}"], tmp_path / str(size)) for size in (1, 4)]
    runs.append(train([*tiny("vit"), "training.precision=fp32"], tmp_path / "focal"))
    one, four, focal = (torch.cat([p.detach().flatten() for p in run.model.head.parameters()]) for run in runs)
    assert (one - four).abs().mean() < 0.05 * (one - focal).abs().mean()


def test_an_unknown_option_of_a_loss_is_refused():
    with pytest.raises(UserError, match=r"options\.temprature: .* the options temperature; did you mean 'temperature'"):
        LossConfig(name="jensen_shannon", options={"temprature": 2.0})
    with pytest.raises(UserError, match=r"options\.temperature: the loss 'focal' has no options"):
        LossConfig(options={"temperature": 2.0})


# --- layout


def test_a_layout_is_split_read_and_trained_on(rallies, tiny, tmp_path):
    root = tmp_path / "yaml"
    root.mkdir()
    overrides = [o for o in tiny("vit") if not o.startswith(("data.root", "data.split", "data.synthetic"))]
    data = compose("synthetic", "vit_tiny_heatmap", "default", tiny("vit")).data
    clips = [clip for split in ("train", "val") for clip in read_split(data, split)]
    for number, clip in enumerate(clips, 1):
        shutil.copy(clip.video, root / f"clip{number}.mp4")
        rows = {i: list(map(float, label.xy_image)) if label.xy_image else None for i, label in clip.labels.items()}
        (root / f"clip{number}.yaml").write_text(yaml.safe_dump(rows))
    overrides += ["data.layout=yaml", f"data.root={root}", "data.synthetic=null"]
    overrides += ["data.split.train_games=[1]", "data.split.val_games=[2]", "data.split.test_games=[3]"]
    (read,) = read_split(compose("synthetic", "vit_tiny_heatmap", "default", overrides).data, "train")
    assert {i: label.xy_image for i, label in read.labels.items()} == {
        i: label.xy_image and pytest.approx(label.xy_image) for i, label in clips[0].labels.items()
    }
    run = train(overrides, tmp_path)
    assert run.config.data.layout == "yaml" and run.evaluate("test")["num_frames"] > 0
    (root / "clip1.yaml").write_text("no mapping")
    with pytest.raises(UserError, match=r"clip1\.yaml: expected frame"):
        read_split(run.config.data, "train")


# --- backbone family


@pytest.fixture
def swin(tmp_path):
    torch.manual_seed(0)
    config = SwinConfig(image_size=64, embed_dim=16, depths=[1, 1, 2, 1], num_heads=[2, 2, 2, 2], window_size=4)
    AutoModel.from_config(config, add_pooling_layer=False).save_pretrained(tmp_path / "swin")
    return tmp_path / "swin"


@pytest.mark.parametrize("mode", ["default", "int8", "qlora"])
def test_a_backbone_family_trains_in_every_mode_and_loads_again(swin, tiny, tmp_path, mode):
    overrides = [*tiny("convnext"), f"model.backbone.name={swin}"]
    run = train(overrides, tmp_path, "convnext_tiny_heatmap", mode)
    shutil.rmtree(swin) if mode == "default" else None  # where all of it trains, the run needs no base
    again = tracknet.load(run.path, device="cpu", checkpoint="last")
    with torch.no_grad():
        assert torch.equal(run(FRAMES), again(FRAMES))


def test_the_maps_of_a_family_cover_the_picture(swin):
    """A bright spot moves the maps most where it is, at each of the strides that the family declares."""
    from tracknet.models.backbone import BackboneConfig
    from tracknet.models.pretrained import build_backbone

    backbone = build_backbone(BackboneConfig(str(swin)))
    assert backbone.strides == [4, 8, 16, 32] and backbone.channels == [16, 32, 64, 128]
    dark = torch.zeros(1, 3, 96, 128, dtype=torch.uint8)
    bright = dark.clone()
    bright[..., 32:40, 96:104] = 255
    for stride, a, b in zip(backbone.strides[:2], backbone(dark), backbone(bright)):
        assert a.shape[-2:] == (96 // stride, 128 // stride)
        y, x = divmod(int((a - b).abs().sum(1).flatten().argmax()), 128 // stride)
        assert abs(x * stride - 98) <= 8 and abs(y * stride - 34) <= 8


def test_a_family_is_planned_for(swin, tiny):
    config = compose("synthetic", "convnext_tiny_heatmap", "qlora", [*tiny("convnext"), f"model.backbone.name={swin}"])
    estimate = planner_of(config, "cpu").estimate
    assert estimate.peak_bytes(2) > estimate.peak_bytes(1) > estimate.weights > 0


# --- adapters


@pytest.mark.parametrize("kind", ["IA3", "VERA", "MISS", "OFT"])
@pytest.mark.parametrize("mode", ["default", "int8", "qlora"])
def test_an_adapter_is_counted_trained_saved_and_merged(tiny, tmp_path, kind, mode):
    lora = [f"training.lora.peft_type={kind}", "training.train_last_blocks=null"]
    lora += {"IA3": [], "OFT": ["training.lora.options={oft_block_size: 8}"]}.get(kind, ["training.lora.r=4"])
    off = ["training.lora.lora_alpha=32", "training.lora.lora_dropout=0.1"]  # LoRA's fields at their defaults
    run = train([*tiny("vit"), *lora, *off, "training.precision=fp32"], tmp_path, mode=mode)
    layers = adapted_layers(run.model.backbone.hf)
    assert len(layers) == 12

    # Counted: as adapters, by bytes and by whether they train.
    components = component_by_name(run.model)
    adapters = {n: p for n, p in run.model.named_parameters() if components[n] == "adapters"}
    assert adapters and not any("lora" in n for n in adapters)
    rows = [row for row in describe_parts(run.model) if row.name == "adapters" and row.trained]
    assert sum(row.num_parameters for row in rows) == sum(p.numel() for p in adapters.values())

    # Trained: VeRA's lambda_b and MiSS's block are zero at first. The base is not.
    assert all(p.detach().abs().sum() > 0 for p in adapters.values())
    assert not any(layer.get_base_layer().weight.requires_grad for layer in layers.values())

    # Saved: a second load computes the same bits, and the file holds the adapters.
    with torch.no_grad():
        logits = run(FRAMES)
        assert torch.equal(logits, tracknet.load(run.path, device="cpu", checkpoint="last")(FRAMES))

        # Merged: plain linear layers that compute the same.
        merged = merge_(run.model)
        assert not adapted_layers(merged)
        tolerance = 0.1 if mode == "int8" else 1e-3  # int8 rounds activations
        assert (merged(FRAMES).sigmoid() - logits.sigmoid()).abs().max() < tolerance


def test_fields_that_an_adapter_does_not_read_are_refused(tiny):
    with pytest.raises(UserError, match=r"training\.lora\.use_dora=True: adapters of peft_type=MISS do not read it"):
        compose(
            "synthetic",
            "vit_tiny_heatmap",
            "qlora",
            [*tiny("vit"), "training.lora.peft_type=MISS", "training.lora.use_dora=true"],
        )
    with pytest.raises(UserError, match=r"peft_type=LORRA is not one of LORA"):
        compose("synthetic", "vit_tiny_heatmap", "qlora", [*tiny("vit"), "training.lora.peft_type=LORRA"])


# --- registry


def test_a_name_is_registered_once():
    registry = Registry("training.loss.name")
    registry.register("a", 1)
    with pytest.raises(ValueError, match="already registered"):
        registry.register("a", 2)
    assert registry.lookup("a") == 1
