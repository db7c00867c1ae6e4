"""The same step without the host: forward, backward, clipping and update captured as one CUDA graph, and replayed.

What is left is the GPU's own time, which no code on the host can lower; its distance from the eager step is what
launches cost. Dropout draws from seeds that are set on the host, so adapters are measured without it.
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
from tracknet.training.losses import heatmap_loss

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
    """Put a row for each variant: the captured step beside the eager one."""
    for name in names:
        item = f"graph {'compiled ' if compiled else ''}{size} {batch} {name}"
        if session.has_time(45 if compiled else 15, item):
            with session.guarded(item):
                session.clean()
                _measure(session, size, name, batch, compiled)


def _measure(session: Session, size: str, name: str, batch: int, compiled: bool) -> None:
    mode, changes = ROWS[name]
    AcceleratorState._reset_state()
    runner = Runner(Variant(name, subject(size, batch).compose(mode, *changes), compiled), session.device)
    model, inputs = runner.model, to_device(random_batch(batch, session.device), session.device, None)
    trained = [p for p in model.parameters() if p.requires_grad]
    # A rate of zero leaves the weights alone, so that the losses of both can be compared.
    rate = torch.zeros((), device=session.device)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True, capturable=True)
    loss_config, offload_ctx = runner.variant.config.training.loss, runner.offload_ctx

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with offload_ctx:
            loss = heatmap_loss(model(inputs["frames"]), inputs, loss_config) / inputs["weight"].sum()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(trained, 1.0, norm)
        optimizer.step()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            eager_loss = step()
    torch.cuda.current_stream().wait_stream(stream)
    eager_ms = session.time_ms(step, 8)
    eager_mb = torch.cuda.max_memory_allocated() / 1e6
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    ms = session.time_ms(graph.replay, 15)
    kernels = profile_kernels(session, graph.replay)
    reserved_mb = round(torch.cuda.memory_reserved() / 1e6)
    graph.reset()  # its pool would count against what comes after
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
