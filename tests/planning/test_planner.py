"""Advice names what is not set yet, in the words of the command line, and what it would save."""

from dataclasses import replace

import pytest

from tracknet.config import compose
from tracknet.planning.planner import Planner

MEMORY = "training.memory_optimization."


def planner(backbones, mode, *overrides, device="cuda", size=(64, 40), kind="vit"):
    config = compose(
        "synthetic",
        f"{kind}_tiny_heatmap",
        mode,
        [f"model.backbone.name={backbones[kind]}", f"{MEMORY}gradient_checkpointing=none", *overrides],
    )
    return Planner(config.model, config.training, 3, size, device)


def settings(plan):
    return [setting for setting, _ in plan.alternatives()]


RESIZE = "data.preprocess.resize=[48,32] (also makes the ball smaller)"


def test_what_may_be_changed_is_said_from_the_mildest_to_the_last_resort(backbones):
    assert settings(planner(backbones, "default")) == [
        f"{MEMORY}gradient_checkpointing=selective",
        f"{MEMORY}gradient_checkpointing=blocks",
        f"{MEMORY}gradient_checkpointing=full",
        "--training qlora",
        "training.optimizer.name=adamw8bit",
        f"{MEMORY}use_cpu_offload=true",
        RESIZE,
    ]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_offload_is_suggested_with_a_level_that_it_supports(backbones, device):
    plan = planner(backbones, "default", f"{MEMORY}gradient_checkpointing=selective", device=device)
    offload = "use_cpu_offload" if device == "cuda" else "use_disk_offload"
    found = dict(plan.alternatives())
    memory = found[f"{MEMORY}{offload}=true {MEMORY}gradient_checkpointing=full"].training.memory_optimization
    assert getattr(memory, offload) and memory.checkpointing == "full"
    assert f"{MEMORY}gradient_checkpointing=full" in found and "MB less" in plan.suggest_settings(2)


@pytest.mark.parametrize(
    ("mode", "overrides", "device", "left"),
    [
        (
            "default",
            [f"{MEMORY}gradient_checkpointing=blocks"],
            "cuda",
            [
                f"{MEMORY}gradient_checkpointing=full",
                "--training qlora",
                "training.optimizer.name=adamw8bit",
                f"{MEMORY}use_cpu_offload=true",
            ],
        ),
        (
            "qlora",
            [f"{MEMORY}gradient_checkpointing=full", "training.optimizer.name=adamw8bit"],
            "cuda",
            [f"{MEMORY}use_cpu_offload=true"],
        ),
        (
            "int8",
            [f"{MEMORY}gradient_checkpointing=full", "training.optimizer.name=adamw8bit"],
            "cuda",
            ["--training qlora", f"{MEMORY}use_cpu_offload=true"],
        ),
        (
            "qlora",
            [
                f"{MEMORY}gradient_checkpointing=full",
                "training.optimizer.name=adamw8bit",
                f"{MEMORY}use_cpu_offload=true",
            ],
            "cuda",
            [f"{MEMORY}use_disk_offload=true"],
        ),
        (
            "qlora",
            [
                f"{MEMORY}gradient_checkpointing=full",
                "training.optimizer.name=paged_adamw",
                f"{MEMORY}use_cpu_offload=true",
                f"{MEMORY}use_disk_offload=true",
            ],
            "cuda",
            [],
        ),
        (
            "qlora",
            [f"{MEMORY}gradient_checkpointing=full", "training.optimizer.name=adamw8bit"],
            "cpu",
            [f"{MEMORY}use_disk_offload=true"],
        ),
    ],
)
def test_what_is_set_already_is_no_advice(backbones, mode, overrides, device, left):
    assert settings(planner(backbones, mode, *overrides, device=device)) == [*left, RESIZE]


def test_a_baseline_has_neither_blocks_nor_modes():
    config = compose("synthetic", "tracknet_v2", "default", [])
    assert settings(Planner(config.model, config.training, 3, (512, 288))) == [
        "training.optimizer.name=adamw8bit",
        f"{MEMORY}use_cpu_offload=true",
        "data.preprocess.resize=[384,216] (also makes the ball smaller)",
    ]


def test_each_alternative_is_the_plan_with_that_setting_and_no_other(backbones):
    plan = planner(backbones, "default")
    found = dict(plan.alternatives())
    training, memory = plan.training, plan.training.memory_optimization

    def changed(**settings):
        return replace(plan, training=replace(training, **settings))

    for level in ("blocks", "full"):
        setting = f"{MEMORY}gradient_checkpointing={level}"
        assert found[setting] == changed(memory_optimization=replace(memory, gradient_checkpointing=level))
    offload = changed(memory_optimization=replace(memory, use_cpu_offload=True))
    assert found[f"{MEMORY}use_cpu_offload=true"] == offload
    disk = replace(offload.training.memory_optimization, use_disk_offload=True)
    assert dict(offload.alternatives())[f"{MEMORY}use_disk_offload=true"] == replace(
        plan, training=replace(training, memory_optimization=disk)
    )
    eight = found["training.optimizer.name=adamw8bit"]
    assert eight == changed(optimizer=replace(training.optimizer, name="adamw8bit"))
    assert found[RESIZE] == replace(plan, input_wh=(48, 32))
    qlora = found["--training qlora"].training
    assert qlora.quantization.load_in_4bit and qlora.lora is not None and qlora.trainable == "auto"
    assert qlora.train_last_blocks == "50%"
    assert replace(qlora, quantization=None, lora=None, trainable="auto", train_last_blocks=None) == training


def test_the_smallest_frames_are_eight_pixels(backbones):
    assert settings(planner(backbones, "default", size=(8, 8)))[-1].startswith("data.preprocess.resize=[8,8]")


def test_a_footprint_is_estimated_once_for_all_that_the_bytes_depend_on(backbones):
    plan = planner(backbones, "default")
    assert plan.estimate is planner(backbones, "default", "training.epochs=7", "training.grad_clip=3").estimate
    others = [
        planner(backbones, "default", size=(48, 32)),
        planner(backbones, "default", device="cpu"),
        planner(backbones, "default", "training.optimizer.name=adamw8bit"),
        planner(backbones, "default", f"{MEMORY}gradient_checkpointing=blocks"),
        planner(backbones, "default", "training.precision=fp32"),
        planner(backbones, "default", "model.decoder.channels=64"),
        replace(plan, num_frames=2),
    ]
    assert len({id(p.estimate) for p in [plan, *others]}) == 8


def test_advice_says_what_takes_most_and_the_three_settings_that_save_most(backbones):
    plan = planner(backbones, "default", "model.decoder.channels=32", size=(128, 72))
    kinds = plan.estimate.bytes_by_kind(1)
    peak, largest = sum(kinds.values()), max(kinds, key=kinds.get)
    saved = {setting: peak - other.estimate.peak_bytes(1) for setting, other in plan.alternatives()}
    best = sorted(saved, key=lambda setting: (saved[setting], setting), reverse=True)[:3]
    assert saved[best[2]] > 0.02 * peak
    assert plan.suggest_settings(1) == "\n".join(
        [
            f"A step takes {peak / 1e6:,.0f} MB, most of it ({kinds[largest] / 1e6:,.0f} MB) for {largest}.",
            "What would save most:",
            *(f"  {setting}: {saved[setting] / 1e6:,.0f} MB less" for setting in best),
        ]
    )


def test_where_nothing_saves_anything_no_setting_is_named(backbones):
    plan = planner(
        backbones,
        "qlora",
        f"{MEMORY}gradient_checkpointing=full",
        "training.optimizer.name=adamw8bit",
        f"{MEMORY}use_disk_offload=true",
        device="cpu",
        size=(8, 8),
    )
    assert settings(plan) == ["data.preprocess.resize=[8,8] (also makes the ball smaller)"]
    assert plan.suggest_settings(1).startswith("A step takes ") and "\n" not in plan.suggest_settings(1)
