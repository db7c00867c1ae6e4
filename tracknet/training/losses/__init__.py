"""Losses of heatmaps and events. A new heatmap loss is one module here that subclasses ``Loss`` and one line below."""

from tracknet.training.losses.base import LOSSES, Loss, LossConfig, heatmap_loss, loss_normalizer
from tracknet.training.losses.cells import BceLoss, FocalLoss
from tracknet.training.losses.events import event_loss

LOSSES.register("focal", FocalLoss)
LOSSES.register("bce", BceLoss)

__all__ = ["LOSSES", "Loss", "LossConfig", "event_loss", "heatmap_loss", "loss_normalizer"]
