"""MPMC: a multi-scale patch-based multi-label classifier on an early tap.

Section 3.3 of the paper. The patch classifier, called the head for short, predicts
which classes the receptive field of every tap position contains. It is trained on
labeled patches (L_l^M, eq. 3-4) and on the teacher's patch predictions (L_u^M, eq. 6,
weighted by lambda_m), and its confidence lambda_s weights pseudo-labels (eq. 5).
D numbers are rows of docs/deviations.md, which lists the decisions about MPMC.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from absl import logging
from flax import struct

from mpmc_jax.losses.multilabel import (
    asymmetric_focal_loss,
    binary_cross_entropy,
)
from mpmc_jax.losses.pixel import confident_pixels
from mpmc_jax.losses.reduction import Reduction, masked_mean
from mpmc_jax.models.patch_classifier import PatchClassifier
from mpmc_jax.models.receptive_field import ReceptiveField
from mpmc_jax.plugins.base import Plugin, PluginLosses, TapInfo
from mpmc_jax.plugins.mpmc.lambda_weights import (
    CONFIDENCES,
    PIXEL_SCALES,
    SCALES,
    adaptive_weights,
    shuffled_by_class,
)
from mpmc_jax.plugins.mpmc.patches import patch_targets, real_patches
from mpmc_jax.types import (
    IGNORE_LABEL,
    Array,
    Network,
    PyTree,
    Region,
    Supervised,
    View,
)


@struct.dataclass
class PatchTargets:
    """What the teacher's head predicts for one view.

    Attributes:
      target: (b,h,w,C) q_bar of eq. 6, or its decision at 0.5.
      weight: (b,h,w,C) lambda_m.
      lambda_sum, lambda_count: sum and number of lambda_s over the view's confident
        pixels, for the log.
      active: () bool, False during the warm-up; None for always True.
    """

    target: Array
    weight: Array
    lambda_sum: Array
    lambda_count: Array
    active: Array | None = None


Terms = dict[str, Array]
MetricSums = dict[str, tuple[Array, Array]]


def _patches(term: str) -> str:
    """Returns the name of a term's patch count; the bare name counts pixels."""
    return f"patches/{term}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MPMC(Plugin):
    """The MPMC plug-in; see `mpmc_jax.plugins.base.Plugin` for its functions.

    Attributes:
      num_classes: C.
      field: receptive field of the tap.
      tap: the layer whose output the head reads.
      tap_size: rows and columns of the tap at the training crop.
      windows, head: settings of the `PatchClassifier`.
      confidence, lambda_scale, lambda_m_scale: settings of `adaptive_weights`.
      beta, labeled_weight: weights of L_u^M and L_l^M.
      gamma_pos, gamma_neg: exponents of eq. 3.
      target: "soft" or "hard" (D6).
      teacher_head: "student" or "ema" (D8).
      warmup_epochs: epochs without L_u^M and lambda (D23).
      labeled, unlabeled: whether to add L_l^M and L_u^M; booleans, for ablations.
      lambda_s, lambda_m: whether to weight pixels and patches; booleans, for ablations
        (the weights themselves come from `adaptive_weights`).
      detach: the images on which the head's losses train the head alone and not the
        network: "none", "labeled" ones or "all" (D26); for ablations.
      shuffle: whether lambda_s is permuted among the confident pixels of one
        pseudo-class of an image; for ablations.
      uniform: whether every pixel of a view has the mean lambda_s of the view's
        confident pixels in this micro-batch; for ablations.
      gate: beyond the paper, lambda_s is 1 where the head gives the pseudo-class at
        least this probability, and 0 elsewhere. With gate=0 there is no gate, and
        lambda_s is as `confidence` and `lambda_scale` say.
      temperature: beyond the paper, what divides the head's logits before the
        confidence gamma of eq. 5 is computed.
      axis_name: device axis over which batch norm is synchronized.
      width: see `TapInfo`; the head is scaled by width / 64 too.
    """

    num_classes: int
    field: ReceptiveField
    tap_size: tuple[int, int]
    tap: str = "layer1"
    windows: tuple[int, ...] = (1, 7, 19)
    head: str = "paper"
    confidence: str = "softmax_prob"
    lambda_scale: str = "none"
    lambda_m_scale: str = "none"
    beta: float = 0.15
    labeled_weight: float = 1.0
    gamma_pos: float = 0.0
    gamma_neg: float = 1.0
    target: Literal["soft", "hard"] = "soft"
    labeled: bool = True
    unlabeled: bool = True
    lambda_s: bool = True
    lambda_m: bool = True
    detach: Literal["none", "labeled", "all"] = "none"
    shuffle: bool = False
    uniform: bool = False
    gate: float = 0.0
    temperature: float = 1.0
    axis_name: str | None = None
    width: int = 64

    @property
    def classifies_patches(self) -> bool:
        """True: the head tells the classes of patches."""
        return True

    @property
    def taps(self) -> tuple[str, ...]:
        """The one tap that the head reads."""
        return (self.tap,)

    def init(self, key: Array, taps: Mapping[str, Array]) -> dict[str, PyTree]:
        """Makes the variables of the head from one (1,h,w,d) example of the tap."""
        init = jax.jit(self.classifier().init, static_argnames="train")
        variables = init(key, taps[self.tap], train=False)
        return {name: variables[name] for name in ("params", "batch_stats")}

    def classifier(self) -> PatchClassifier:
        """Returns the head as a Flax module."""
        return PatchClassifier(
            num_classes=self.num_classes,
            head=self.head,
            windows=self.windows,
            axis_name=self.axis_name,
            width=self.width,
        )

    def counts(self, regions: Mapping[str, Region]) -> dict[str, Array]:
        """Counts the patches of each loss term that show a real pixel (D7)."""
        return {
            _patches(name): jnp.sum(self._real_patches(region), dtype=jnp.int32)
            for name, region in regions.items()
        }

    def refine(
        self,
        variables: Mapping[str, PyTree],
        views: Sequence[View],
        reduction: Reduction,
        active: Array | None,
    ) -> tuple[tuple[View, ...], dict[str, PatchTargets]]:
        """Weights every unlabeled view by lambda_s and makes its patch targets.

        The teacher classifies the weak image, mixed like the view (D9, D10), in
        evaluation mode, whatever mode the method runs its teacher in (D17).
        """
        unlabeled = [view for view in views if view.unlabeled]
        logits = self._teacher_logits_by_view(variables, unlabeled)
        refined, targets = [], {}
        for view in views:
            if view.unlabeled:
                view, targets[view.name] = self._refine_view(
                    logits[view.name], view, reduction, active
                )
            refined.append(view)
        return tuple(refined), targets

    def teacher_logits(
        self, teacher: Network, head: Mapping[str, PyTree], images: Array
    ) -> Array:
        """Computes patch logits in evaluation mode, without gradient.

        Training and analysis both use it.

        Args:
          teacher: the network whose tap the head reads.
          head: variables of the head.
          images: (b,H,W,c) normalized.

        Returns:
          (b,h,w,C).
        """
        z_bhwd = teacher.frozen().tap_map(images, self.tap)
        logits_bhwc: Any = self.classifier().apply(head, z_bhwd, train=False)
        return jax.lax.stop_gradient(logits_bhwc)

    def classify_patches(
        self,
        teacher: Network,
        variables: Mapping[str, PyTree],
        images: Array,
        labels: Array,
    ) -> tuple[Array, Array, Array]:
        """Predicts the classes of the patches of labeled images, see `Plugin`."""
        logits_bhwc = self.teacher_logits(teacher, variables, images)
        _, rows, columns, _ = logits_bhwc.shape
        targets_bhwc, valid_bhw = patch_targets(
            labels, self.num_classes, self.field, size=(rows, columns)
        )
        return logits_bhwc, targets_bhwc, valid_bhw

    def weigh_pixels(self, logits: Array, labels: Array) -> Array:
        """Computes lambda_s of eq. 5, never divided by a mean; see `Plugin`."""
        if self.gate:
            return self._gate_mask(logits, labels)
        scale = "max" if self.lambda_scale == "max" else "none"
        lambda_bhw, _ = adaptive_weights(
            logits / self.temperature,
            labels,
            confidence=self.confidence,
            scale=scale,
            field=self.field,
        )
        return lambda_bhw

    def _gate_mask(self, logits: Array, labels: Array) -> Array:
        """Returns 1 where the head's probability of the label reaches `gate`.

        It is 0 elsewhere: (b,h,w).
        """
        probability_bhw, _ = adaptive_weights(
            logits, labels, confidence="sigmoid", scale="none", field=self.field
        )
        return (probability_bhw >= self.gate).astype(probability_bhw.dtype)

    def _teacher_logits_by_view(
        self, variables: Mapping[str, PyTree], views: Sequence[View]
    ) -> dict[str, Array]:
        """Computes (b,h,w,C) patch logits of each view, in one pass per teacher."""
        by_teacher: dict[int, list[View]] = {}
        for view in views:
            by_teacher.setdefault(id(view.teacher), []).append(view)
        logits: dict[str, Array] = {}
        for group in by_teacher.values():
            images = [view.image for view in group]
            joined_bhwc = self.teacher_logits(
                group[0].teacher, variables, jnp.concatenate(images)
            )
            split = _split_like(self._checked(joined_bhwc), images)
            logits |= {v.name: each for v, each in zip(group, split, strict=True)}
        return logits

    def _refine_view(
        self,
        logits_bhwc: Array,
        view: View,
        reduction: Reduction,
        active: Array | None,
    ) -> tuple[View, PatchTargets]:
        """Weights a view by lambda_s, and makes its patch targets."""
        confident_bhw = confident_pixels(view)
        lambda_s_bhw, lambda_m_bhwc = adaptive_weights(
            logits_bhwc / self.temperature,
            view.target,
            confidence=self.confidence,
            scale=self.lambda_scale,
            patch_scale=self.lambda_m_scale,
            field=self.field,
            where=confident_bhw,
            valid=self._real_patches(view.region),
            global_sum=reduction.sum,
        )
        if self.gate:
            lambda_s_bhw = self._gate_mask(logits_bhwc, view.target)
        if not self.lambda_s:
            lambda_s_bhw = jnp.ones_like(lambda_s_bhw)
        if self.shuffle:
            classes_bhw = jnp.where(confident_bhw, view.target.astype(jnp.int32), -1)
            lambda_s_bhw = shuffled_by_class(lambda_s_bhw, classes_bhw)
        if self.uniform:
            mean = masked_mean(lambda_s_bhw, confident_bhw, reduction.sum)
            lambda_s_bhw = jnp.full_like(lambda_s_bhw, mean)
        if active is not None:
            lambda_s_bhw = jnp.where(active, lambda_s_bhw, 1)
        probability_bhwc = jax.nn.sigmoid(logits_bhwc)
        if self.target == "hard":
            probability_bhwc = (probability_bhwc >= 0.5).astype(logits_bhwc.dtype)
        targets = PatchTargets(
            target=probability_bhwc,
            weight=lambda_m_bhwc if self.lambda_m else jnp.ones_like(lambda_m_bhwc),
            lambda_sum=jnp.sum(jnp.where(confident_bhw, lambda_s_bhw, 0)),
            lambda_count=jnp.sum(confident_bhw, dtype=jnp.int32),
            active=active,
        )
        weight_bhw = view.weight * lambda_s_bhw.astype(view.weight.dtype)
        return dataclasses.replace(view, weight=weight_bhw), targets

    def losses(
        self,
        variables: Mapping[str, PyTree],
        supervised: Sequence[Supervised],
        views: Sequence[View],
        targets: Mapping[str, PatchTargets],
        reduction: Reduction,
    ) -> PluginLosses:
        """Computes L_l^M, "patch_labeled", and L_u^M, "patch_unlabeled" (eq. 4, 6)."""
        unlabeled = [view for view in views if view.unlabeled]
        # One pass over all taps: one batch to batch norm, one update (D17). This holds
        # without L_u^M too: with running statistics of labeled images alone, lambda_s
        # of unlabeled ones was worse (results/evidence).
        labeled_taps = [part.taps[self.tap] for part in supervised]
        if self.detach != "none":
            labeled_taps = jax.lax.stop_gradient(labeled_taps)
        view_taps = [view.taps[self.tap] for view in unlabeled]
        if self.detach == "all":
            view_taps = jax.lax.stop_gradient(view_taps)
        taps = [*labeled_taps, *view_taps]
        joined = self._checked(jnp.concatenate(taps))
        logits, updated = self.classifier().apply(
            variables, joined, train=True, mutable=["batch_stats"]
        )
        split = _split_like(logits, taps)
        of_labeled, of_views = split[: len(supervised)], split[len(supervised) :]
        terms, metrics = self._labeled_loss(of_labeled, supervised, reduction)
        if unlabeled:
            added_terms, added_metrics = self._unlabeled_loss(
                of_views, unlabeled, targets, reduction
            )
            terms, metrics = terms | added_terms, metrics | added_metrics
        return PluginLosses(terms, metrics, updated["batch_stats"])

    def _labeled_loss(
        self,
        logits: Sequence[Array],
        supervised: Sequence[Supervised],
        reduction: Reduction,
    ) -> tuple[Terms, MetricSums]:
        """Computes the mean of the students' losses on labeled patches."""
        means, sums, correct, counts = [], [], [], []
        for logits_bhwc, part in zip(logits, supervised, strict=True):
            # Padding that a base method labels still does not count as real (D7).
            label_bhw = jnp.where(part.region.real, part.label, IGNORE_LABEL)
            target_bhwc, valid_bhw = patch_targets(
                label_bhw.astype(jnp.int32),
                self.num_classes,
                self.field,
                size=self.tap_size,
            )
            summed = asymmetric_focal_loss(
                logits_bhwc,
                target_bhwc,
                gamma_pos=self.gamma_pos,
                gamma_neg=self.gamma_neg,
                where=valid_bhw,
                count=1,  # the sum
            )
            sums.append(summed)
            counts.append(jnp.sum(valid_bhw, dtype=jnp.int32))
            correct_bhwc = ((logits_bhwc > 0) == target_bhwc) & valid_bhw[..., None]
            correct.append(jnp.sum(correct_bhwc, dtype=jnp.int32))
            means.append(reduction.mean(_patches(part.name), summed))
        count = _add(counts)
        metrics = {
            "loss_patch_labeled": (_add(sums), count),
            "patch_hamming": (_add(correct), count * self.num_classes),
        }
        if not self.labeled:
            return {}, metrics
        mean = _add(means) / len(means)
        return {"patch_labeled": self.labeled_weight * mean}, metrics

    def _unlabeled_loss(
        self,
        logits: Sequence[Array],
        views: Sequence[View],
        targets: Mapping[str, PatchTargets],
        reduction: Reduction,
    ) -> tuple[Terms, MetricSums]:
        """Averages the views' losses with the weights of their pixel losses (D18)."""
        coefficients = sum(view.coefficient for view in views)
        counts = {view.name: reduction.counts[_patches(view.name)] for view in views}
        losses, patches = [], []
        for logits_bhwc, view in zip(logits, views, strict=True):
            target = targets[view.name]
            real_bhw = self._real_patches(view.region)
            # This device's share: its sum, divided by the count of the whole batch.
            local_mean = binary_cross_entropy(
                logits_bhwc,
                target.target,
                weights=target.weight,
                where=real_bhw,
                count=counts[view.name],
            )
            losses.append(view.coefficient / coefficients * local_mean)
            patches.append(jnp.sum(real_bhw, dtype=jnp.int32))
        local_loss, count = jnp.sum(jnp.stack(losses)), _add(patches)
        view_targets = [targets[view.name] for view in views]
        active = view_targets[0].active
        if active is not None:
            local_loss, count = (jnp.where(active, x, 0) for x in (local_loss, count))
        metrics = {
            # `local_loss` is already divided by counts of the whole batch; multiply
            # back so that (sum, count) pairs add up.
            "loss_patch_unlabeled": (local_loss * sum(counts.values()), count),
            "lambda_mean": (
                _add([target.lambda_sum for target in view_targets]),
                _add([target.lambda_count for target in view_targets]),
            ),
        }
        if not self.unlabeled:
            return {}, metrics
        return {"patch_unlabeled": self.beta * reduction.sum(local_loss)}, metrics

    def _real_patches(self, region: Region) -> Array:
        return real_patches(region.real, self.field, size=self.tap_size)

    def _checked(self, map_bhwd: Array) -> Array:
        if map_bhwd.shape[1:3] != self.tap_size:
            raise ValueError(
                f"tap {self.tap!r} is {map_bhwd.shape[1:3]}, but the plug-in was built "
                f"for {self.tap_size}; build it for the crop that is trained on"
            )
        return map_bhwd


def _add(values: Sequence[Array]) -> Array:
    return functools.reduce(jnp.add, values)


def _split_like(joined: Array, arrays: Sequence[Array]) -> list[Array]:
    """Splits a concatenation along the first axis into the sizes of `arrays`."""
    ends = list(itertools.accumulate(array.shape[0] for array in arrays))
    return jnp.split(joined, ends[:-1])


_CHOICES: dict[str, tuple[str, ...]] = {
    "confidence": tuple(CONFIDENCES),
    "lambda_scale": PIXEL_SCALES,
    "lambda_m_scale": SCALES,
    "target": ("soft", "hard"),
    "teacher_head": ("student", "ema"),
    "detach": ("none", "labeled", "all"),
}


def build(settings: dict[str, Any], tap: TapInfo) -> MPMC:
    """Builds MPMC from the values of the configuration's section `mpmc`.

    Raises:
      ValueError: a value outside its choices, or a temperature together with a gate.
    """
    for key, valid in _CHOICES.items():
        if settings[key] not in valid:
            raise ValueError(
                f"mpmc.{key} is {settings[key]!r}; valid: {', '.join(valid)}"
            )
    gate = settings["gate"]
    if not 0 <= gate <= 1:
        raise ValueError(f"mpmc.gate={gate}: give a probability, or 0 for no gate")
    if gate and settings["temperature"] != 1:
        raise ValueError(
            f"mpmc.gate={gate} does not read mpmc.temperature; leave it at 1"
        )
    if tap.field.size >= tap.crop:
        logging.warning(
            "A patch of %s (%d pixels) covers the whole crop (%d): every patch holds "
            "the same classes.",
            tap.name,
            tap.field.size,
            tap.crop,
        )
    # `mpmc.alpha` is the step's (`StepConfig.alpha`), with or without MPMC.
    own = {k: v for k, v in settings.items() if k not in ("enabled", "tap", "alpha")}
    plugin = MPMC(
        num_classes=tap.num_classes,
        field=tap.field,
        tap=tap.name,
        tap_size=tap.size,
        width=tap.width,
        axis_name=tap.axis_name,
        **own,
    )
    plugin.classifier()  # refuses an unknown head or window before any work is done
    return plugin
