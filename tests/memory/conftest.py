"""A GPU that is played on the CPU: what is asked of its streams is written down."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import pytest
import torch

GPU = torch.device("cuda", 0)


class PlayedStream:
    """A stream of a GPU; the first is the one that computes.

    Attributes:
        log: what was asked of all streams, in order: the stream's number, what, and of which event or stream.
    """

    def __init__(self, device, log, number):
        assert device == GPU
        self.log, self.number = log, number

    def wait_stream(self, other):
        self.log.append((self.number, "wait for stream", other.number))

    def wait_event(self, event):
        assert isinstance(event, int)
        self.log.append((self.number, "wait for event", event))

    def record_event(self):
        event = sum(what == "event" for _, what, _ in self.log)
        self.log.append((self.number, "event", event))
        return event


@pytest.fixture
def played_gpu(monkeypatch):
    """Return the log; tensors of this GPU are tensors of the CPU, and copies to and from it are copies."""
    log, numbers = [], itertools.count()

    def make(device):
        return PlayedStream(device, log, next(numbers))

    current = [make(GPU)]

    def current_stream(device):
        assert device == GPU
        return current[-1]

    @contextmanager
    def enter(stream):
        assert isinstance(stream, PlayedStream)
        current.append(stream)
        yield
        current.pop()

    real_to, real_empty_like = torch.Tensor.to, torch.empty_like

    def to(tensor, *args, **kwargs):
        if args and args[0] == GPU:
            assert kwargs == {"non_blocking": True}
            log.append((current[-1].number, "to the GPU", tensor.numel()))
            return tensor.clone()
        return real_to(tensor, *args, **kwargs)

    def empty_like(tensor, **kwargs):
        if kwargs.pop("pin_memory", False):
            assert torch.device(kwargs["device"]).type == "cpu"
            log.append((current[-1].number, "to the host", tensor.numel()))
        return real_empty_like(tensor, **kwargs)

    def record_stream(tensor, stream):
        log.append((stream.number, "used by", tensor.numel()))

    def pin_memory(tensor):
        log.append((current[-1].number, "pinned", tensor.numel()))
        return tensor.clone()

    for name, value in (("Stream", make), ("stream", enter), ("current_stream", current_stream)):
        monkeypatch.setattr(torch.cuda, name, value)
    for name, value in (("to", to), ("record_stream", record_stream), ("pin_memory", pin_memory)):
        monkeypatch.setattr(torch.Tensor, name, value)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    return log
