"""MPMC: a multi-scale patch-based multi-label classifier on an early tap.

Section 3.3 of the paper. The head says which classes the receptive field of every
tap position contains. It is trained on labeled patches (eq. 3-4) and on the
teacher's patch predictions (eq. 6), and its confidence weights pseudo-labels (eq. 5).
Decisions D1 to D23 of the README's "deviations" are taken here and in its parts.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mpmc_jax.losses.multilabel import (
    patch_asymmetric_focal,
    patch_binary_cross_entropy,
)
from mpmc_jax.losses.pixel import confident_pixels
from mpmc_jax.losses.reduction import GlobalSum, identity, ratio
from mpmc_jax.models.patch_classifier import PatchClassifier
from mpmc_jax.models.pooling import multi_scale_pool as multi_scale_pool
from mpmc_jax.models.receptive_field import ReceptiveField
from mpmc_jax.plugins.base import Metrics, Terms
from mpmc_jax.plugins.mpmc.lambda_weights import adaptive_weights as adaptive_weights
from mpmc_jax.plugins.mpmc.patches import patch_targets as patch_targets
from mpmc_jax.plugins.mpmc.patches import patch_valid as patch_valid
from mpmc_jax.plugins.teaching import PatchTeaching, split_by
from mpmc_jax.types import (
    IGNORE_LABEL,
    Array,
    Network,
    PyTree,
    Region,
    Supervised,
    View,
)


def _patches(term: str) -> str:
    """The name of a term's patch count; the bare name counts the method's pixels."""
    return f"patches/{term}"


@dataclasses.dataclass(frozen=True)
class MPMC:
    """The plug-in; see `mpmc_jax.plugins.base.Plugin` for its calls.

    Attributes:
      num_classes: C.
      field: receptive field of the tap.
      tap: the layer whose output the head reads.
      tap_size: rows and columns of the tap at the training crop.
      windows, head: of the `PatchClassifier`.
      confidence, lambda_scale: of `adaptive_weights`.
      alpha, beta, labeled_weight: weights of L_u, L_u^M and L_l^M.
      gamma_pos, gamma_neg: exponents of eq. 3.
      target: "soft" or "hard" (D6).
      teacher_head: "student" or "ema" (D8); the step passes the variables.
      warmup_epochs: epochs without L_u^M and lambda (D23); the step passes `active`.
      labeled, unlabeled, lambda_s, lambda_m: ablations; False leaves the part out.
      axis_name: device axis over which batch norm is synchronized.
      width: of the head; 64 is the published one, less is for tests.
    """

    num_classes: int
    field: ReceptiveField
    tap_size: tuple[int, int]
    tap: str = "layer1"
    windows: tuple[int, ...] = (1, 7, 19)
    head: str = "paper"
    confidence: str = "softmax_prob"
    lambda_scale: str = "none"
    alpha: float = 0.25
    beta: float = 0.15
    labeled_weight: float = 1.0
    gamma_pos: float = 0.0
    gamma_neg: float = 1.0
    target: Literal["soft", "hard"] = "soft"
    teacher_head: Literal["student", "ema"] = "student"
    warmup_epochs: int = 0
    labeled: bool = True
    unlabeled: bool = True
    lambda_s: bool = True
    lambda_m: bool = True
    axis_name: str | None = None
    width: int = 64

    @property
    def taps(self) -> tuple[str, ...]:
        """The one tap that the head reads."""
        return (self.tap,)

    def init(self, key: Array, taps: Mapping[str, Array]) -> dict[str, PyTree]:
        """Variables of the head from one (1,h,w,d) example of the tap."""
        init = jax.jit(self.classifier().init, static_argnames="train")
        variables = init(key, taps[self.tap], train=False)
        return {name: variables[name] for name in ("params", "batch_stats")}

    def classifier(self) -> PatchClassifier:
        """The head as a Flax module."""
        return PatchClassifier(
            num_classes=self.num_classes,
            head=self.head,
            windows=self.windows,
            axis_name=self.axis_name,
            width=self.width,
        )

    def counts(self, regions: Mapping[str, Region]) -> dict[str, Array]:
        """Valid patches a term: those with a real (labeled) pixel (D7)."""
        return {
            _patches(name): jnp.sum(self._valid(region), dtype=jnp.int32)
            for name, region in regions.items()
        }

    def refine(
        self,
        variables: Mapping[str, PyTree],
        views: Sequence[View],
        *,
        active: Array | None = None,
        total: GlobalSum = identity,
    ) -> tuple[tuple[View, ...], dict[str, PatchTeaching]]:
        """Weights every unlabeled view by lambda_s and makes its patch targets.

        The teacher classifies the weak image mixed as the view was (D9, D10), in
        evaluation mode whatever mode the method's own teacher ran in (D17).
        """
        unlabeled = [view for view in views if view.unlabeled]
        logits = self._teacher_logits(variables, unlabeled)
        refined, targets = [], {}
        for view in views:
            if view.unlabeled:
                view, targets[view.name] = self._teach(
                    logits[view.name], view, active, total
                )
            refined.append(view)
        return tuple(refined), targets

    def teacher_logits(
        self, teacher: Network, head: Mapping[str, PyTree], images: Array
    ) -> Array:
        """Patch logits as the teacher's: in evaluation mode, without gradient.

        Training and analysis both come here.

        Args:
          teacher: the network whose tap the head reads.
          head: variables of the head.
          images: (b,H,W,c) normalized.

        Returns:
          (b,h,w,C).
        """
        z_bhwd = teacher.frozen().taps(images, self.tap)
        logits_bhwc: Any = self.classifier().apply(head, z_bhwd, train=False)
        return jax.lax.stop_gradient(logits_bhwc)

    def weigh(
        self,
        logits: Array,
        labels: Array,
        *,
        where: Array | None = None,
        total: GlobalSum = identity,
    ) -> tuple[Array, Array]:
        """`adaptive_weights` with this plug-in's settings and its tap's field."""
        return adaptive_weights(
            logits,
            labels,
            confidence=self.confidence,
            scale=self.lambda_scale,
            field=self.field,
            where=where,
            total=total,
        )

    def _teacher_logits(
        self, variables: Mapping[str, PyTree], views: Sequence[View]
    ) -> dict[str, Array]:
        """(b,h,w,C) patch logits of each view; one pass for all of one teacher's."""
        by_teacher: dict[int, list[View]] = {}
        for view in views:
            by_teacher.setdefault(id(view.teacher), []).append(view)
        logits: dict[str, Array] = {}
        for same in by_teacher.values():
            images_bhwc = jnp.concatenate([view.image for view in same])
            out = self.teacher_logits(same[0].teacher, variables, images_bhwc)
            parts = split_by(self._checked(out), [v.image for v in same])
            logits |= {v.name: part for v, part in zip(same, parts, strict=True)}
        return logits

    def _teach(
        self,
        logits_bhwc: Array,
        view: View,
        active: Array | None,
        total: GlobalSum,
    ) -> tuple[View, PatchTeaching]:
        confident_bhw = confident_pixels(view)
        lambda_bhw, gamma_bhwc = self.weigh(
            logits_bhwc, view.target, where=confident_bhw, total=total
        )
        if not self.lambda_s:
            lambda_bhw = jnp.ones_like(lambda_bhw)
        if active is not None:
            lambda_bhw = jnp.where(active, lambda_bhw, 1)
        probability_bhwc = jax.nn.sigmoid(logits_bhwc)
        if self.target == "hard":
            probability_bhwc = (probability_bhwc >= 0.5).astype(logits_bhwc.dtype)
        teaching = PatchTeaching(
            target=probability_bhwc,
            weight=gamma_bhwc if self.lambda_m else jnp.ones_like(gamma_bhwc),
            lambda_sum=jnp.sum(jnp.where(confident_bhw, lambda_bhw, 0)),
            lambda_count=jnp.sum(confident_bhw, dtype=jnp.int32),
        )
        weight_bhw = view.weight * lambda_bhw.astype(view.weight.dtype)
        return dataclasses.replace(view, weight=weight_bhw), teaching

    def losses(
        self,
        variables: Mapping[str, PyTree],
        supervised: Supervised,
        views: Sequence[View],
        targets: Mapping[str, PatchTeaching],
        counts: Mapping[str, Array],
        *,
        active: Array | None = None,
        total: GlobalSum = identity,
    ) -> tuple[Terms, Metrics, PyTree]:
        """L_l^M as "patch_labeled" and L_u^M as "patch_unlabeled" (eq. 4 and 6)."""
        unlabeled = tuple(view for view in views if view.unlabeled)
        # One pass over everything: one normalization batch, one update (D17).
        taps = [part.taps[self.tap] for part in (supervised, *unlabeled)]
        joined = self._checked(jnp.concatenate(taps))
        logits, moved = self.classifier().apply(
            variables, joined, train=True, mutable=["batch_stats"]
        )
        first, *rest = split_by(logits, taps)
        terms, metrics = self._labeled(first, supervised, counts, total)
        if unlabeled:
            more = self._unlabeled(rest, unlabeled, targets, counts, active, total)
            terms, metrics = {**terms, **more[0]}, {**metrics, **more[1]}
        return terms, metrics, moved["batch_stats"]

    def _labeled(
        self,
        logits_bhwc: Array,
        supervised: Supervised,
        counts: Mapping[str, Array],
        total: GlobalSum,
    ) -> tuple[Terms, Metrics]:
        # Padding that a base method labels is still not real (D7).
        label_bhw = jnp.where(
            supervised.region.real, supervised.label, IGNORE_LABEL
        ).astype(jnp.int32)
        target_bhwc, valid_bhw = patch_targets(
            label_bhw, self.num_classes, self.field, size=self.tap_size
        )
        loss_bhw = patch_asymmetric_focal(
            logits_bhwc,
            target_bhwc,
            gamma_pos=self.gamma_pos,
            gamma_neg=self.gamma_neg,
        )
        loss = jnp.sum(jnp.where(valid_bhw, loss_bhw, 0))
        count = jnp.sum(valid_bhw, dtype=jnp.int32)
        right_bhwc = (logits_bhwc > 0) == target_bhwc
        right = jnp.sum(right_bhwc & valid_bhw[..., None], dtype=jnp.int32)
        metrics = {
            "loss_patch_labeled": (loss, count),
            "patch_hamming": (right, count * self.num_classes),
        }
        if not self.labeled:
            return {}, metrics
        mean = ratio(total(loss), counts[_patches("supervised")])
        return {"patch_labeled": self.labeled_weight * mean}, metrics

    def _unlabeled(
        self,
        logits: Sequence[Array],
        views: Sequence[View],
        targets: Mapping[str, PatchTeaching],
        counts: Mapping[str, Array],
        active: Array | None,
        total: GlobalSum,
    ) -> tuple[Terms, Metrics]:
        """The mean of the views' losses, weighted as their pixel losses are (D18)."""
        coefficients = sum(view.coefficient for view in views)
        parts, patches = [], 0
        for logits_bhwc, view in zip(logits, views, strict=True):
            teaching = targets[view.name]
            valid_bhw = self._valid(view.region)
            loss_bhw = patch_binary_cross_entropy(
                logits_bhwc, teaching.target, teaching.weight
            )
            loss = jnp.sum(jnp.where(valid_bhw, loss_bhw, 0))
            mean = ratio(loss, counts[_patches(view.name)])
            parts.append(view.coefficient / coefficients * mean)
            patches += jnp.sum(valid_bhw, dtype=jnp.int32)
        share = jnp.sum(jnp.stack(parts))
        if active is not None:
            share, patches = (jnp.where(active, x, 0) for x in (share, patches))
        taught = [targets[view.name] for view in views]
        all_patches = sum(counts[_patches(view.name)] for view in views)
        metrics = {
            # `share` is this device's part of a mean already; give it the divisor
            # that makes the parts add up.
            "loss_patch_unlabeled": (share * all_patches, patches),
            "lambda_mean": (
                sum(teaching.lambda_sum for teaching in taught),
                sum(teaching.lambda_count for teaching in taught),
            ),
        }
        if not self.unlabeled:
            return {}, metrics
        return {"patch_unlabeled": self.beta * total(share)}, metrics

    def _valid(self, region: Region) -> Array:
        return patch_valid(region.real, self.field, size=self.tap_size)

    def _checked(self, map_bhwd: Array) -> Array:
        if map_bhwd.shape[1:3] != self.tap_size:
            raise ValueError(
                f"tap {self.tap!r} is {map_bhwd.shape[1:3]}, but the plug-in was built "
                f"for {self.tap_size}; build it for the crop that is trained on"
            )
        return map_bhwd
