"""The trained model that ships with the package: follows a ball at once, and is where training may begin."""

import json

import pytest

from tracknet.api.run import load
from tracknet.api.train import train_run
from tracknet.config import compose, load_config
from tracknet.errors import UserError
from tracknet.runs.load import EMBEDDED, load_run, locate_run
from tracknet.scripts import cli

NAME = "embedded/vit_tiny_heatmap"


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """Of four rallies rendered at the model's own size, none of which it was trained on, by the command."""
    folder = tmp_path_factory.mktemp("embedded")
    overrides = [
        f"data.root={folder / 'r'}",
        "data.synthetic.games=4",
        "data.synthetic.frames_per_clip=30",
        "data.synthetic.seed=77",
        "data.split.train_games=[1]",
        "data.split.val_games=[2]",
        "data.split.test_games=[3,4]",
        f"data.cache_dir={folder}",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["evaluate", "--run", NAME, "--data", "synthetic", "--json", "scores.json", *overrides]) == 0
        yield json.loads((folder / "scores.json").read_text()), folder


def test_it_follows_a_ball_on_a_court_never_seen(scores):
    assert scores[0]["num_frames"] == 60 and scores[0]["f1_strict"] > 0.6, scores[0]


def test_its_report_is_not_written_into_the_package(scores):
    assert not (EMBEDDED / "vit_tiny_heatmap/report").exists()
    assert list((scores[1] / "outputs/hub/embedded/vit_tiny_heatmap/report").glob("*_worst.png"))


def test_it_names_no_folder_of_the_machine_that_trained_it():
    config = load_config(locate_run(NAME) / "config.yaml")
    assert config.data.root == "data/weights_rallies"
    assert sum(p.stat().st_size for p in locate_run(NAME).rglob("*") if p.is_file()) < 4e6


@pytest.mark.parametrize("mode", ["default", "int8", "qlora"])
def test_training_begins_from_it_in_each_mode(tiny, tmp_path, mode):
    overrides = [o for o in tiny("vit") if not o.startswith(("model.backbone.name", "training.max_steps"))]
    config = compose(
        "synthetic", "vit_tiny_heatmap", mode, [*overrides, f"training.init_from={NAME}", "training.max_steps=1"]
    )
    assert train_run(config, tmp_path / "runs/r")["val_f1_strict"] > 0.5  # after one step
    assert load_config(tmp_path / "runs/r/config.yaml").training.init_from == NAME


@pytest.mark.parametrize(
    "name, revision", [("embedded/vit_tinny_heatmap", None), ("embedded/vit_tiny", None), (NAME, "main")]
)
def test_another_name_is_an_error_that_lists_what_there_is(name, revision):
    with pytest.raises(UserError, match="that ship with this package are embedded/vit_tiny_heatmap"):
        locate_run(name, revision)


def test_a_loaded_model_evaluates_in_every_part():
    """Dropout and norms of a model in training would make its results random, or those of its batch."""
    overrides = ["training.precision=fp32", "training.device=cpu"]
    for model in (
        load(NAME, device="cpu", overrides=overrides).model,
        load_run(locate_run(NAME), overrides=overrides)[1],
    ):
        assert not any(module.training for module in model.modules())
