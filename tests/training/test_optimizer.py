import pytest
import torch

from tests.quantization.test_apply import NF4, build
from tracknet.errors import UserError
from tracknet.quantization.lora import LoraConfig
from tracknet.training.optimizer import OptimizerConfig, SchedulerConfig, build_optimizer, build_schedule

CPU = torch.device("cpu")


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
