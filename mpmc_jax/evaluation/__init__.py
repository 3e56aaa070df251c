"""Figures and pictures of a trained network, from images at their own size."""

from mpmc_jax.evaluation.metrics import confusion_matrix, iou

__all__ = ["confusion_matrix", "iou"]
