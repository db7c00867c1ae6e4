"""The commands as a user types them: the whole way in every mode, and what wrong input says."""

import json
import re
import shlex
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.conftest import TINY_DATA
from tracknet.config import compose_data
from tracknet.data.splits import read_split
from tracknet.runs.load import load_run
from tracknet.scripts import cli
from tracknet.training import trainer

MODELS = {"vit": "vit_tiny_heatmap", "convnext": "convnext_tiny_heatmap"}
EXAMPLES = {
    "train": "--data synthetic",
    "evaluate": "--run outputs/runs/",
    "predict": "rally.mp4",
    "synthesize": "--out",
    "export": "--format onnx",
    "demo": "tracknet demo",
    "plan": "--gpu-memory",
    "push": "--repo owner/name",
    "check_data": "--data tracknet",
    "benchmark": "--data synthetic",
}


def only_run(output: Path) -> Path:
    (run,) = (output / "runs").iterdir()
    return run


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("mode", ["default", "int8", "qlora"])
def test_train_evaluate_predict_with_exactly_the_model_that_was_trained(
    tiny, rallies, tmp_path, monkeypatch, kind, mode, capsys
):
    frames = torch.randint(0, 256, (2, 3, 3, 72, 128), dtype=torch.uint8)
    before = []
    real = trainer.save_checkpoint

    def remember(folder, model, *args):
        training = model.training
        with torch.no_grad():
            before.append(model.eval()(frames))
        model.train(training)
        return real(folder, model, *args)

    monkeypatch.setattr(trainer, "save_checkpoint", remember)
    out = tmp_path / "outputs"
    assert (
        cli.main(
            [
                "train",
                "--data",
                "synthetic",
                "--model",
                MODELS[kind],
                "--training",
                mode,
                "--output-dir",
                str(out),
                "--seed",
                "3",
                "--json",
                str(tmp_path / "train.json"),
                *tiny(kind),
            ]
        )
        == 0
    )
    run = only_run(out)
    assert (out / "logs" / run.name).is_dir()
    config, model, _ = load_run(run, "last")
    assert config.seed == 3
    with torch.no_grad():
        assert torch.equal(model(frames), before[-1])
    assert cli.main(["evaluate", "--run", str(run), "--json", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {
        "f1",
        "f1_strict",
        "precision",
        "recall",
        "recall_strict",
        "tp",
        "fp1",
        "fp2",
        "fn",
        "tn",
        "tolerance_px",
        "median_error_px",
        "ap",
        "accuracy",
        "split",
    } <= set(scores)
    assert sum(scores[k] for k in ("tp", "fp1", "fp2", "fn", "tn")) == scores["num_frames"] == 14
    for name in ("run_test_curves.png", "run_test_worst.png"):
        assert cv2.imread(str(run / "report" / name)).std() > 5
    clip = read_split(config.data, "test")[0]
    assert cli.main(["predict", "--run", str(run), str(clip.video), "--out", str(tmp_path / "p")]) == 0
    assert len((tmp_path / "p/ball.csv").read_text().splitlines()) == 15
    assert "frames show a ball" in capsys.readouterr().out


def test_resume_by_the_command_line(tiny, tmp_path, monkeypatch):
    out = tmp_path / "outputs"
    argv = [
        "train",
        "--data",
        "synthetic",
        "--model",
        "vit_tiny_heatmap",
        "--training",
        "qlora",
        "--output-dir",
        str(out),
    ]
    assert cli.main([*argv, *tiny("vit")]) == 0
    run = only_run(out)
    monkeypatch.chdir(run.parent)
    assert cli.main(["train", "--resume", run.name, "training.max_steps=5"]) == 0
    assert json.loads((run / "metrics.json").read_text())["steps"] == 5
    assert [p.name for p in (out / "logs").iterdir()] == [run.name] and only_run(out) == run


def test_dry_run_prints_the_configuration_and_does_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        cli.main(
            [
                "train",
                "--data",
                "tracknet",
                "--model",
                "vit_heatmap",
                "--training",
                "int8",
                "training.batch_size=8",
                "--dry-run",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "batch_size: 8" in out and "llm_int8_threshold: 6.0" in out
    assert list(tmp_path.iterdir()) == []


def test_the_guides_commands_parse(capsys):
    commands = [
        "--data tracknet --model vit_heatmap --training int8 training.batch_size=8 training.optimizer.lr=3e-4",
        (
            "--data tracknet --model convnext_fpn_heatmap --training qlora training.lora.r=32"
            " training.lora.lora_alpha=64 training.batch_size=4"
        ),
        (
            "--data tracknet --model vit_heatmap --training qlora"
            " training.memory_optimization.gradient_checkpointing=true"
            " training.memory_optimization.use_cpu_offload=true training.min_micro_batch_size=1"
        ),
        "--data tracknet --model vit_heatmap --training qlora training.lora.r=32 training.lora.lora_alpha=64",
    ]
    for command in commands:
        assert cli.main(["train", *command.split(), "--dry-run"]) == 0


@pytest.mark.parametrize(
    "command",
    [
        "--model vit_heatmap --training int8 training.batch_size=8 training.optimizer.lr=3e-4",
        (
            "--model convnext_fpn_heatmap --training qlora training.lora.r=32 training.lora.lora_alpha=64"
            " training.batch_size=4"
        ),
        (
            "--model vit_heatmap --training qlora training.memory_optimization.gradient_checkpointing=true "
            "training.memory_optimization.use_cpu_offload=true training.min_micro_batch_size=1"
        ),
    ],
)
def test_the_guides_commands_train(command, rallies, tmp_path):
    """On the real architectures (random weights: there is no hub here), small frames and two steps."""
    tiny = [d for d in TINY_DATA if "synthetic" not in d] + [
        f"data.root={rallies}",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]
    capped = [
        "model.backbone.weights=random",
        "training.max_steps=2",
        "training.limit_train_batches=1",
        "training.epochs=2",
    ]
    argv = ["train", "--data", "tracknet", "--output-dir", str(tmp_path / "outputs"), *command.split(), *tiny, *capped]
    assert cli.main(argv) == 0
    assert load_run(only_run(tmp_path / "outputs"))[0].training.max_steps == 2


def test_the_demo_leaves_a_picture_and_a_video(rallies, tmp_path, capsys):
    argv = [
        "demo",
        "--output-dir",
        str(tmp_path / "o"),
        "--json",
        str(tmp_path / "demo.json"),
        *TINY_DATA,
        f"data.root={rallies}",
        "data.augment.crop=[64,40]",
        f"data.cache_dir={tmp_path / 'cache'}",
        "training.max_steps=2",
    ]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    paths = [Path(line.split(": ", 1)[1].strip()) for line in out.splitlines() if line.startswith("  ")]
    assert len(paths) == 3 and all(p.is_file() for p in paths)
    assert "f1_strict" in json.loads((tmp_path / "demo.json").read_text())


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_teaches_with_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    assert EXAMPLES[verb] in capsys.readouterr().out


def test_the_command_itself_explains_its_verbs(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in cli.VERBS)
    assert cli.main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


TRAIN = ["train", "--data", "synthetic", "--model", "vit_tiny_heatmap", "--training", "qlora"]
WRONG = {
    "unknown flag": ([*TRAIN, "--sed", "3"], "did you mean '--seed'"),
    "missing choice": (["train", "--data", "synthetic"], "--model, --training missing"),
    "unknown model": (
        ["train", "--data", "synthetic", "--model", "vit", "--training", "qlora"],
        "available: convnext_fpn_heatmap",
    ),
    "unknown key": ([*TRAIN, "training.lora.rank=3"], "training.lora.rank"),
    "wrong type": ([*TRAIN, "training.epochs=many"], "training.epochs"),
    "unknown section": ([*TRAIN, "train.epochs=3"], "did you mean 'training'"),
    "no config dir": ([*TRAIN, "--config-dir", "gone"], "--config-dir gone"),
    "no dataset": (["train", "--data", "tracknet", "--model", "vit_tiny_heatmap", "--training", "qlora"], "data.root"),
    "no cuda": ([*TRAIN, "training.device=cuda", "DATA"], "training.device=cpu"),
    "size": ([*TRAIN, "data.preprocess.resize=[130,72]", "DATA"], "nearest is [128, 72]"),
    "layers": ([*TRAIN, "model.backbone.layers=[9]", "DATA"], "from 1 to"),
    "target": ([*TRAIN, "training.lora.target_modules=[attn]", "DATA"], "matches no linear layer"),
    "missing game": ([*TRAIN, "DATA", "data.split.train_games=[1,77]"], "game '77' is not in"),
    "no run": (["evaluate", "--run", "gone"], "--run gone"),
    "checkpoint folder for run": (["evaluate", "--run", "RUN/best"], "did you mean"),
    "no such split": (["evaluate", "--run", "RUN", "--split", "tset"], "--split"),
    "json nowhere": (["evaluate", "--run", "RUN", "--json", "gone/x.json"], "--json gone/x.json"),
    "no video": (["predict", "--run", "RUN", "gone.mp4", "--out", "o"], "gone.mp4"),
    "a picture": (["predict", "--run", "RUN", "ball.png", "--out", "o"], "is a single image"),
    "resume of last that is not there": (
        ["train", "--resume", "BEST_ONLY"],
        "--resume best_only: checkpoint 'last' not found; the run has 'best'.",
    ),
    "a state of another shape": (["evaluate", "--run", "SHAPE"], "state.json: damaged (transformers, backbone"),
    "no label": (
        ["evaluate", "--run", "RUN", "data.root=unlabeled", "data.synthetic=null"],
        "no frame of game4 in 'unlabeled' has a label",
    ),
    "no label to choose by": (
        [*TRAIN, "DATA", "data.root=unlabeled", "data.synthetic=null"],
        "no frame of game3 in 'unlabeled' has a label",
    ),
    "before it renders": (
        ["train", "--data", "synthetic", "--model", "tracknet_v2", "--training", "qlora", "data.root=new"],
        "--training default",
    ),
    "before it reads": ([*TRAIN, "training.optimizer.name=paged_adamw8bit", "data.root=new"], "use adamw8bit"),
    "no real video": (["predict", "--run", "RUN", "text.mp4", "--out", "o"], "text.mp4"),
    "out is a file": (["predict", "--run", "RUN", "text.mp4", "--out", "text.mp4"], "is a file"),
    "fps": (["predict", "--run", "RUN", "text.mp4", "--out", "o", "--fps", "0"], "--fps"),
    "fps that rounds to nothing": (
        ["predict", "--run", "RUN", "text.mp4", "--out", "o", "--fps", "0.0001"],
        "at least 0.001",
    ),
    "a folder in a file": (["synthesize", "--out", "text.mp4/s", "data.synthetic.games=1"], "choose another path"),
    "a folder in a device": (["synthesize", "--out", "/dev/null/s", "data.synthetic.games=1"], "choose another path"),
    "damaged weights": (["evaluate", "--run", "DAMAGED"], "model.safetensors"),
    "weights of another model": (["evaluate", "--run", "OTHER"], "does not match the model"),
    "resume and choice": (["train", "--resume", "RUN", "--model", "vit_heatmap"], "remove --model"),
    "resume as another": (["train", "--resume", "RUN", "training.lora.r=32"], "would change it"),
    "resume of no run": (["train", "--resume", "gone"], "gone"),
    "overlay over the video": (["predict", "--run", "RUN", "o/overlay.mp4", "--out", "o"], "would replace"),
    "export over something": (
        ["export", "--run", "RUN", "--format", "backbone", "--out", "text.mp4"],
        "exists already",
    ),
    "a dtype for onnx": (
        ["export", "--run", "RUN", "--format", "onnx", "--dtype", "bf16", "--out", "new"],
        "--format merged",
    ),
    "an engine not exported": (["predict", "--run", "RUN", "--engine", "onnx", "VIDEO", "--out", "o"], "export --run"),
    "push to no repository": (["push", "--run", "RUN", "--repo", "name", "--dry-run", "new"], "owner/name"),
    "push over something": (["push", "--run", "RUN", "--repo", "a/b", "--dry-run", "text.mp4"], "exists already"),
    "synthesize with a setting of training": (
        ["synthesize", "--out", "s", "training.batch_size=4"],
        "uses the data section only",
    ),
    "check_data with a seed": (["check_data", "--data", "tracknet", "seed=1"], "uses the data section only"),
    "synthesize over something": (["synthesize", "--out", "text.mp4"], "exists already"),
}


@pytest.fixture(scope="module")
def workplace(rallies, backbones, tmp_path_factory):
    """A folder with a run, a damaged copy, a copy with another model's configuration, and a text file called a
    video."""
    folder = tmp_path_factory.mktemp("work")
    cli.main(
        [
            *TRAIN,
            *TINY_DATA,
            f"data.root={rallies}",
            f"model.backbone.name={backbones['vit']}",
            "training.max_steps=1",
            "training.batch_size=4",
            "--output-dir",
            str(folder / "outputs"),
        ]
    )
    run = only_run(folder / "outputs")
    shutil.copytree(run, folder / "damaged")
    weights = folder / "damaged/best/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    shutil.copytree(run, folder / "other")
    config = (folder / "other/config.yaml").read_text()
    (folder / "other/config.yaml").write_text(config.replace("r: 16", "r: 8"))
    (folder / "text.mp4").write_text("not a video")
    cv2.imwrite(str(folder / "ball.png"), np.zeros((64, 64, 3), np.uint8))
    shutil.copytree(run, folder / "best_only")
    shutil.rmtree(folder / "best_only/last")
    shutil.copytree(run, folder / "shape")
    (folder / "shape/best/state.json").write_text('{"format": 2}')
    shutil.copytree(rallies, folder / "unlabeled")
    for game in ("game3", "game4"):
        for labels in (folder / "unlabeled" / game).rglob("*.csv"):
            labels.write_text(labels.read_text().splitlines()[0] + "\n")
    return folder, run


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_message_with_exit_code_2_and_writes_nothing(case, workplace, rallies, monkeypatch, capsys):
    folder, run = workplace
    argv, words = WRONG[case]
    names = {
        "RUN": str(run),
        "DAMAGED": "damaged",
        "OTHER": "other",
        "SHAPE": "shape",
        "BEST_ONLY": "best_only",
        "RUN/best": str(run / "best"),
        "VIDEO": str(next((rallies / "game4").rglob("clip.mp4"))),
    }
    argv = [names.get(a, a) for a in argv]
    if "DATA" in argv:
        mine = [a for a in argv if "=" in a]
        argv = [a for a in argv if a not in ("DATA", *mine)] + [*TINY_DATA, f"data.root={rallies}", *mine]
    monkeypatch.chdir(folder)
    before = sorted(str(p) for p in folder.rglob("*"))
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.startswith("error: ")
    assert "Traceback" not in captured.err + captured.out
    assert sorted(str(p) for p in folder.rglob("*")) == before


def test_synthesized_rallies_can_be_trained_on(tmp_path):
    settings = ["data.synthetic.games=1", "data.synthetic.frames_per_clip=4", "data.synthetic.size=[64,64]"]
    assert cli.main(["synthesize", "--out", str(tmp_path / "r"), "--json", str(tmp_path / "s.json"), *settings]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == {"games": 1, "root": str(tmp_path / "r")}
    data = compose_data("synthetic", [*settings, f"data.root={tmp_path / 'r'}", "data.split.train_games=[1]"])
    assert read_split(data, "train")[0].num_frames == 4


@pytest.mark.parametrize("test_games", ["[4]", "null"])
def test_the_next_command_works_as_it_is_printed(tiny, tmp_path, capsys, test_games):
    """Somebody's own data may have no test games; and a path may have a space."""
    output = tmp_path / "my outputs"
    settings = [*tiny("vit"), "training.max_steps=1", f"data.split.test_games={test_games}"]
    assert cli.main([*TRAIN, *settings, "--output-dir", str(output)]) == 0
    said = capsys.readouterr().out
    command = shlex.split(re.search(r"Next: tracknet (.*)", said)[1])
    assert command == [
        "evaluate",
        "--run",
        str(only_run(output)),
        *(["--split", "val"] if test_games == "null" else []),
    ]
    assert cli.main(command) == 0


def test_there_is_no_f1_before_the_first_validation(tiny, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("tracknet.training.monitor.Monitor.step", lambda self, status: shown.append(status))
    settings = [*tiny("vit"), "training.max_steps=4", "training.limit_train_batches=2", "training.epochs=2"]
    assert cli.main([*TRAIN, *settings, "--output-dir", str(tmp_path)]) == 0
    assert ["F1 -" in status for status in shown] == [True, True, False, False]


def test_names_are_printed_as_they_are(tiny, tmp_path, capsys):
    """Names of files are a stranger's: neither escape sequences nor markup nor emoji codes may act in a terminal."""
    run = tmp_path / "[red]:boom:\x1b[31m"
    assert cli.main([*TRAIN, *tiny("vit"), "training.max_steps=1", "--output-dir", str(run)]) == 0
    made = only_run(run)
    assert cli.main(["evaluate", "--run", str(made)]) == 0
    assert cli.main(["evaluate", "--run", str(run / "gone")]) == 2
    captured = capsys.readouterr()
    for text in (captured.out, captured.err):
        assert "\x1b[31m" not in text and "[red]:boom:\\x1b[31m" in text


def test_a_message_fills_at_most_a_screen(capsys):
    assert cli.main([*TRAIN, "training." + "x" * 20_000 + "=1"]) == 2
    said = capsys.readouterr().err
    assert len(said) < 4200 and "characters left out" in said


@pytest.mark.parametrize(
    ("flag", "said"),
    [("--epochs", "training.epochs=…"), ("--batch-size", "training.batch_size=…"), ("--see", "did you mean '--seed'?")],
)
def test_an_unknown_flag_is_told_what_was_meant(flag, said, capsys):
    assert cli.main([*TRAIN, flag, "3"]) == 2
    error = capsys.readouterr().err
    assert said in error and "--resume" not in error
