"""Training step as a CUDA graph: forward, backward, clipping and update are captured once and replayed.

A replay takes the time of the GPU alone, which no code on the host can reduce. Its difference from the eager step is
the cost of the kernel launches. Dropout uses seeds that are set on the host, so adapters are measured without dropout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate.state import AcceleratorState

from on_gpu.session import BATCH, Session, random_batch
from on_gpu.steps import ROWS, profile_kernels, subject
from tracknet.benchmark.speed import Runner
from tracknet.benchmark.variants import Variant
from tracknet.training.batches import to_device
from tracknet.training.losses import heatmap_loss, loss_normalizer

# Rows of on_gpu.steps.ROWS that are captured; adapters without dropout.
GRAPHED = (
    "default",
    "frozen",
    "int8 triton none",
    "lora nodrop",
    "qlora none nodrop",
    "int8 triton t0",
    "default full",
)


def measure_graphs(
    session: Session, size: str, names: Sequence[str] = GRAPHED, batch: int = BATCH, compiled: bool = False
) -> None:
    """Write one row per variant: the captured step and the eager one.

    Args:
        session: session of the measurement.
        size: size of the backbone, see ``on_gpu.steps.subject``.
        names: names of the rows in ``ROWS``.
        batch: windows per batch.
        compiled: whether blocks are compiled.
    """
    for name in names:
        item = f"graph {'compiled ' if compiled else ''}{size} {batch} {name}"
        if session.has_time(45 if compiled else 15, item):
            with session.guarded(item):
                session.clean()
                _measure(session, size, name, batch, compiled)


def _measure(session: Session, size: str, name: str, batch: int, compiled: bool) -> None:
    """Time one variant eagerly and as a graph, and write its row."""
    mode, changes = ROWS[name]
    AcceleratorState._reset_state()  # accelerate keeps the precision of the previous variant in a global
    runner = Runner(Variant(name, subject(size, batch).compose(mode, *changes), compiled), session.device)
    model, inputs = runner.model, to_device(random_batch(batch, session.device), session.device, None)
    trained = [p for p in model.parameters() if p.requires_grad]
    # With a learning rate of zero the weights do not change, so that the losses of the eager and the captured step can
    # be compared. The rate is a tensor, because `capturable` optimizers read it on the device.
    rate = torch.zeros((), device=session.device)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True, capturable=True)
    loss_config, offload_ctx = runner.variant.config.training.loss, runner.offload_ctx

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with offload_ctx:
            loss = heatmap_loss(model(inputs["frames"]), inputs, loss_config) / loss_normalizer(inputs, loss_config)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(trained, 1.0, norm)
        optimizer.step()
        return loss.detach()

    # Warm up on a side stream, as CUDA graphs require: lazy initialization and autotuning must not be captured.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            eager_loss = step()
    torch.cuda.current_stream().wait_stream(stream)
    eager_ms = session.time_ms(step, 8)
    eager_mb = torch.cuda.max_memory_allocated() / 1e6
    # Gradients are freed before the capture, so that they are allocated anew in the memory pool of the graph.
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    ms = session.time_ms(graph.replay, 15)
    kernels = profile_kernels(session, graph.replay)
    reserved_mb = round(torch.cuda.memory_reserved() / 1e6)
    graph.reset()  # frees the memory pool of the graph, which would be counted in the next measurement
    session.put(
        "graph",
        size=size,
        batch=batch,
        name=name,
        compiled=compiled,
        ms=ms,
        eager_ms=eager_ms,
        loss=float(loss),
        eager_loss=float(eager_loss),
        eager_mb=round(eager_mb),
        reserved_mb=reserved_mb,
        **kernels,
    )
