"""Micro-batches as CUDA graphs: the same training as without, and a reason where there are none."""

import copy
import math

import pytest
import torch

from tracknet.api.train import train_run
from tracknet.config import compose
from tracknet.errors import UserError
from tracknet.models.heatmap_model import build_model
from tracknet.quantization.apply import apply_mode
from tracknet.runs.load import load_run
from tracknet.training.cuda_graphs import MicroBatchGraphs, agrees, reason_against
from tracknet.training.losses import heatmap_loss

GPU = torch.device("cuda")
NONE, FULL = (f"training.memory_optimization.gradient_checkpointing={level}" for level in ("none", "full"))


def reason(tiny, *overrides, mode="default", kind="vit", device=GPU):
    config = compose("synthetic", f"{kind}_tiny_heatmap", mode, [*tiny(kind), NONE, *overrides])
    model = build_model(config.model, 3)
    apply_mode(model, config.training.mode, torch.device("cpu"), True)
    with pytest.MonkeyPatch.context() as patch:  # this machine's GPU, if there is one, does not matter
        patch.setattr("tracknet.quantization.recomputed_dropout.supports_triton", lambda _: True)
        return reason_against(model, config.training, device)


def test_what_cannot_be_captured_says_why(tiny):
    assert reason(tiny) is None and reason(tiny, FULL) is None
    assert reason(tiny, mode="qlora", kind="convnext") is None
    assert "not a GPU" in reason(tiny, device=torch.device("cpu"))
    assert "cuda_graphs is off" in reason(tiny, "training.cuda_graphs=off")
    assert "offload" in reason(tiny, "training.memory_optimization.use_cpu_offload=true")
    assert reason(tiny, "training.compile=true") is None


def test_outliers_that_are_counted_on_the_host_cannot_be_captured(tiny):
    assert reason(tiny, "training.quantization.llm_int8_threshold=0", mode="int8") is None
    assert "int8_kernel" in reason(tiny, "training.int8_kernel=bitsandbytes", mode="int8")


def test_dropout_that_the_host_draws_cannot_be_captured(tiny):
    """GPUs without the kernels, and ranks that are too large for them."""
    assert reason(tiny, "training.lora.lora_dropout=0", mode="lora") is None
    assert "dropout of adapters" in reason(tiny, "training.lora.r=65", mode="lora")


def test_random_numbers_that_recomputation_repeats_cannot_be_captured(tiny):
    """Adapters draw by window, on the device; what a backbone draws itself comes from torch's generator."""
    assert reason(tiny, FULL, mode="lora") is None
    config = compose("synthetic", "vit_tiny_heatmap", "default", [*tiny("vit"), FULL])
    model = build_model(config.model, 3)
    assert reason_against(model, config.training, GPU) is None
    model.backbone.hf.config.hidden_dropout_prob = 0.1
    assert "random numbers" in reason_against(model, config.training, GPU)
    without = compose("synthetic", "vit_tiny_heatmap", "default", [*tiny("vit"), NONE])
    assert reason_against(model, without.training, GPU) is None  # nothing is recomputed


def test_another_value_is_an_error(tiny):
    with pytest.raises(UserError, match="cuda_graphs"):
        compose("synthetic", "vit_tiny_heatmap", "default", [*tiny("vit"), "training.cuda_graphs=always"])


def test_a_replay_that_differs_from_an_eager_run_is_an_error():
    sums, weight, bias = torch.tensor([3.0, 1.0]), torch.randn(8, 8), torch.randn(8)
    assert agrees([sums, weight, bias], [sums, weight * 1.01, bias])
    with pytest.raises(RuntimeError, match="results of a replay differ"):
        agrees([sums * 1.1, weight, bias], [sums, weight, bias])
    with pytest.raises(RuntimeError, match="gradients of a replay differ"):
        agrees([sums, weight * 0, bias], [sums, weight, bias])
    with pytest.raises(RuntimeError, match="differ"):
        agrees([sums, weight * torch.nan, bias], [sums, weight, bias])
    assert not agrees([sums, weight * torch.nan], [sums, weight * torch.inf])  # an overflow, which fp16 skips
    assert agrees([sums, weight * 0], [sums, weight * 0])


@pytest.fixture
def train(tiny, tmp_path, monkeypatch):
    """Return a function that trains on the GPU and returns the final weights and the number of replays."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Sums on the GPU are added in a fixed order, without which two eager runs differ as well.
    torch.use_deterministic_algorithms(True, warn_only=True)
    runners = []
    init = MicroBatchGraphs.__init__

    def collect(self, model):
        init(self, model)
        runners.append(self)

    monkeypatch.setattr(MicroBatchGraphs, "__init__", collect)

    def run(name, mode, *overrides, steps=(12,)):
        runners.clear()
        base = [
            *tiny("vit"),
            "training.device=cuda",
            "training.precision=bf16",
            "training.batch_size=5",
            "training.micro_batch_size=2",
            *overrides,
        ]
        for number, last in enumerate(steps):
            config = compose("synthetic", "vit_tiny_heatmap", mode, [*base, f"training.max_steps={last}"])
            train_run(config, tmp_path / name / "runs/r", resume=number > 0)
        weights = load_run(tmp_path / name / "runs/r", "last")[1].state_dict()
        return copy.deepcopy(weights), sum(runner.num_replays for runner in runners)

    yield run
    torch.use_deterministic_algorithms(False)


def equal(one, two):
    return all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["default", "frozen", "lora", "int8", "qlora", "int8_full"])
@pytest.mark.parametrize("level", ["none", "full", "selective"])
def test_graphs_train_what_eager_steps_train(train, mode, level):
    """With micro-batches of two sizes, dropout, validations in between, and a run that was resumed in the middle."""
    overrides = ["training.int8_kernel=triton"] if mode.startswith("int8") else []
    overrides.append(f"training.memory_optimization.gradient_checkpointing={level}")
    eager, none = train("eager", mode, *overrides, "training.cuda_graphs=off")
    again, _ = train("again", mode, *overrides, "training.cuda_graphs=off")
    graphed, replays = train("graphed", mode, *overrides)
    resumed, _ = train("resumed", mode, *overrides, steps=(5, 12))
    assert none == 0 and replays > 6
    if equal(eager, again):
        assert equal(eager, graphed) and equal(eager, resumed)
    else:  # a kernel without a deterministic variant
        for name, wanted in eager.items():
            if wanted.is_floating_point():
                spread = (again[name] - wanted).abs().max() * 20 + 1e-3
                assert (graphed[name] - wanted).abs().max() <= spread, name
    assert all(t.isfinite().all() for t in graphed.values() if t.is_floating_point())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_graphs_train_in_fp16_too(train):
    """The scale of the loss is a tensor that changes between replays, and a step with an overflow is skipped."""
    fp16, off = "training.precision=fp16", "training.cuda_graphs=off"
    eager, again = (train(name, "default", fp16, off)[0] for name in ("eager", "again"))
    graphed, replays = train("graphed", "default", fp16)
    assert replays > 6 and (equal(eager, graphed) or not equal(eager, again))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_memory_that_runs_out_between_replays_changes_nothing(train, monkeypatch):
    run, calls = MicroBatchGraphs.run, []

    def short(self, *args):
        calls.append(self.num_replays)
        if len(calls) == 17:  # in a step of replays: parts of the batch are done already
            assert self.num_replays > 0
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, *args)

    wanted, _ = train("wanted", "lora", "training.cuda_graphs=off")
    monkeypatch.setattr(MicroBatchGraphs, "run", short)
    weights, replays = train("short", "lora")
    assert replays > 0
    worst = max((weights[n] - t).abs().max().item() for n, t in wanted.items() if t.is_floating_point())
    assert worst < 1e-2 and math.isfinite(worst)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_waits_for_the_device_trains_eagerly_and_says_so(train, monkeypatch, said):
    def waits(logits, batch, config):
        return heatmap_loss(logits, batch, config) + 0 * logits.sum().item()

    monkeypatch.setattr("tracknet.training.step.heatmap_loss", waits)
    _, replays = train("waits", "frozen")
    assert replays == 0 and torch.cuda.current_stream() == torch.cuda.default_stream()
    assert any("without CUDA graphs" in line and "captured" in line for line in said)


@pytest.mark.gpu
def test_a_graph_that_would_replay_a_value_of_the_host_is_refused(said):
    """A factor that is read on the host is captured as a constant, so replays would not follow it."""
    model, factor = torch.nn.Linear(4, 4, device=GPU), [1.0]
    graphs = MicroBatchGraphs(model)

    def forward_backward(batch, normalizer):
        factor[0] += 1
        loss = model(batch["x"]).square().sum() * factor[0] / normalizer
        loss.backward()
        return loss.detach()[None]

    sums = []
    for _ in range(4):
        model.zero_grad()
        sums.append(
            graphs.run({"x": torch.ones(2, 4, device=GPU)}, torch.ones((), device=GPU), forward_backward).item()
        )
    assert graphs.num_replays == 1 and any("differ from those of an eager run" in line for line in said)
    assert sums == sorted(sums) and sums[3] > sums[2] > sums[1]


@pytest.mark.gpu
def test_memory_of_graphs_is_free_once_they_are_dropped():
    torch.cuda.synchronize()
    model = torch.nn.Linear(1024, 1024, device=GPU)
    graphs = MicroBatchGraphs(model)

    def forward_backward(batch, normalizer):
        y = batch["x"]
        for _ in range(8):
            y = torch.tanh(model(y))
        loss = y.square().mean() / normalizer
        loss.backward()
        return loss.detach()[None]

    before = torch.cuda.memory_reserved()
    gradients = []
    for _ in range(4):
        model.zero_grad(set_to_none=not graphs.has_gradients)
        torch.manual_seed(0)
        batch = {"x": torch.randn(8192, 1024, device=GPU)}
        graphs.run(batch, torch.ones((), device=GPU), forward_backward)
        gradients.append(model.weight.grad.clone())
    assert graphs.num_replays == 3  # one of them to compare with
    assert all(torch.allclose(g, gradients[0], rtol=1e-4, atol=1e-7) for g in gradients[1:])
    held = torch.cuda.memory_reserved()
    graphs.drop()
    assert held - torch.cuda.memory_reserved() > 8 * 8192 * 1024 * 4
    assert torch.cuda.memory_reserved() - before < 200e6
