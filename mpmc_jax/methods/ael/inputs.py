"""AEL's inputs and targets in a step, and copy-paste into labeled images."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct

from mpmc_jax.augmentation import mixing
from mpmc_jax.methods import base
from mpmc_jax.methods.ael.memory_bank import Seen
from mpmc_jax.types import Array, Batch, Network


class Inputs(struct.PyTreeNode):
    """Normalized images: labeled ones after pasting, unlabeled ones before mixing.

    Attributes:
      image, label: (b,h,w,c) labeled images, (b,h,w) labels with 255 void; their
        padding is labeled 0.
      labeled_real: (b,h,w) bool, real pixels of the labeled images.
      first, second: (g,h,w,c) unlabeled images; an object of the second is pasted into
        the first.
      first_real, second_real: (g,h,w) bool, their real pixels.
      wanted: (g,) int32, the class of that object.
      seen: the step's images and draws for the memory; `present` is set in `prepare`.
      slot: () int32, the row of the memory's requests.
      object_draw: (g,h,w) in 0..1, chooses the object.
      box_draw: (g,3) in 0..1, draws a box if there is no object.
      survival: numbers in 0..1 for re-sampling: (g,c,h,w) for the labeled images, which
        share one map per class, and (g,h,w) for the mixed image.
      decoder_dropout: name of the pass -> map of the decoder -> multipliers.
      network_dropout_keys: name of the pass -> keys or None, see
        `Method.network_dropout_keys`.
    """

    image: Array
    label: Array
    labeled_real: Array
    first: Array
    second: Array
    first_real: Array
    second_real: Array
    wanted: Array
    seen: Seen
    slot: Array
    object_draw: Array
    box_draw: Array
    survival: tuple[Array, Array]
    decoder_dropout: dict[str, dict[str, Array]]
    network_dropout_keys: Mapping[str, Array | None] = struct.field(
        default_factory=dict
    )


class Targets(struct.PyTreeNode):
    """The teacher's predictions on labeled and on mixed images.

    Attributes:
      mask: (g,h,w) bool, the part of the second image that is pasted.
      found: (g,) bool, whether the box is that of an object.
      confidence, label: for the labeled (b,h,w) and for the mixed images (g,h,w).
    """

    mask: Array
    found: Array
    confidence: tuple[Array, Array]
    label: tuple[Array, Array]


def copy_paste(batch: Batch, queried_bc: Array) -> tuple[Array, Array, Array]:
    """Pastes the queried classes' pixels from the sources into the labeled images.

    Args:
      batch: the step's batch, with b labeled crops and b sources.
      queried_bc: bool, the classes to paste into each labeled crop.

    Returns:
      Stored images (b,h,w,c), labels (b,h,w) int32 and real pixels (b,h,w) bool. The
      padding of a source, which is labeled 0, is never pasted.
    """
    labeled, source = batch.labeled, batch.source
    size = labeled.image.shape[1:3]
    wanted = source.label.astype(jnp.int32)
    # A void label matches no class.
    hit_bhwc = jax.nn.one_hot(wanted, queried_bc.shape[1], dtype=jnp.bool_)
    chosen = jnp.any(hit_bhwc & queried_bc[:, None, None], axis=-1)
    mask = chosen & mixing.extent_mask(source.extent, *size)
    return (
        mixing.paste(mask, source.image, labeled.image),
        mixing.paste(mask, wanted, labeled.label.astype(jnp.int32)),
        mask | mixing.extent_mask(labeled.extent, *size),
    )


def drawn_pass(
    network: Network, images: Array, inputs: Inputs, name: str
) -> tuple[base.Pass, Network]:
    """Runs a train-mode pass with the masks and keys that were drawn for it."""
    return base.full_pass(
        network,
        images,
        inputs.decoder_dropout[name],
        inputs.network_dropout_keys.get(name),
    )
