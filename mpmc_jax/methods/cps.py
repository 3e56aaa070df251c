"""Cross pseudo supervision (CPS, CVPR 2021): two networks label each other's images.

Both networks see the same images without color changes, every pass is in train mode,
and every pixel counts, padding too: there is no threshold. With CutMix (`CPS`) the
networks label two crops of an image without gradient, and learn on their mixture; the
plain form (`PlainCPS`) learns on labeled and unlabeled images as they are.

Source: TorchSemiSeg, exp.voc and exp.city, `train.py` of CPS and CPS+CutMix. Its two
unlabeled loaders have the same seed, so that both crops are of one image.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from flax import struct

from mpmc_jax.augmentation import mixing
from mpmc_jax.methods import base, checks, pseudo_labels
from mpmc_jax.random_keys import Keys
from mpmc_jax.types import (
    Array,
    Batch,
    Network,
    Outputs,
    PyTree,
    Region,
    Streams,
    Supervised,
    View,
    ViewLoss,
)

_NETWORKS = ("first", "second")
_OTHER = {"first": "second", "second": "first"}


class Partner(struct.PyTreeNode):
    """What is pasted into the unlabeled images.

    Attributes:
      image, real: (b,h,w,c) normalized, (b,h,w) bool, its real pixels.
      mask: (b,h,w) bool, where it is pasted.
    """

    image: Array
    real: Array
    mask: Array

    def paste(self, inside: Array, outside: Array) -> Array:
        """Takes `inside` where the mask is True, `outside` elsewhere."""
        return mixing.paste(self.mask, inside, outside)


class Inputs(struct.PyTreeNode):
    """Normalized images.

    Attributes:
      image, label: (b,h,w,c) labeled images, (b,h,w) labels with 255 void.
      labeled_real: (b,h,w) bool, real pixels of `image`.
      weak, real: (b,h,w,c) unlabeled images, (b,h,w) bool, their real pixels.
      partner: what is pasted into `weak`, None without CutMix.
      network_dropout_keys: name of a pass -> its keys, see
        `Method.network_dropout_keys`.
    """

    image: Array
    label: Array
    labeled_real: Array
    weak: Array
    real: Array
    partner: Partner | None
    network_dropout_keys: dict[str, Array | None]


class Passes(NamedTuple):
    """One network's passes.

    Attributes:
      labeled: over the labeled images.
      cps: over the images on which the networks teach each other, those of L_cps.
      label: (b,h,w) the classes that it gives those images.
    """

    labeled: base.Pass
    cps: base.Pass
    label: Array


@dataclasses.dataclass(frozen=True)
class CPS(base.Method):
    """CPS with CutMix: L = L_x1 + L_x2 + weight * L_cps.

    Attributes:
      weight: weight of L_cps, the sum of both networks' cross-entropies.
      ema_decay: must be 0; evaluation uses the first network.
      loss: L_cps's two terms, see `training.objective.view_loss`.
    """

    weight: float
    ema_decay: float = 0.0
    loss: ViewLoss = "ce"

    networks = _NETWORKS
    streams = Streams(partner="same")
    teacher = "student"
    evaluated = "student"
    weight_setting = "cps.weight"

    def __post_init__(self) -> None:
        checks.check_positive(self.weight_setting, self.weight)
        if self.ema_decay:
            raise ValueError(
                f"method.ema_decay={self.ema_decay}: cps keeps no average, its "
                "networks label each other; leave it at 0"
            )

    def augment(self, batch: Batch, state: PyTree, keys: Keys) -> Inputs:
        del state
        size = batch.labeled.image.shape[1:3]
        partner, passes = None, ["labeled", "unlabeled"]
        if batch.partner is not None:
            partner = Partner(
                image=self.normalize(self.to_unit(batch.partner.image)),
                real=mixing.extent_mask(batch.partner.extent, *size),
                mask=mixing.draw_xor_masks(keys.examples("boxes"), size[0]),
            )
            passes += ["partner", "mixed"]
        return Inputs(
            image=self.normalize(self.to_unit(batch.labeled.image)),
            label=base.labels(batch),
            labeled_real=mixing.extent_mask(batch.labeled.extent, *size),
            weak=self.normalize(self.to_unit(batch.unlabeled.image)),
            real=mixing.extent_mask(batch.unlabeled.extent, *size),
            partner=partner,
            network_dropout_keys={
                f"{network}/{name}": self.network_dropout_keys(
                    keys.examples, f"{network}/{name}"
                )
                for network in _NETWORKS
                for name in passes
            },
        )

    def regions(self, inputs: Inputs) -> dict[str, Region]:
        labeled = base.supervised_region(inputs.label)
        cps = self._cps_region(inputs)
        return {f"supervised_{name}": labeled for name in _NETWORKS} | {
            f"unlabeled_{name}": cps for name in _NETWORKS
        }

    def _cps_region(self, inputs: Inputs) -> Region:
        """The pixels on which the networks teach each other: all of them."""
        assert inputs.partner is not None
        real = inputs.partner.paste(inputs.partner.real, inputs.real)
        return Region(valid=jnp.ones_like(real), real=real)

    def prepare(self, teachers: dict[str, Network], inputs: Inputs, state: PyTree):
        """Nothing: passes that label images update statistics, so `views` has them."""
        del teachers, inputs
        return None, {}, state

    def views(
        self,
        students: dict[str, Network],
        teachers: dict[str, Network],
        inputs: Inputs,
        targets: None,
        state: PyTree,
    ) -> Outputs:
        del targets
        image, passes, after = self._passes(students, inputs)
        supervised, views = [], []
        for name in _NETWORKS:
            labeled, cps, _ = passes[name]
            supervised.append(self._supervised(name, labeled, inputs))
            label = passes[_OTHER[name]].label
            views.append(self._view(name, cps, image, label, inputs, teachers))
        return Outputs(tuple(supervised), tuple(views), after, state)

    def _passes(
        self, students: dict[str, Network], inputs: Inputs
    ) -> tuple[Array, dict[str, Passes], dict[str, Network]]:
        """Returns L_cps's images, and passes and updated network of each student."""
        assert inputs.partner is not None
        image = inputs.partner.paste(inputs.partner.image, inputs.weak)
        passes, after = {}, {}
        for name in _NETWORKS:
            keys = inputs.network_dropout_keys
            label, network = self._label(students[name], inputs, name)
            both, after[name] = _two_passes(
                network,
                (image, inputs.image),
                (keys[f"{name}/mixed"], keys[f"{name}/labeled"]),
            )
            mixed, labeled = both.halves()
            passes[name] = Passes(labeled, mixed, label)
        return image, passes, after

    def _label(
        self, student: Network, inputs: Inputs, name: str
    ) -> tuple[Array, Network]:
        """The classes of both crops, mixed, by train-mode passes without gradient."""
        assert inputs.partner is not None
        network = student.frozen().replace(train=True)
        keys = inputs.network_dropout_keys
        both, network = _two_passes(
            network,
            (inputs.weak, inputs.partner.image),
            (keys[f"{name}/unlabeled"], keys[f"{name}/partner"]),
        )
        outside, inside = both.halves()
        logits = inputs.partner.paste(inside.logits, outside.logits)
        _, label = pseudo_labels.confidence_and_label(logits)
        return label, student.replace(batch_stats=network.batch_stats)

    def _supervised(self, name: str, labeled: base.Pass, inputs: Inputs) -> Supervised:
        part = base.supervised_part(labeled, inputs.label)
        return part.replace(name=f"supervised_{name}", student_name=name)

    def _view(
        self,
        name: str,
        passed: base.Pass,
        image: Array,
        label: Array,
        inputs: Inputs,
        teachers: dict[str, Network],
    ) -> View:
        other = _OTHER[name]
        return View(
            logits=passed.logits,
            taps=passed.taps,
            image=image,
            target=label,
            weight=jnp.ones(label.shape, passed.logits.dtype),
            region=self._cps_region(inputs),
            teacher=teachers[other],
            name=f"unlabeled_{name}",
            student_name=name,
            teacher_name=other,
            loss=self.loss,
            coefficient=self.weight / base.DEFAULT_ALPHA,
        )

    def average_decays(self, step: Array, steps_per_epoch: int) -> None:
        """No average is kept."""
        del step, steps_per_epoch


@dataclasses.dataclass(frozen=True)
class PlainCPS(CPS):
    """CPS without CutMix: L_cps is over labeled and unlabeled images as they are."""

    streams = Streams()
    weight_setting = "cps.plain_weight"

    def _cps_region(self, inputs: Inputs) -> Region:
        real = jnp.concatenate([inputs.labeled_real, inputs.real])
        return Region(valid=jnp.ones_like(real), real=real)

    def _passes(
        self, students: dict[str, Network], inputs: Inputs
    ) -> tuple[Array, dict[str, Passes], dict[str, Network]]:
        passes, after = {}, {}
        for name in _NETWORKS:
            keys = inputs.network_dropout_keys
            both, after[name] = _two_passes(
                students[name],
                (inputs.image, inputs.weak),
                (keys[f"{name}/labeled"], keys[f"{name}/unlabeled"]),
            )
            _, label = pseudo_labels.confidence_and_label(both.logits)
            passes[name] = Passes(both.halves()[0], both, label)
        return jnp.concatenate([inputs.image, inputs.weak]), passes, after


def _two_passes(
    network: Network,
    images: tuple[Array, Array],
    keys: tuple[Array | None, Array | None],
) -> tuple[base.Pass, Network]:
    """Passes over both batches of images, in a row to batch norm."""
    both, both_keys = base.concatenated((images[0], keys[0]), (images[1], keys[1]))
    return base.full_pass(network, both, network_dropout_keys=both_keys, passes=2)
