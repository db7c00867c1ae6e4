"""A step is planned for a budget: the fastest level that fits, with equal micro-batches, written into the run."""

import logging

import pytest
import torch
import yaml

from tracknet.api.train import train_run
from tracknet.config import compose, load_config
from tracknet.errors import UserError
from tracknet.models.heatmap_model import build_model
from tracknet.planning.planner import LEVELS, Planner
from tracknet.planning.step_plan import budget_bytes, plan_step
from tracknet.scripts import cli
from tracknet.training.calibration import make_timer
from tracknet.training.config import MemoryConfig

AUTO = "training.memory_optimization.gradient_checkpointing=auto"
BUDGET = "training.memory_optimization.budget="


def planner(tiny, *overrides, mode="default", kind="vit"):
    config = compose("synthetic", f"{kind}_tiny_heatmap", mode, [*tiny(kind), AUTO, *overrides])
    return Planner(config.model, config.training, 3, (128, 72), "cpu")


@pytest.fixture
def model(tiny):
    config = compose("synthetic", "vit_tiny_heatmap", "default", tiny("vit"))
    return build_model(config.model, 3)


def test_without_a_bound_nothing_is_recomputed_or_timed(tiny):
    def never(level, size):
        raise AssertionError

    plan = plan_step(planner(tiny), 4, timer=never)
    assert (plan.level, plan.micro_batch) == ("none", 4)


def test_every_level_is_tried_with_the_largest_micro_batch_that_fits(tiny):
    subject = planner(tiny)
    limit = subject.at("blocks").estimate.peak_bytes(9)
    seen = {}

    def timer(level, size):
        seen[level] = size
        return {"none": 3.0, "selective": 2.0, "blocks": 2.5, "full": 2.5}[level]

    plan = plan_step(subject, 16, limit, timer)
    for level, size in seen.items():
        fits = subject.at(level).estimate.largest_micro_batch(limit, 16)
        assert -(-16 // size) == -(-16 // fits) and subject.at(level).estimate.peak_bytes(size) <= limit
    assert list(seen) == ["none", "selective"], "blocks need as many micro-batches as selective"
    assert seen["none"] < seen["selective"] == 8, "9 of 16 fit, and two parts of 8 do the same in less memory"
    assert plan.level == "selective" and plan.peak_bytes <= limit and plan.seconds == 32
    assert plan_step(subject, 16, limit).level == "none", "without times, the level that recomputes the least"


def test_further_levels_are_not_planned_once_the_whole_batch_fits(tiny):
    subject, seen = planner(tiny), []
    limit = subject.at("blocks").estimate.peak_bytes(8)

    def timer(level, size):
        seen.append((level, size))
        return 1.0

    plan_step(subject, 8, limit, timer)
    assert [level for level, _ in seen][-1] == "blocks" and seen[-1][1] == 8 > seen[-2][1]


@pytest.mark.parametrize(("budget", "share"), [("lean", 0.1), ("25%", 0.25), ("62.5%", 0.625)])
def test_shares_are_of_full_fine_tuning_with_the_same_batch(tiny, budget, share):
    full = planner(tiny, "training.memory_optimization.gradient_checkpointing=none").estimate.peak_bytes(8)
    ratio = ["training.optimizer.lora_plus_lr_ratio=16"]  # of adapters, which full fine-tuning does not have
    others = ["training.train_last_blocks=1", "training.optimizer.name=adamw8bit", "model.backbone.freeze=true"]
    for overrides in ([], others[:2], [others[1]], ratio):
        assert budget_bytes(planner(tiny, f"{BUDGET}{budget}", *overrides, mode="qlora"), 8) == int(share * full)
    assert budget_bytes(planner(tiny, f"{BUDGET}{budget}", others[2], mode="default"), 8) == int(share * full)


def test_a_level_chosen_by_hand_has_no_budget(tiny):
    for level in ("true", "none", "blocks"):
        level = f"training.memory_optimization.gradient_checkpointing={level}"
        assert budget_bytes(planner(tiny, level, f"{BUDGET}lean"), 4) is None


def test_a_share_that_cannot_be_reached_is_said_and_a_size_is_refused(tiny, caplog):
    caplog.set_level(logging.WARNING, logger="tracknet")
    plan = plan_step(planner(tiny, f"{BUDGET}1%"), 4)
    assert plan.micro_batch == 1 and "budget=1%" in caplog.text and "is less than the smallest step" in caplog.text
    with pytest.raises(UserError, match=r"budget=1MB \(1 MB\) is less than the smallest step of this configuration"):
        plan_step(planner(tiny, f"{BUDGET}1MB"), 4)


def test_sizes_that_are_fixed_stay_and_levels_adapt_to_them(tiny):
    subject = planner(tiny, "training.micro_batch_size=4")
    limit = subject.at("full").estimate.peak_bytes(4)
    assert subject.at("none").estimate.peak_bytes(4) > limit
    plan = plan_step(subject, 8, limit)
    assert plan.micro_batch == 4 and plan.level != "none" and plan.peak_bytes <= limit
    whole = planner(tiny, "training.adaptive_micro_batch=false")
    assert plan_step(whole, 8, whole.at("full").estimate.peak_bytes(8)).micro_batch == 8


def test_a_micro_batch_that_the_user_set_is_not_blamed_on_memory(tiny, tmp_path, said):
    overrides = [*tiny("vit"), AUTO, "training.micro_batch_size=1", "training.max_steps=1"]
    assert train_run(compose("synthetic", "vit_tiny_heatmap", "default", overrides), tmp_path / "runs/r")["steps"] == 1
    assert not [line for line in said if line.startswith("Planned: ")]


def test_where_memory_runs_out_at_every_level_the_one_that_saves_the_most_is_taken(tiny):
    subject = planner(tiny)
    limit = subject.at("blocks").estimate.peak_bytes(9)
    plan = plan_step(subject, 16, limit, lambda level, size: float("inf"))
    assert plan.level != "none" and plan.micro_batch == 8


def test_offload_to_the_host_forces_no_level_on_a_cpu(tiny):
    subject = planner(tiny, "training.memory_optimization.use_cpu_offload=true")
    assert subject.levels == tuple(level for level in LEVELS if level != "selective"), "which no offload supports"
    # Every level can be planned, also under a bound for which all of them are tried.
    assert plan_step(subject, 8, 1).micro_batch == 1


def test_offload_recomputes_in_full_and_a_model_without_backbone_nothing(tiny):
    assert planner(tiny, "training.memory_optimization.use_disk_offload=true").levels == ("full",)
    config = compose("synthetic", "tracknet_v2", "default")
    assert Planner(config.model, config.training, 3, (128, 72), "cpu").levels == ("none",)


def test_the_timer_leaves_the_model_as_it_was(model):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    forwards = [block.forward for block in model.blocks]
    state = torch.get_rng_state()
    training = compose("synthetic", "vit_tiny_heatmap", "default").training
    time_level = make_timer(model.eval(), training, (128, 72), torch.device("cpu"))
    assert all(0 < time_level(level, 2) < 60 for level in ("none", "blocks", "full"))
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert [block.forward for block in model.blocks] == forwards and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_a_level_that_does_not_fit_takes_for_ever(model, monkeypatch):
    def short(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("tracknet.training.calibration.heatmap_loss", short)
    training = compose("synthetic", "vit_tiny_heatmap", "default").training
    assert make_timer(model, training, (128, 72), torch.device("cpu"))("none", 2) == float("inf")


def test_a_run_records_its_plan_and_resumes_with_it(tiny, tmp_path, said, monkeypatch, capsys):
    overrides = [*tiny("vit"), AUTO, f"{BUDGET}30%", "training.max_steps=2", "training.batch_size=4"]
    result = train_run(compose("synthetic", "vit_tiny_heatmap", "qlora", overrides), tmp_path / "runs/r")
    (line,) = (line for line in said if line.startswith("Planned: "))
    assert "budget=30%" in line and f"starting with micro-batches of {result['micro_batch_size']}" in line
    saved = load_config(tmp_path / "runs/r/config.yaml").training
    memory = MemoryConfig(saved.memory_optimization.checkpointing, "30%")
    assert saved.micro_batch_size == result["micro_batch_size"] < 4 and saved.memory_optimization == memory
    planned = Planner(compose("synthetic", "vit_tiny_heatmap", "qlora", overrides).model, saved, 3, (128, 72), "cpu")
    assert result["planned_peak_bytes"] == planned.estimate.peak_bytes(saved.micro_batch_size)

    def never(*args):
        raise AssertionError

    monkeypatch.setattr("tracknet.planning.step_plan.plan_step", never)
    again = load_config(tmp_path / "runs/r/config.yaml", ["training.max_steps=4"])
    assert train_run(again, tmp_path / "runs/r", resume=True)["micro_batch_size"] == saved.micro_batch_size
    # A memory setting that is changed on resume makes a new plan, unless the level or the size is given too.
    monkeypatch.undo()
    capsys.readouterr()
    for override, size in (("budget=free", 4), ("gradient_checkpointing=none", saved.micro_batch_size)):
        argv = [
            "train",
            "--resume",
            str(tmp_path / "runs/r"),
            f"training.memory_optimization.{override}",
            "training.max_steps=6",
        ]
        assert cli.main([*argv, "--dry-run"]) == 0
        config = yaml.safe_load(capsys.readouterr().out)["training"]
        replans = override.startswith("budget")
        assert config["micro_batch_size"] == (None if replans else size)
        assert config["memory_optimization"]["gradient_checkpointing"] == ("auto" if replans else "none")
