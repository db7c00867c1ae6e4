"""Micro-batches as CUDA graphs.

Forward and backward of a micro-batch launch thousands of short kernels, and on a fast GPU the host takes longer to
launch them than the GPU takes to run them. As a CUDA graph (captured once, then replayed) they are a single launch.

A graph reads its inputs from, and adds gradients to, tensors at fixed addresses. It also keeps the memory of a whole
micro-batch, which nothing else can use. So graphs exist only between training steps of the same shape, and are dropped
before anything else that needs much memory.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tracknet.errors import first_line
from tracknet.memory.micro_batch import free_cached_memory
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.quantization.recomputed_dropout import DropoutLinear
from tracknet.training.config import TrainingConfig

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
# Forward and backward of a micro-batch: takes it and the normalizers, adds gradients, and returns sums to be reported.
ForwardBackward = Callable[[Batch, Tensor], Tensor]

EAGER_RUNS = 2  # runs of a shape before it is captured: the first one creates handles and workspaces of libraries
TOLERANCE = 0.02  # largest relative difference of a replay from an eager run
MAX_GRAPHS = 2  # full micro-batches, and the smaller last one of a batch


@dataclass
class _Graph:
    """Captured micro-batch.

    Attributes:
        graph: graph of forward and backward.
        inputs: micro-batch that the graph reads.
        normalizer: normalizers that it reads.
        sums: sums that it writes.
        gradients: gradients that it adds to, by parameter.
    """

    graph: torch.cuda.CUDAGraph
    inputs: Batch
    normalizer: Tensor
    sums: Tensor
    gradients: list[tuple[nn.Parameter, Tensor]]

    @property
    def is_current(self) -> bool:
        """Return whether the parameters still have the gradients that the graph adds to."""
        return all(parameter.grad is gradient for parameter, gradient in self.gradients)


class MicroBatchGraphs:
    """Runner of micro-batches that captures each shape once it has run eagerly, and then replays it.

    The first replay of a shape is compared with an eager run of the same micro-batch: work that a library queues on
    another stream, or that depends on a value on the host, is not a part of the graph, and nothing else would show it.

    Args:
        model: model in training mode.

    Attributes:
        enabled: ``False`` while every micro-batch has to run eagerly, as in a step whose memory is measured.
        num_replays: number of micro-batches that were replayed.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._graphs: dict[Hashable, _Graph] = {}
        self._runs: Counter[Hashable] = Counter()  # eager runs by shape
        self._checked: set[Hashable] = set()  # shapes whose graph agreed with an eager run
        self._refused = False  # whether a micro-batch could not be captured
        self._trained: list[nn.Parameter] = []  # parameters that have had a gradient in an eager run
        # Autograd runs backward on the stream of forward, and a capture must not touch the default stream.
        self._stream = torch.cuda.Stream()
        self.enabled = True
        self.num_replays = 0

    @property
    def has_gradients(self) -> bool:
        """Return whether graphs add to the parameters' gradients, which are then zeroed instead of freed."""
        return bool(self._graphs)

    def run(self, batch: Batch, normalizer: Tensor, forward_backward: ForwardBackward) -> Tensor:
        """Run forward and backward of a micro-batch.

        Args:
            batch: micro-batch on the device.
            normalizer: normalizers on the device.
            forward_backward: function that does it eagerly. It must not wait for the device, draw random numbers on the
                host, or read anything else that changes from step to step.
        """
        shape = tuple((name, values.shape, values.dtype) for name, values in batch.items())
        if self.enabled and self._is_due(shape):
            self._capture(shape, batch, normalizer, forward_backward)
        graph = self._graphs.get(shape) if self.enabled else None
        if graph is not None and graph.is_current:
            return self._replay(graph, batch, normalizer)
        # Eager work cannot use the memory of graphs. After this step their shape is captured again.
        self.drop()
        self._runs[shape] += 1
        sums = self._run_eagerly(batch, normalizer, forward_backward)
        self._trained = [p for p in self._model.parameters() if p.grad is not None]
        return sums

    def drop(self) -> None:
        """Free the memory of all graphs; gradients stay."""
        if self._graphs:
            self._graphs.clear()
            free_cached_memory()

    def _is_due(self, shape: Hashable) -> bool:
        """Return whether a shape is to be captured now."""
        is_new = shape not in self._graphs and not self._refused
        return is_new and self._runs[shape] >= EAGER_RUNS and len(self._graphs) < MAX_GRAPHS

    def _run_eagerly(self, batch: Batch, normalizer: Tensor, forward_backward: ForwardBackward) -> Tensor:
        """Run a micro-batch on the stream of captures."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                return forward_backward(batch, normalizer)
        finally:
            current.wait_stream(self._stream)

    def _replay(self, graph: _Graph, batch: Batch, normalizer: Tensor) -> Tensor:
        """Replay a graph with a micro-batch."""
        for name, values in batch.items():
            graph.inputs[name].copy_(values)
        graph.normalizer.copy_(normalizer)
        graph.graph.replay()
        self.num_replays += 1
        return graph.sums

    def _capture(self, shape: Hashable, batch: Batch, normalizer: Tensor, forward_backward: ForwardBackward) -> None:
        """Capture a micro-batch, or note that it cannot be captured.

        Gradients, batch statistics and random state stay as they are.
        """
        try:
            self._graphs[shape] = self._make_graph(shape, batch, normalizer, forward_backward)
            return
        except Exception as error:
            reason = first_line(error)
        # Outside of the except block, so that the error's traceback does not keep the tensors of the capture alive.
        # Nothing else is captured either: graphs beside eager micro-batches would be dropped in every step.
        self._refused = True
        self._graphs.clear()
        free_cached_memory()
        logger.warning(f"Steps run without CUDA graphs, because forward and backward cannot be captured: {reason}")

    def _make_graph(
        self, shape: Hashable, batch: Batch, normalizer: Tensor, forward_backward: ForwardBackward
    ) -> _Graph:
        """Capture a micro-batch and, if this is the first graph of its shape, compare it with an eager run.

        Raises:
            RuntimeError: if it cannot be captured, or if the replay differs.
        """
        gradients = self._allocate_gradients()
        expected = None
        if shape not in self._checked:
            self.drop()  # the eager run needs the memory; other shapes are captured again
            with self._unchanged(gradients) as result:
                expected = result(self._run_eagerly(batch, normalizer, forward_backward))
        # The memory of eager runs is cached for the default pool, and the graph needs as much in its own.
        free_cached_memory()
        inputs, static_normalizer = {name: values.clone() for name, values in batch.items()}, normalizer.clone()
        graph = torch.cuda.CUDAGraph()
        # Graphs share one pool, because they never run at the same time. Other threads, such as the one that pins
        # loaded batches, may allocate during the capture.
        pool = next((other.graph.pool() for other in self._graphs.values()), None)
        current = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                sums = forward_backward(inputs, static_normalizer)
        finally:
            torch.cuda.set_stream(current)  # torch does not return to it if the capture has become invalid
        captured = _Graph(graph, inputs, static_normalizer, sums, gradients)
        if expected is not None:
            with self._unchanged(gradients) as result:
                found = result(self._replay(captured, batch, normalizer))
            if agrees(found, expected):
                self._checked.add(shape)
        return captured

    def _allocate_gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Give all parameters that eager runs train a gradient at a fixed address; return both.

        The others must not get one, because the optimizer would decay them.
        """
        for parameter in self._trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [(parameter, parameter.grad) for parameter in self._trained if parameter.grad is not None]

    @contextlib.contextmanager
    def _unchanged(self, gradients: list[tuple[nn.Parameter, Tensor]]) -> Iterator[Callable[[Tensor], list[Tensor]]]:
        """Restore gradients, statistics of batch norms and random state at the end of the context.

        Yields:
            Function that takes the sums of a run and returns a copy of them and of what the run added to the gradients.
        """
        norms = (m for m in self._model.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
        changing = [*(gradient for _, gradient in gradients), *(b for norm in norms for b in norm.buffers())]
        before, random_state = [t.clone() for t in changing], torch.cuda.get_rng_state()

        def result(sums: Tensor) -> list[Tensor]:
            return [sums.float().clone(), *(g - b for (_, g), b in zip(gradients, before))]

        try:
            yield result
        finally:
            for tensor, value in zip(changing, before):
                tensor.copy_(value)
            torch.cuda.set_rng_state(random_state)


def agrees(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Compare a replayed micro-batch with an eager one.

    Args:
        found: sums, and gradient of each parameter.
        expected: the same of the eager run.

    Returns:
        Whether the comparison shows anything: ``False`` if the eager run is not finite, as after an overflow in fp16.

    Raises:
        RuntimeError: if the sums, or the gradients all together, differ by more than kernels do that add in a varying
            order.
    """
    is_finite = True
    for name, a, b in (("results", found[:1], expected[:1]), ("gradients", found[1:], expected[1:])):
        norm = torch.nn.utils.get_total_norm(b).item()
        difference = torch.nn.utils.get_total_norm([x - y for x, y in zip(a, b)]).item()
        if not math.isfinite(norm):
            is_finite = False
        elif not difference <= TOLERANCE * norm:  # also if the difference is not a number
            raise RuntimeError(
                f"the {name} of a replay differ from those of an eager run by {difference:.3g} of {norm:.3g}"
            )
    return is_finite


def make_graphs(model: HeatmapModel, config: TrainingConfig, device: torch.device) -> MicroBatchGraphs | None:
    """Return the runner of micro-batches as graphs, or ``None`` to run all of them eagerly.

    Args:
        model: model with its mode applied.
        config: training section of the configuration, with a planned level of checkpointing.
        device: device of the model.
    """
    reason = reason_against(model, config, device)
    if reason is None:
        return MicroBatchGraphs(model)
    if device.type == "cuda" and config.cuda_graphs == "auto":
        logger.info(f"Steps run without CUDA graphs, because {reason}.")
    return None


def reason_against(model: HeatmapModel, config: TrainingConfig, device: torch.device) -> str | None:
    """Return why the micro-batches of a model cannot be captured, or ``None``; see ``make_graphs``."""
    if device.type != "cuda":
        return "the device is not a GPU"
    if config.cuda_graphs == "off":
        return "training.cuda_graphs is off"
    if config.memory_optimization.offloads:
        return "offload copies tensors between host and device (training.memory_optimization)"
    for module in model.modules():
        if getattr(module, "kernel", None) == "bitsandbytes" and getattr(module, "threshold", 0) > 0:
            return "bitsandbytes counts outliers on the host (training.int8_kernel)"
        if isinstance(module, DropoutLinear) and not module.runs_fused(device):
            return "the dropout of adapters is drawn by the host on this GPU or at this rank (training.lora)"
    # Recomputation restores the state of torch's generator, which it reads on the host.
    if config.memory_optimization.level != "none" and _draws_random_numbers(model):
        return "the backbone draws random numbers that recomputation has to repeat (dropout or stochastic depth)"
    return None


def _draws_random_numbers(model: HeatmapModel) -> bool:
    """Return whether a model has dropout or stochastic depth other than that of adapters, which is drawn by window."""
    settings = vars(model.backbone.hf.config) if model.backbone is not None else {}
    in_functions = any(
        value for name, value in settings.items() if "drop" in name and isinstance(value, float) and value > 0
    )
    return in_functions or any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
