"""Cached features of a frozen backbone."""

import pytest
import torch

from tracknet.api.train import train_run
from tracknet.config import compose
from tracknet.data.clips import WindowDataset
from tracknet.data.features import features_of
from tracknet.data.splits import read_split
from tracknet.data.transforms import apply_augmentation
from tracknet.errors import UserError
from tracknet.models.heatmap_model import build_model
from tracknet.quantization.apply import apply_mode
from tracknet.training.features import build_features

FLIPS = [
    "data.augment.scale=[1,1]",
    *(f"data.augment.{name}=0" for name in ("brightness", "contrast", "saturation", "blur", "noise")),
]
FROZEN = ["model.backbone.freeze=true", "training.train_last_blocks=null", "training.cache_features=true"]
CPU = torch.device("cpu")


@pytest.mark.parametrize(("kind", "model"), [("vit", "vit_tiny_heatmap"), ("convnext", "convnext_tiny_heatmap")])
@pytest.mark.parametrize("mode", ["default", "int8"])
def test_kept_features_are_those_of_the_pictures_mirrored_ones_too(tiny, tmp_path, kind, model, mode):
    extra = ["training.trainable=auto"] if mode == "int8" else []
    config = compose("synthetic", model, mode, [*tiny(kind), *FROZEN, *FLIPS, *extra])
    built = build_model(config.model, 3)
    apply_mode(built, config.training.mode, CPU, True)
    built.train()
    dataset = WindowDataset(read_split(config.data, "train"), config.data, training=True)
    dataset.features = build_features(built, dataset, CPU, tmp_path / "kept")
    flipped = 0
    for i in range(6):
        item = {k: v[None] for k, v in dataset[i].items()}
        flipped += bool(item["affine"][0, 0, 0] < 0)
        frames = apply_augmentation(item, None)["frames"]
        dtype, on = built.compute_dtype, built.compute_dtype != torch.float32
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype if on else None, enabled=on):
            expected = built.backbone(frames.flatten(0, 1))
        for kept, level in zip(features_of(item), expected, strict=True):
            # In int8, the scale of a row and the outlier columns of the batch differ. Otherwise only the order of
            # summation does.
            assert torch.allclose(kept.float(), level.float(), atol=0.1, rtol=0.05)
    assert 0 < flipped < 6
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "kept").rglob("*.safetensors")}
    build_features(built, dataset, CPU, tmp_path / "kept")
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "kept").rglob("*.safetensors")}, "computed once"
    assert not [
        p for p in (tmp_path / "kept").rglob("*") if p.suffix not in (".safetensors", "") and p.name != "CACHEDIR.TAG"
    ]


def test_training_with_kept_features_is_training_without(tiny, tmp_path):
    losses = {}
    for cached in ("true", "false"):
        config = compose(
            "synthetic",
            "vit_tiny_heatmap",
            "default",
            [
                *tiny("vit"),
                *FLIPS,
                "model.backbone.freeze=true",
                "training.precision=fp32",
                f"training.cache_features={cached}",
            ],
        )
        run = tmp_path / cached / "runs" / "r"
        train_run(config, run)
        from safetensors.torch import load_file

        losses[cached] = load_file(run / "last" / "model.safetensors")
    assert losses["true"].keys() == losses["false"].keys()
    assert all(
        torch.allclose(losses["true"][k], losses["false"][k], atol=2e-4)
        for k in losses["true"]
        if losses["true"][k].is_floating_point()
    )
    assert list((tmp_path / "cache" / "features").glob("*.safetensors")), "they are kept beside the cache of frames"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.cache_features=true"], "the backbone is trained"),
        ([*FROZEN], "augmentation changes the images"),
        ([*FROZEN, *FLIPS, "data.augment.crop=[64,64]"], "augmentation changes the images"),
        ([*FROZEN, *FLIPS, "data.cache=none"], "data.cache=disk"),
        ([*FROZEN, *FLIPS, "training.lora.r=4"], "the backbone is trained"),
    ],
)
def test_what_would_change_the_features_is_refused(tiny, overrides, message):
    with pytest.raises(UserError, match=message):
        compose("synthetic", "vit_tiny_heatmap", "default", [*tiny("vit"), *overrides])
