"""Evaluation: metrics and pictures of a trained network, at full image size."""

from mpmc_jax.evaluation.metrics import confusion_matrix, iou

__all__ = ["confusion_matrix", "iou"]
