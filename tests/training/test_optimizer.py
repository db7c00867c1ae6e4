"""Optimizers, learning rates and schedules."""

import math

import pytest
import torch

from tests.quantization.test_apply import NF4, build
from tracknet.errors import UserError
from tracknet.quantization.adapters import LoraConfig
from tracknet.quantization.apply import QuantizationConfig
from tracknet.quantization.trainable_int8 import int8_layers
from tracknet.training import bnb_optimizers as bnb
from tracknet.training.optimizer import (
    OptimizerConfig,
    SchedulerConfig,
    build_optimizer,
    build_schedule,
    check_paged_supported,
    set_learning_rate,
    state_tensors,
    use_paged_state,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_parts_have_their_learning_rates_and_norms_no_decay(backbones):
    model = build(backbones, "vit")
    optimizer = build_optimizer(model, OptimizerConfig(lr=1.0, backbone_lr_scale=0.1, decoder_lr_scale=5.0), CPU)
    names = {id(p): n for n, p in model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for p in group["params"]:
            seen.add(names[id(p)])
            assert group["lr"] == (5.0 if names[id(p)].startswith("head") else 0.1)
            assert (group["weight_decay"] == 0) == (p.ndim < 2)
    assert seen == {n for n, p in model.named_parameters() if p.requires_grad}


def test_adapters_take_the_learning_rate_itself(backbones):
    model = build(backbones, "vit", NF4, LoraConfig())
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-4, backbone_lr_scale=0.1), CPU)
    adapters = {id(p) for n, p in model.named_parameters() if "lora_" in n}
    assert {g["lr"] for g in optimizer.param_groups for p in g["params"] if id(p) in adapters} == {1e-4}


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_it_steps(backbones, name):
    model = build(backbones, "vit")
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=1e-3), CPU)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    model(torch.randint(0, 256, (1, 3, 3, 72, 128), dtype=torch.uint8)).sum().backward()
    optimizer.step()
    moved = [n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert len(moved) > 0.9 * len(before)


def test_paged_optimizers_are_refused_without_a_gpu(backbones):
    with pytest.raises(UserError, match="use adamw8bit"):
        build_optimizer(build(backbones, "vit"), OptimizerConfig(name="paged_adamw8bit"), CPU)


def rates(config, total, epochs):
    schedule = build_schedule(config, total, epochs)
    return [schedule(step) for step in range(total)]


def test_warm_up_then_cosine():
    values = rates(SchedulerConfig(warmup_epochs=2, min_lr_ratio=0.1), total=100, epochs=10)
    assert values[:20] == sorted(values[:20]) and values[0] < 0.06
    assert max(values) == values[20] == 1.0
    assert values[20:] == sorted(values[20:], reverse=True) and values[-1] == pytest.approx(0.1, abs=0.01)


def test_a_capped_run_keeps_the_shape():
    values = rates(SchedulerConfig(warmup_epochs=5), total=10, epochs=20)
    assert max(values) == 1.0 and values.index(1.0) == 2


@pytest.mark.parametrize("warmup", [1, 4, 19])
def test_warm_up_begins_with_a_step_and_reaches_the_rate_after_its_last(warmup):
    """A first step with learning rate 0 would have no effect."""
    values = rates(SchedulerConfig(warmup_epochs=warmup), total=20, epochs=20)
    assert values[: warmup + 1] == pytest.approx([(i + 1) / (warmup + 1) for i in range(warmup + 1)])
    assert values[0] == 1 / (warmup + 1) > 0 and values[warmup] == 1.0 > values[warmup - 1]


def test_without_warm_up_the_first_step_has_the_whole_rate():
    for name in ("cosine", "constant"):
        assert rates(SchedulerConfig(name, warmup_epochs=0), total=10, epochs=5)[0] == 1.0


def test_cosine_is_half_way_down_at_half_time_and_stays_at_its_end():
    schedule = build_schedule(SchedulerConfig(warmup_epochs=2, min_lr_ratio=0.2), 100, 10)
    wanted = {step: 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * (step - 20) / 80)) for step in range(20, 101, 10)}
    assert {step: schedule(step) for step in wanted} == pytest.approx(wanted)
    assert schedule(60) == pytest.approx(0.6) and schedule(100) == schedule(101) == schedule(150) == pytest.approx(0.2)


def test_constant_stays_at_the_rate():
    values = rates(SchedulerConfig("constant", warmup_epochs=1), total=12, epochs=4)
    assert values == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 9])


def test_a_warm_up_longer_than_the_run_ends_with_it():
    for epochs in (4, 2, 1):
        values = rates(SchedulerConfig(warmup_epochs=4), total=8, epochs=epochs)
        assert values == pytest.approx([(i + 1) / 9 for i in range(8)])
    # The first step after a run that consists of warm-up only: no division by zero.
    assert build_schedule(SchedulerConfig(warmup_epochs=4, min_lr_ratio=0.5), 8, 4)(8) == 1.0
    assert build_schedule(SchedulerConfig(warmup_epochs=4, min_lr_ratio=0.5), 8, 4)(9) == pytest.approx(0.5)


def test_every_group_keeps_its_own_share_of_a_rate_that_changes(backbones):
    model = build(backbones, "vit")
    optimizer = build_optimizer(model, OptimizerConfig(lr=2.0, backbone_lr_scale=0.1, decoder_lr_scale=5.0), CPU)
    for factor in (0.5, 0.25, 1.0):  # relative to the base rate, not to the previous one
        first = set_learning_rate(optimizer, factor)
        assert first == optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * factor)
        assert {round(g["lr"] / factor, 6) for g in optimizer.param_groups} == {0.2, 10.0}


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_settings_reach_the_optimizer(backbones, name):
    config = OptimizerConfig(name=name, lr=3e-3, betas=(0.8, 0.95), weight_decay=0.3)
    optimizer = build_optimizer(build(backbones, "vit"), config, CPU)
    assert {tuple(g["betas"]) for g in optimizer.param_groups} == {(0.8, 0.95)}
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.3, 0.0} and optimizer.defaults["lr"] == 3e-3
    assert all(g["base_lr"] == g["lr"] for g in optimizer.param_groups)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw8bit", bnb.AdamW8bit), ("paged_adamw", bnb.PagedAdamW), ("paged_adamw8bit", bnb.PagedAdamW8bit)],
)
def test_each_name_is_the_optimizer_it_says(backbones, name, kind):
    """The state is created in the first step, so a paged optimizer can be built, but not used, without a GPU."""
    optimizer = build_optimizer(build(backbones, "vit"), OptimizerConfig(name=name, betas=(0.8, 0.95)), CUDA, seed=7)
    assert type(optimizer) is kind and optimizer.seed == 7 and optimizer.layers == {}
    assert optimizer.is_paged == name.startswith("paged")
    assert {tuple(g["betas"]) for g in optimizer.param_groups} == {(0.8, 0.95)}


def test_the_int8_layers_that_train_are_known_to_the_optimizer(backbones):
    model = build(backbones, "vit", QuantizationConfig(load_in_8bit=True, int8_trainable=True))
    optimizer = build_optimizer(model, OptimizerConfig(name="adamw8bit"), CPU)
    assert optimizer.layers == int8_layers(model) and len(optimizer.layers) == 12 and optimizer.seed == 0


def test_a_model_of_which_nothing_trains_is_refused(backbones):
    with pytest.raises(UserError, match="No parameter of the model is trained"):
        build_optimizer(build(backbones, "vit").requires_grad_(False), OptimizerConfig(), CPU)


def test_state_pages_only_where_there_is_a_gpu_and_only_where_offload_is_wanted():
    for device, offloads, name, given in (
        (CUDA, True, "adamw8bit", "paged_adamw8bit"),
        (CUDA, False, "adamw8bit", "adamw8bit"),
        (CPU, True, "adamw8bit", "adamw8bit"),
        (CUDA, True, "adamw", "adamw"),
        (CUDA, True, "paged_adamw", "paged_adamw"),
    ):
        config = use_paged_state(OptimizerConfig(name=name, lr=7.0), offloads, device)
        assert (config.name, config.lr) == (given, 7.0)
    check_paged_supported(OptimizerConfig(name="paged_adamw"), "cuda")
    check_paged_supported(OptimizerConfig(name="adamw8bit"), "cpu")
    with pytest.raises(UserError, match=r"this run is on cpu: use adamw\."):
        check_paged_supported(OptimizerConfig(name="paged_adamw"), "cpu")


def test_all_tensors_of_the_state_are_listed():
    parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    optimizer = torch.optim.AdamW(parameters)
    assert state_tensors(optimizer) == []
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    shapes = sorted(tuple(t.shape) for t in state_tensors(optimizer))
    assert shapes == [(), (), (3, 4), (3, 4), (5,), (5,)]


@pytest.mark.parametrize("name", ["lr", "backbone_lr_scale", "decoder_lr_scale", "weight_decay"])
def test_rates_outside_of_what_there_is_are_refused(name):
    for value in (-0.1, math.inf, math.nan, *([] if name == "weight_decay" else [0.0])):
        with pytest.raises(UserError, match=rf"training\.optimizer\.{name}={value}"):
            OptimizerConfig(**{name: value})
    for value in (0.01, 0.99, 5.0, *([0.0] if name == "weight_decay" else [])):
        assert getattr(OptimizerConfig(**{name: value}), name) == value


def test_moments_and_schedules_outside_of_what_there_is_are_refused():
    for betas in ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, math.nan)):
        with pytest.raises(UserError, match=r"training\.optimizer\.betas="):
            OptimizerConfig(betas=betas)
    assert OptimizerConfig(betas=(0.0, 0.0)).betas == (0.0, 0.0)
    for name, value in (
        ("warmup_epochs", -0.1),
        ("warmup_epochs", math.inf),
        ("min_lr_ratio", -0.1),
        ("min_lr_ratio", 1.1),
    ):
        with pytest.raises(UserError, match=rf"training\.scheduler\.{name}={value}"):
            SchedulerConfig(**{name: value})
    for ratio in (0.0, 1.0):
        assert SchedulerConfig(warmup_epochs=0.0, min_lr_ratio=ratio).min_lr_ratio == ratio
