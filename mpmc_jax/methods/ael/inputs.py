"""What AEL's step works on, and its copy-paste into labeled images."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct

from mpmc_jax.augmentation import mixing
from mpmc_jax.methods import base
from mpmc_jax.methods.ael.memory_bank import Seen
from mpmc_jax.types import Array, Batch, Network


class Inputs(struct.PyTreeNode):
    """Normalized images, labeled ones after pasting, unlabeled ones not yet mixed.

    Attributes:
      image, label: (b,h,w,c) labeled images, (b,h,w) labels with 255 void; their
        padding is labeled 0.
      labeled_real: (b,h,w) bool.
      first, second: (g,h,w,c) unlabeled images; an object of the second is cut out.
      first_real, second_real: (g,h,w) bool.
      wanted: (g,) int32, the class of that object.
      seen: the step's images and draws for the memory, classes still to come.
      slot: () int32, the row of the memory's requests.
      object_draw: (g,h,w) in 0..1, chooses the object; box_draw (g,3) a box without.
      survival: in 0..1, (g,c,h,w) for the labeled images, which share a field of each
        class, and (g,h,w) for the mixed one.
      dropout: pass -> map of the decoder -> multipliers.
      dropout_keys: pass -> keys or None, see `Method.dropout_keys`; the same names.
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
    dropout: dict[str, dict[str, Array]]
    dropout_keys: Mapping[str, Array | None] = struct.field(default_factory=dict)


class Targets(struct.PyTreeNode):
    """What the teacher makes of labeled and of mixed images.

    Attributes:
      box: (g,h,w) bool, what of the second image is pasted.
      found: (g,) bool, whether the box holds an object.
      confidence, label: of the labeled (b,h,w) and of the mixed images (g,h,w).
    """

    box: Array
    found: Array
    confidence: tuple[Array, Array]
    label: tuple[Array, Array]


def copy_paste(batch: Batch, queried_bc: Array) -> tuple[Array, Array, Array]:
    """Puts the queried classes' pixels of the sources into the labeled images.

    Args:
      batch: its labeled crops and its sources are used, b each.
      queried_bc: bool.

    Returns:
      Images (b,h,w,c) as they came, labels (b,h,w) int32 and the real pixels. The
      padding of a source, which is labeled 0, is never pasted.
    """
    labeled, source = batch.labeled, batch.source
    size = labeled.image.shape[1:3]
    wanted = source.label.astype(jnp.int32)
    # A label that is no class hits none.
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
    """A train-mode pass with the masks and keys that were drawn for it."""
    return base.full_pass(
        network, images, inputs.dropout[name], inputs.dropout_keys.get(name)
    )
