"""Training loop: repeatability, resuming, micro-batches, checkpoints, and errors."""

import json
import re
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.conftest import set_hash
from tracknet.api.train import train_run
from tracknet.config import compose
from tracknet.data.clips import WindowDataset
from tracknet.data.splits import read_split
from tracknet.errors import UserError
from tracknet.runs.load import load_run
from tracknet.training import step
from tracknet.training.batches import epoch_batches
from tracknet.training.state import load_state

MODELS = {"vit": "vit_tiny_heatmap", "convnext": "convnext_tiny_heatmap"}


def weights(run, checkpoint="last"):
    return load_run(run, checkpoint)[1].state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_an_epoch_visits_every_window_once_in_an_order_of_its_own(tiny):
    data = compose("synthetic", "vit_tiny_heatmap", "default", tiny("vit")).data
    windows = WindowDataset(read_split(data, "train"), data, training=True)
    orders = [epoch_batches(windows, 4, seed=0, epoch=e) for e in (0, 1)]
    assert all(sorted(i for b in o for i in b) == list(range(len(windows))) for o in orders)
    assert orders[0] != orders[1] and orders[0] == epoch_batches(windows, 4, 0, 0) != epoch_batches(windows, 4, 1, 0)


@pytest.mark.parametrize("optimizer", ["adamw8bit"])
def test_the_8_bit_optimizer_resumes_too(tiny, tmp_path, optimizer):
    base = [
        *tiny("vit"),
        f"training.optimizer.name={optimizer}",
        "training.scheduler.name=constant",
        "training.scheduler.warmup_epochs=0",
    ]
    train_run(
        compose("synthetic", "vit_tiny_heatmap", "default", [*base, "training.max_steps=6"]), tmp_path / "a/runs/whole"
    )
    train_run(
        compose("synthetic", "vit_tiny_heatmap", "default", [*base, "training.max_steps=3"]), tmp_path / "b/runs/cut"
    )
    train_run(
        compose("synthetic", "vit_tiny_heatmap", "default", [*base, "training.max_steps=6"]),
        tmp_path / "b/runs/cut",
        resume=True,
    )
    assert same(weights(tmp_path / "a/runs/whole"), weights(tmp_path / "b/runs/cut"))


def test_the_schedule_of_a_resumed_run_goes_on_where_it_was(tiny, tmp_path, monkeypatch):
    """Warm-up and decay depend on the step of the run, not on the process that takes it."""
    settings = ["training.max_steps=6", "training.checkpoint_every_steps=1", "training.scheduler.warmup_epochs=7"]
    config = compose("synthetic", "vit_tiny_heatmap", "default", [*tiny("vit"), *settings, "training.epochs=20"])
    train_run(config, tmp_path / "a/runs/r")
    real, calls = step.accumulate_gradients, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(step, "accumulate_gradients", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_run(config, tmp_path / "b/runs/r")
    train_run(config, tmp_path / "b/runs/r", resume=True)
    rates = []
    for name in ("a", "b"):
        events = EventAccumulator(str(tmp_path / name / "logs/r"))
        events.Reload()
        rates.append({e.step: e.value for e in events.Scalars("train/lr")})
    assert sorted(rates[0]) == [1, 2, 3, 4, 5, 6] and rates[1] == rates[0]
    assert rates[0][1] == pytest.approx(rates[0][3] / 3) and rates[0][3] > rates[0][4] > rates[0][5] > rates[0][6] > 0


@pytest.fixture
def first_gradients():
    """Collect the gradients of the first optimizer step of each run, concatenated to one vector per run.

    Comparing the weights after a step is not possible: AdamW divides each gradient by its magnitude, so a gradient that
    consists of rounding errors moves its weight as far as any other, in a direction that depends on the order of sums.
    """
    collected, seen = [], []

    def look(optimizer, *_):
        if not any(optimizer is other for other in seen):
            seen.append(optimizer)
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            collected.append(torch.cat([g.flatten().double() for g in grads]))

    handle = register_optimizer_step_pre_hook(look)
    yield collected
    handle.remove()


def relative_difference(a, b):
    """Return the norm of the difference relative to that of ``a``.

    Rounding in float32 gives about 1e-5; a wrong normalizer of one micro-batch would give more than 1e-1.
    """
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("mode", ["default", "int8"])
def test_micro_batches_give_the_same_gradient(tiny, tmp_path, first_gradients, mode):
    for size in (4, 3, 1):
        config = compose(
            "synthetic",
            "vit_tiny_heatmap",
            mode,
            [
                *tiny("vit"),
                f"training.micro_batch_size={size}",
                "training.max_steps=1",
                "training.precision=fp32",
                "training.quantization.llm_int8_threshold=0" if mode == "int8" else "training.lora=null",
            ],
        )
        train_run(config, tmp_path / str(size) / "runs" / "r")
    whole, *parts = first_gradients
    assert whole.norm() > 0
    for part in parts:
        assert relative_difference(whole, part) < 1e-3


def test_running_out_of_memory_changes_the_split_and_not_the_result(tiny, tmp_path, monkeypatch, said, first_gradients):
    overrides = [*tiny("vit"), "training.precision=fp32"]
    config = compose("synthetic", "vit_tiny_heatmap", "default", overrides)
    train_run(config, tmp_path / "a/runs/plain")
    real = step.heatmap_loss
    monkeypatch.setattr(step, "heatmap_loss", lambda logits, *a: _too_large(logits) or real(logits, *a))
    result = train_run(config, tmp_path / "b/runs/tight")
    assert result["micro_batch_size"] == 2
    assert any("going on with 2" in line for line in said)
    plain, tight = first_gradients
    assert relative_difference(plain, tight) < 1e-3


def _too_large(logits):
    if len(logits) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_crops_are_planned_as_such(tiny, tmp_path):
    config = compose("synthetic", "vit_tiny_heatmap", "default", [*tiny("vit"), "data.augment.crop=[64,40]"])
    result = train_run(config, tmp_path / "runs/r")
    # Whole frames would take three times as much. At this size, gradients that are planned but do not exist yet account
    # for a few percent.
    assert result["planned_peak_bytes"] == pytest.approx(result["peak_bytes"], rel=0.1)


def test_it_begins_with_what_fits_into_what_is_free(tiny, tmp_path, monkeypatch, said):
    config = compose("synthetic", "vit_tiny_heatmap", "default", tiny("vit"))
    for free, size in ((7_000_000, 2), (100_000, 1)):
        monkeypatch.setattr("tracknet.planning.step_plan.available_bytes", lambda device, free=free: free)
        assert train_run(config, tmp_path / "runs/r")["micro_batch_size"] == size
        (line,) = (line for line in said if f"starting with micro-batches of {size}" in line)
        assert "are free" in line
        said.clear()
    monkeypatch.setattr("tracknet.planning.step_plan.available_bytes", lambda device: 100_000)
    config.training.micro_batch_size = 3
    assert train_run(config, tmp_path / "runs/r")["micro_batch_size"] == 3  # a configured size is used as it is


def test_where_not_even_one_window_fits_the_settings_that_help_are_named(tiny, tmp_path, monkeypatch):
    def short(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step, "heatmap_loss", short)
    with pytest.raises(UserError) as error:
        train_run(compose("synthetic", "vit_tiny_heatmap", "default", tiny("vit")), tmp_path / "o/runs/r")
    lines = str(error.value).splitlines()
    assert "micro-batches of 1 windows, and training.min_micro_batch_size=1 is reached" in lines[0]
    assert re.fullmatch(r"A step takes [\d,]+ MB, most of it \([\d,]+ MB\) for (activations|temporary)\.", lines[1])
    assert lines[2] == "What would save most:" and len(lines) == 6
    assert all(re.fullmatch(r"  (training\.|data\.|--training )\S+.*: [\d,]+ MB less", line) for line in lines[3:])
    assert not list((tmp_path / "o/runs").iterdir())


@pytest.mark.parametrize(
    ("kind", "mode"), [("vit", "default"), ("vit", "int8"), ("vit", "int8_full"), ("convnext", "qlora")]
)
def test_saving_memory_does_not_change_the_result(tiny, tmp_path, monkeypatch, kind, mode):
    """Checkpointing, offload and both give bit-identical weights to neither, including dropout."""
    monkeypatch.setattr("tracknet.memory.offload.MIN_BYTES", 0)  # offload all tensors
    runs = []
    for number, settings in enumerate(
        (
            {},
            {"gradient_checkpointing": "blocks"},
            {"use_cpu_offload": True},
            {"use_disk_offload": True},
            {"gradient_checkpointing": "blocks", "use_cpu_offload": True, "use_disk_offload": True},
        )
    ):
        memory = {"gradient_checkpointing": "none", **settings}
        config = compose(
            "synthetic",
            MODELS[kind],
            mode,
            [*tiny(kind), *(f"training.memory_optimization.{key}={value}" for key, value in memory.items())],
        )
        train_run(config, tmp_path / str(number) / "runs" / "r")
        runs.append(weights(tmp_path / str(number) / "runs" / "r"))
        folder = tmp_path / str(number) / "offload"
        assert not folder.exists() or not list(folder.iterdir())
    assert all(same(runs[0], other) for other in runs[1:])


def test_the_full_level_computes_the_same_to_rounding(tiny, tmp_path, first_gradients):
    """Computed in parts, the gradient of a convolution is summed in another order."""
    for level in ("none", "full"):
        config = compose(
            "synthetic",
            "vit_tiny_heatmap",
            "qlora",
            [*tiny("vit"), "training.precision=fp32", f"training.memory_optimization.gradient_checkpointing={level}"],
        )
        train_run(config, tmp_path / level / "runs" / "r")
    assert relative_difference(*first_gradients) < 1e-5


def test_a_resumed_run_logs_every_step_once_and_counts_on(tiny, tmp_path):
    base = [*tiny("vit"), "training.limit_train_batches=3"]
    train_run(compose("synthetic", "vit_tiny_heatmap", "default", [*base, "training.max_steps=3"]), tmp_path / "runs/r")
    train_run(
        compose("synthetic", "vit_tiny_heatmap", "default", [*base, "training.max_steps=6"]),
        tmp_path / "runs/r",
        resume=True,
    )
    events = EventAccumulator(str(tmp_path / "logs/r"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in events.Scalars("val/f1")] == [3, 6]


def test_two_runs_of_one_name_get_two_folders(tiny, tmp_path):
    config = compose("synthetic", "vit_tiny_heatmap", "default", [*tiny("vit"), "training.max_steps=1"])
    names = {train_run(config, tmp_path / "runs/r")["run"] for _ in range(2)}
    assert names == {str(tmp_path / "runs/r"), str(tmp_path / "runs/r-2")}


def test_tensorboard_shows_what_the_guide_names(tiny, tmp_path):
    train_run(compose("synthetic", "vit_tiny_heatmap", "qlora", tiny("vit")), tmp_path / "runs" / "r")
    events = EventAccumulator(str(tmp_path / "logs" / "r"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {
        "train/loss",
        "memory/allocated_gb",
        "memory/cached_gb",
        "memory/peak_gb",
        "train/lr",
        "train/grad_norm",
        "train/images_per_s",
        "train/micro_batch_size",
        "val/f1_strict",
        "val/precision",
    } <= scalars
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3]
    assert events.Scalars("memory/allocated_gb")[0].value > 0
    assert "val/predictions" in events.Tags()["images"]


def test_a_run_has_the_files_that_others_rely_on(tiny, tmp_path):
    result = train_run(compose("synthetic", "vit_tiny_heatmap", "int8", tiny("vit")), tmp_path / "runs" / "r")
    run = tmp_path / "runs" / "r"
    assert {p.name for p in run.iterdir()} == {"config.yaml", "last", "best", "metrics.json"}
    assert {p.name for p in (run / "last").iterdir()} == {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert {p.name for p in (run / "best").iterdir()} == {"model.safetensors", "state.json"}
    assert json.loads((run / "metrics.json").read_text()) == json.loads(json.dumps(result))
    assert result["steps"] == 3 and "val_f1_strict" in result


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tiny, tmp_path, monkeypatch):
    config = compose("synthetic", "vit_tiny_heatmap", "default", [*tiny("vit"), "training.checkpoint_every_steps=1"])
    real, calls = step.heatmap_loss, []
    monkeypatch.setattr(
        step, "heatmap_loss", lambda *a: calls.append(1) or real(*a) * (float("nan") if len(calls) == 3 else 1)
    )
    with pytest.raises(UserError, match="became nan at step 3"):
        train_run(config, tmp_path / "runs/r")
    assert load_state(tmp_path / "runs/r/last")["progress"]["step"] == 2


def test_a_gradient_that_is_not_finite_spoils_nothing(tiny, tmp_path, monkeypatch):
    """The loss can be finite although its gradient is not; the saved weights stay valid."""
    config = compose("synthetic", "vit_tiny_heatmap", "default", [*tiny("vit"), "training.checkpoint_every_steps=1"])
    real, calls = step.accumulate_gradients, []

    def spoil(model, *args):
        loss = real(model, *args)
        calls.append(1)
        if len(calls) == 2:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(step, "accumulate_gradients", spoil)
    with pytest.raises(UserError, match="gradient is not finite at step 2"):
        train_run(config, tmp_path / "runs/r")
    assert all(torch.isfinite(t).all() for t in weights(tmp_path / "runs/r").values() if t.is_floating_point())


def test_weights_that_diverged_are_not_saved(tiny, tmp_path):
    """A single step that is too large is enough: its loss and gradient are finite, but the output after it is not."""
    settings = [
        *tiny("vit"),
        "training.optimizer.lr=1e38",
        "training.max_steps=1",
        "training.scheduler.warmup_epochs=0",
    ]
    with pytest.raises(UserError, match=r"contains NaN or infinity.*training\.optimizer\.lr"):
        train_run(compose("synthetic", "vit_tiny_heatmap", "default", settings), tmp_path / "runs/r")
    assert list((tmp_path / "runs").iterdir()) == [] and list((tmp_path / "logs").iterdir()) == []


@pytest.mark.parametrize("saves", [False, True])
def test_an_interrupted_run_says_how_to_go_on_or_leaves_nothing(tiny, tmp_path, monkeypatch, said, saves):
    config = compose(
        "synthetic",
        "vit_tiny_heatmap",
        "default",
        [*tiny("vit"), f"training.checkpoint_every_steps={1 if saves else 2}"],
    )
    real, calls = step.accumulate_gradients, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(step, "accumulate_gradients", interrupt)
    run = tmp_path / "runs/r"
    with pytest.raises(KeyboardInterrupt):
        train_run(config, run)
    assert any(f"tracknet train --resume {run}" in line for line in said) == saves == run.exists()
    if saves:
        assert train_run(config, run, resume=True)["steps"] == 3


def test_a_run_that_was_killed_while_it_saved_is_kept(tiny, tmp_path, monkeypatch):
    config = compose("synthetic", "vit_tiny_heatmap", "default", [*tiny("vit"), "training.max_steps=1"])
    run = tmp_path / "runs/r"
    train_run(config, run)
    shutil.rmtree(run / "best")
    (run / "last").rename(run / "last.old")
    config.training.max_steps = 2

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(step, "accumulate_gradients", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_run(config, run, resume=True)
    assert train_run(config, run, resume=True)["steps"] == 2


def test_an_optimizers_state_of_another_run_is_refused(tiny, tmp_path):
    for name in ("a", "b"):
        config = compose("synthetic", "vit_tiny_heatmap", "default", [*tiny("vit"), "training.max_steps=1"])
        train_run(config, tmp_path / "runs" / name)
    state = "last/optimizer.safetensors"
    shutil.copy(tmp_path / "runs/a" / state, tmp_path / "runs/b" / state)
    config.training.max_steps = 2
    with pytest.raises(UserError, match=r"optimizer\.safetensors: damaged, or not the file that was saved"):
        train_run(config, tmp_path / "runs/b", resume=True)
    set_hash(tmp_path / "runs/b/last", "optimizer.safetensors")
    with pytest.raises(UserError, match=r"optimizer\.safetensors: belongs to another checkpoint"):
        train_run(config, tmp_path / "runs/b", resume=True)


def test_a_run_that_cannot_begin_leaves_nothing(tiny, tmp_path):
    config = compose(
        "synthetic", "vit_tiny_heatmap", "default", [*tiny("vit"), "training.optimizer.name=paged_adamw8bit"]
    )
    with pytest.raises(UserError, match="use adamw8bit"):
        train_run(config, tmp_path / "o/runs/r")
    assert not (tmp_path / "o").exists()


def test_a_loading_process_says_its_error_in_one_paragraph(tmp_path):
    with pytest.raises(UserError) as error:
        next(iter(torch.utils.data.DataLoader([_Broken()], num_workers=1, collate_fn=_touch)))
    assert str(error.value) == "0003.jpg: damaged"


class _Broken:
    pass


def _touch(items):
    raise UserError("0003.jpg: damaged")


def test_early_stopping_and_limits(tiny, tmp_path, said):
    config = compose(
        "synthetic",
        "vit_tiny_heatmap",
        "default",
        [
            *tiny("vit"),
            "training.max_steps=null",
            "training.epochs=9",
            "training.limit_train_batches=1",
            "training.limit_val_batches=1",
            "training.early_stopping_patience=1",
            "training.optimizer.lr=1e-9",
        ],
    )
    result = train_run(config, tmp_path / "runs/r")
    assert 2 <= result["steps"] < 9 and result["val_num_frames"] <= 14
    assert any("Stopped early" in line for line in said)


def test_a_tiny_model_learns_to_find_the_ball(tiny, tmp_path):
    """After training, the model finds most balls in its training clips."""
    config = compose(
        "synthetic",
        "vit_tiny_heatmap",
        "default",
        [
            *tiny("vit"),
            "training.max_steps=150",
            "data.augment.enabled=false",
            "training.optimizer.lr=3e-3",
            "training.batch_size=6",
            # Score the training clips: this tests whether the model can memorize them.
            "data.split.train_games=[1,2]",
            "data.split.val_games=[1,2]",
            "data.allow_leaks=true",
            "training.validate_every_epochs=1000",
            "training.precision=fp32",
        ],
    )
    assert train_run(config, tmp_path / "runs/r")["val_f1_strict"] > 0.6
