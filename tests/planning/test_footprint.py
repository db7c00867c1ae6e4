"""What is made of a plan: peaks on a line through two measurements, and the largest part that fits."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, DINOv3ViTConfig

from tests.quantization.test_apply import NAMES
from tracknet.config import compose
from tracknet.errors import UserError
from tracknet.memory.checkpointing import PART
from tracknet.memory.step_meter import KINDS, StepMeter, StepPeak
from tracknet.models.families import FAMILIES
from tracknet.models.heatmap_model import build_model
from tracknet.planning.estimate import MemoryEstimate, _part_sizes, _state_bytes, estimate_memory, usable_bytes
from tracknet.training.losses import heatmap_loss

NO_CHECKPOINTS = "training.memory_optimization.gradient_checkpointing=none"


def estimate(activations=lambda n: 100 * n, temporary=lambda n: 10 * n + 7, parts=None, update=0):
    """Of a step whose bytes are known; it notes what was measured."""
    asked = []

    def measure(windows):
        asked.append(windows)
        kinds = dict.fromkeys(KINDS, 10**9) | {"activations": activations(windows), "temporary": temporary(windows)}
        return StepPeak(0, kinds, "backward", "")

    return MemoryEstimate(1000, 200, 30, 4, update, measure, parts), asked


def test_a_peak_is_made_of_weights_gradients_state_and_what_a_step_takes():
    plan, _ = estimate()
    assert plan.bytes_by_kind(3) == dict(zip(KINDS, (1000, 200, 30, 4, 300, 37)))
    assert plan.peak_bytes(3) == 1000 + 200 + 30 + 4 + 300 + 37


@pytest.mark.parametrize(("update", "last"), [(336, (300, 37)), (337, (300, 37)), (338, (0, 338))])
def test_an_update_that_takes_more_than_backward_is_the_peak(update, last):
    assert tuple(estimate(update=update)[0].bytes_by_kind(3).values())[4:] == last


@pytest.mark.parametrize("windows", [1, 2, 3, 9, 64])
def test_without_parts_two_small_measurements_say_all(windows):
    plan, asked = estimate()
    assert tuple(plan.bytes_by_kind(windows).values())[4:] == (100 * windows, 10 * windows + 7)
    assert set(asked) == ({windows} if windows <= 2 else {1, 2})


@pytest.mark.parametrize(
    ("windows", "asked"),
    [(1, {1}), (2, {2}), (3, {1, 2}), (4, {1, 2}), (5, {5}), (12, {12}), (18, {18}), (19, {12, 18}), (60, {12, 18})],
)
def test_where_blocks_go_in_parts_the_line_begins_at_two_of_the_largest(windows, asked):
    """Parts of 4 to 6 windows: to 4 all goes at once; from two parts of 6 on, all is on a line, in between on none."""
    plan, measured = estimate(
        lambda n: 100 * n if n <= 4 else 50 * n + 20, lambda n: 10 * n if n <= 4 else 60, parts=(4, 6)
    )
    found = tuple(plan.bytes_by_kind(windows).values())[4:]
    assert found == ((100 * windows, 10 * windows) if windows <= 4 else (50 * windows + 20, 60))
    assert set(measured) == asked


def test_a_line_that_falls_does_not_fall_below_zero():
    plan, _ = estimate(lambda n: 100 - 10 * n, lambda n: 50 - 10 * n)
    assert tuple(plan.bytes_by_kind(20).values())[4:] == (0, 0)


@pytest.mark.parametrize("shape", [lambda n: 100 * n, lambda n: 3 * n * n, lambda n: 100 * (n // 4 + 1)])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_the_largest_part_fits_and_one_window_more_does_not(shape, batch):
    plan, _ = estimate(lambda n: shape(n), lambda n: 0, parts=(0, 10**6))
    peaks = [plan.peak_bytes(n) for n in range(1, batch + 1)]
    for available in sorted({p + d for p in peaks for d in (-1, 0, 1)}):
        assert plan.largest_micro_batch(available, batch) == sum(p <= available for p in peaks)


def test_few_measurements_find_the_largest_part():
    plan, asked = estimate(lambda n: 100 * n, lambda n: 0, parts=(0, 10**6))
    assert plan.largest_micro_batch(1234 + 100 * 700 + 50, 1000) == 700
    assert set(asked) == {1000, 1, 700, 701}


def test_bytes_by_window_leave_out_what_does_not_depend_on_it():
    assert estimate()[0].bytes_per_window(5) == (500 + 57) // 5


def test_a_gpu_has_less_for_tensors_than_it_has():
    assert usable_bytes(8 * 10**9) == int(7.4e9 * 0.94)


@pytest.mark.parametrize(
    ("numel", "optimizer", "size"),
    [
        (4096, "adamw", 8 * 4096),
        (4095, "adamw8bit", 8 * 4095),
        (4096, "adamw8bit", 2 * (4096 + 4 * 16)),
        (4097, "paged_adamw8bit", 2 * (4097 + 4 * 17)),
        (5000, "paged_adamw", 8 * 5000),
    ],
)
def test_moments_take_four_bytes_a_value_or_one_and_a_scale_for_256(numel, optimizer, size):
    assert _state_bytes(numel, optimizer) == size


def plan(backbones, kind="vit", mode="default", *overrides, device="cuda", size=(128, 72)):
    config = compose(
        "synthetic",
        f"{kind}_tiny_heatmap",
        mode,
        [f"model.backbone.name={backbones[kind]}", NO_CHECKPOINTS, *overrides],
    )
    return estimate_memory(config.model, config.training, 3, size, device)


OFFLOAD = "training.memory_optimization."


def test_offload_takes_off_a_device_what_it_can(backbones):
    """Frozen weights of blocks, activations and 8-bit state leave a GPU; of a CPU only files take anything."""
    level, qlora = f"{OFFLOAD}gradient_checkpointing=blocks", "qlora"
    eight = "training.optimizer.name=adamw8bit"
    plain = plan(backbones, "vit", qlora, level, eight)
    there = plan(backbones, "vit", qlora, level, eight, f"{OFFLOAD}use_cpu_offload=true")
    assert there.weights < plain.weights and there.optimizer == 0 < plain.optimizer
    assert there.peak_bytes(1) < plain.peak_bytes(1)
    on_cpu = plan(backbones, "vit", qlora, level, eight, f"{OFFLOAD}use_cpu_offload=true", device="cpu")
    assert on_cpu.bytes_by_kind(1) == plain.bytes_by_kind(1)
    disk = plan(backbones, "vit", qlora, level, eight, f"{OFFLOAD}use_disk_offload=true", device="cpu")
    assert disk.weights == there.weights and disk.optimizer == 0


@pytest.mark.parametrize(
    ("device", "cpu", "disk", "leaves"),
    [
        ("cuda", False, False, False),
        ("cuda", True, False, True),
        ("cuda", False, True, True),
        ("cpu", True, False, False),
        ("cpu", False, True, True),
        ("cpu", True, True, False),
    ],
)
def test_activations_leave_what_is_planned_for_as_they_will(backbones, device, cpu, disk, leaves):
    settings = [f"{OFFLOAD}use_cpu_offload={cpu}", f"{OFFLOAD}use_disk_offload={disk}", "model.decoder.channels=32"]
    kept = plan(backbones, "vit", "default", *settings, device=device, size=(256, 144)).bytes_by_kind(2)
    assert (kept["activations"] < 4_500_000) == leaves


def test_32_bit_state_stays_on_a_gpu_and_leaves_a_cpu(backbones):
    settings = [f"{OFFLOAD}use_disk_offload=true", "training.optimizer.name=adamw"]
    assert plan(backbones, "vit", "default", *settings).optimizer > 0
    assert plan(backbones, "vit", "default", *settings, device="cpu").optimizer == 0


def test_int8_weights_that_train_become_fp32_one_layer_at_a_time(backbones):
    found = plan(backbones, "vit", "int8_full")
    model = build_model(
        compose("synthetic", "vit_tiny_heatmap", "default", [f"model.backbone.name={backbones['vit']}"]).model, 3
    )
    largest = max(m.weight.numel() for m in model.backbone.hf.encoder.modules() if isinstance(m, torch.nn.Linear))
    assert found.update == 16 * largest and plan(backbones, "vit", "default").update == 0


def test_pages_are_refused_where_there_are_none(backbones):
    with pytest.raises(UserError, match="this run is on cpu"):
        plan(backbones, "vit", "default", "training.optimizer.name=paged_adamw8bit", device="cpu")
    assert plan(backbones, "vit", "default", "training.optimizer.name=paged_adamw8bit").optimizer > 0


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("size", [(512, 288), (640, 384), (128, 72)])
def test_parts_of_a_plan_are_those_in_which_blocks_really_go(backbones, kind, size):
    config = compose("synthetic", f"{kind}_tiny_heatmap", "default", [f"model.backbone.name={backbones[kind]}"]).model
    model = build_model(config, 3)
    values = []
    for block in model.backbone.family.blocks(model.backbone.hf):
        block.register_forward_pre_hook(lambda _, args: values.append(args[0].numel()))
    with torch.no_grad():
        model.backbone(torch.zeros(3, 3, size[1], size[0], dtype=torch.uint8))
    blocks = [max(1, PART // number) for number in values]
    decoder = max(1, PART // (3 * 3 * size[0] * size[1]))
    assert blocks

    def at_work(place):
        return lambda windows: StepPeak(0, {}, "backward", place)

    least, most = _part_sizes(model, size, at_work("backbone.hf"))
    # But for the one token that is no patch.
    assert (least, most) == pytest.approx((min(decoder, *blocks), max(blocks)), rel=0.02)
    assert _part_sizes(model, size, at_work("head.fuse")) == (least, max(decoder, most))


def test_weights_are_planned_without_being_looked_at(backbones, tmp_path):
    """A plan reads an architecture: a backbone without its weights has one, too."""
    folder = tmp_path / "architecture"
    folder.mkdir()
    (folder / "config.json").write_text((backbones["vit"] / "config.json").read_text())
    found = plan({"vit": folder}, "vit", "default", size=(64, 40))
    assert replace(found, measure=None) == replace(plan(backbones, "vit", "default", size=(64, 40)), measure=None)


@pytest.mark.parametrize(
    ("kind", "channels", "size", "least", "of_blocks", "of_decoder", "asked"),
    [
        # Windows whose values (three frames of tokens, or of the input's pixels and colors) are 2^22.
        ("vit", [1024], (56, 42), 113, 113, 198, 198),
        ("vit", [4096], (56, 42), 28, 28, 198, 56),
        ("vit", [4096], (1148, 1148), 1, 1, 1, None),
        ("convnext", [96, 192, 384, 768], (512, 288), 1, 12, 3, None),
        ("convnext", [96, 192, 384, 768], (64, 64), 56, 455, 113, None),
    ],
)
def test_the_smallest_and_the_largest_part_are_those_of_the_widest_and_the_narrowest(
    kind, channels, size, least, of_blocks, of_decoder, asked
):
    config = SimpleNamespace(hidden_sizes=channels, hidden_size=channels[0], num_hidden_layers=2, patch_size=14)
    family = FAMILIES["dinov2" if kind == "vit" else "convnext"]
    backbone = SimpleNamespace(
        family=family, size_multiple=family.size_multiple(config), hf=SimpleNamespace(config=config)
    )
    model = SimpleNamespace(num_frames=3, backbone=backbone)
    for place, most in (("head.fuse", max(of_blocks, of_decoder)), ("backbone.hf", of_blocks)):
        measured = []
        found = _part_sizes(
            model, size, lambda n, place=place, seen=measured: seen.append(n) or StepPeak(0, {}, "", place)
        )
        assert found == (least, most) and measured == ([asked] if asked is not None else [])


def test_columns_of_outliers_are_not_planned(backbones):
    """They depend on content, which a plan has none of."""
    with_outliers = plan(backbones, "vit", "int8", "training.quantization.llm_int8_threshold=6.0", size=(64, 40))
    without = plan(backbones, "vit", "int8", "training.quantization.llm_int8_threshold=0.0", size=(64, 40))
    assert with_outliers.bytes_by_kind(1) == without.bytes_by_kind(1)


def test_a_plan_leaves_nothing_for_a_real_step_to_meet(tmp_path):
    """DINOv3 keeps the coordinates of patches by size of the picture: those of a plan have no content."""
    torch.manual_seed(0)
    AutoModel.from_config(
        DINOv3ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=16)
    ).save_pretrained(tmp_path)
    config = compose("synthetic", "vit_tiny_heatmap", "default", [f"model.backbone.name={tmp_path}", NO_CHECKPOINTS])
    frames = torch.zeros(1, 3, 3, 32, 64, dtype=torch.uint8)
    model = build_model(config.model, 3)
    before = model(frames)
    for _ in range(2):
        assert estimate_memory(config.model, config.training, 3, (64, 32)).peak_bytes(1) > 0
        assert torch.equal(model(frames), before)


def test_a_planned_step_is_to_the_byte_the_real_one(backbones):
    """At full precision, where a CPU computes as a GPU does."""
    config = compose(
        "synthetic",
        "vit_tiny_heatmap",
        "default",
        [f"model.backbone.name={backbones['vit']}", "training.precision=fp32", NO_CHECKPOINTS],
    )
    estimate = estimate_memory(config.model, config.training, 3, (64, 40))
    planned = estimate.measure(2)
    model = build_model(config.model, 3).train()
    batch = {
        "frames": torch.zeros(2, 3, 3, 40, 64, dtype=torch.uint8),
        "xy": torch.ones(2, 3, 2),
        "visible": torch.ones(2, 3, dtype=torch.bool),
        "weight": torch.ones(2, 3),
    }
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with StepMeter(model, [], list(batch.values())) as meter:
        (heatmap_loss(model(batch["frames"]), batch, config.training.loss) / 1.0).backward()
    assert planned.by_kind == meter.result().by_kind
    assert estimate.gradients == planned.by_kind["gradients"]
