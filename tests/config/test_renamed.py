"""Old names of renamed settings, which are accepted with a warning."""

import pytest

from tracknet.config import compose, load_config, save_config
from tracknet.config.renamed import RENAMED, rename_keys
from tracknet.errors import UserError

OLD = [
    "evaluation.subcell=centroid",
    "training.backbone_trains=all",
    "training.quantization.int8_kernel=bitsandbytes",
    "training.lora.layers=last-2",
]


def test_old_names_mean_the_same_on_the_command_line_and_warn(said):
    config = compose("synthetic", "vit_tiny_heatmap", "int8", OLD)
    assert config.evaluation.subpixel == "centroid" and config.training.trainable == "all"
    assert config.training.int8_kernel == "bitsandbytes" and config.training.train_last_blocks == 2
    assert len(said) == 4 and all("is now" in line and "up to version" in line for line in said)


def test_runs_that_were_saved_under_old_names_load(tmp_path, said):
    overrides = ["training.int8_kernel=bitsandbytes", "training.lora.r=8", "training.train_last_blocks=4"]
    config = compose("synthetic", "vit_tiny_heatmap", "int8", [*overrides, "training.trainable=nothing"])
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    text = text.replace("  subpixel:", "  subcell:").replace("  trainable:", "  backbone_trains:")
    text = text.replace("  int8_kernel: bitsandbytes\n", "").replace(
        "    load_in_8bit:", "    int8_kernel: bitsandbytes\n    load_in_8bit:"
    )
    text = text.replace("    normalized:", "    normalised:")
    text = text.replace("  train_last_blocks: 4\n", "").replace("    r: 8\n", "    layers: last-4\n    r: 8\n")
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(tmp_path / "config.yaml") == config
    (line,) = said
    assert all(old in line for old in RENAMED)


def test_old_names_are_read_in_a_section_of_ones_own(tmp_path, said):
    (tmp_path / "training").mkdir()
    (tmp_path / "training/mine.yaml").write_text("backbone_trains: norms\nquantization:\n  load_in_8bit: true\n")
    config = compose("synthetic", "vit_tiny_heatmap", "mine", [], tmp_path)
    assert config.training.trainable == "norms" and "mine.yaml" in said[0]


def test_a_setting_under_both_names_is_refused():
    tree = {"evaluation": {"subcell": "centroid", "subpixel": "parabola"}}
    with pytest.raises(UserError, match=r"evaluation\.subcell is the old name of evaluation\.subpixel"):
        rename_keys(tree, "x.yaml")
    assert tree == {"evaluation": {"subcell": "centroid", "subpixel": "parabola"}}
    assert rename_keys({"a": 1}, "x.yaml") == {"a": 1}


def test_values_of_an_old_name_are_converted():
    for old, new in (("last-12", 12), ("null", None)):
        config = compose("synthetic", "vit_tiny_heatmap", "qlora", [f"training.lora.layers={old}"])
        assert config.training.train_last_blocks == new
    for wrong in ("4", "last-0", "last", "at-last-2"):
        with pytest.raises(UserError, match=r"use training\.train_last_blocks=<k>"):
            compose("synthetic", "vit_tiny_heatmap", "qlora", [f"training.lora.layers={wrong}"])


def test_old_values_and_the_datasets_of_a_mix_are_read_too(tmp_path, said):
    mix = "data.mix=[{root: other, csv: {normalized: true}, cvat: {unmarked: absent}}, {root: third}]"
    config = compose("wasb_soccer", "vit_tiny_heatmap", "qlora", [mix, "data.cvat.unmarked=unlabeled"])
    assert config.data.cvat.unmarked == "unlabeled"
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    text = text.replace("normalized:", "normalised:").replace("unmarked: unlabeled", "unmarked: unlabelled")
    assert text.count("normalised:") == 3 and text.count("unlabelled") == 2
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(tmp_path / "config.yaml") == config
    (line,) = said
    assert "data.cvat.unmarked=unlabelled is now unlabeled" in line
    overrides = ["data.cvat.unmarked=unlabelled"]
    assert compose("wasb_soccer", "vit_tiny_heatmap", "qlora", overrides).data.cvat.unmarked == "unlabeled"
