"""What AEL remembers: confidence in classes, where each class was seen, requests.

Every group of images has a memory of its own, as a published process had. An image to
mix with is chosen by where its class was last seen in the whole data set, and read by
the pipeline: it is served some steps later.
"""

import jax
import jax.numpy as jnp
from flax import struct

from mpmc_jax.losses.sampling import nth_true, pick
from mpmc_jax.random_keys import Keys
from mpmc_jax.types import Array, Batch


class Memory(struct.PyTreeNode):
    """State of all groups, the same on every device.

    Attributes:
      confidence: (g,c) in 0..1.
      presence: (g,c,n) bool, whether image n was seen to hold the class.
      image, label: (delay,g) int32; row t mod delay has the partners of step t and the
        class that each was chosen for.
    """

    confidence: Array
    presence: Array
    image: Array
    label: Array


class Seen(struct.PyTreeNode):
    """What a step saw and draws, for each group at hand.

    Attributes:
      group: (g,) int32.
      image: (g,2) int32, the two unlabeled images.
      present: (g,2,c) bool, the classes in each.
      label: (g,) int32, the class that the next partner shall hold.
      uniform: (g,) numbers in [0, 1), which choose it.
    """

    group: Array
    image: Array
    present: Array
    label: Array
    uniform: Array


def draw_label(key: Array, confidence_c: Array) -> Array:
    """A class by softmax(1 - confidence)."""
    return jax.random.categorical(key, 1 - confidence_c).astype(jnp.int32)


def observe(batch: Batch, keys: Keys, confidence_gc: Array) -> Seen:
    """The images of a step and its draws, classes still to come."""
    uniform = jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32))
    return Seen(
        group=keys.group,
        image=jnp.stack([batch.unlabeled.index, batch.partner.index], axis=1),
        present=jnp.zeros((len(keys.group), 2, confidence_gc.shape[1]), bool),
        label=jax.vmap(draw_label)(keys.groups("class"), confidence_gc),
        uniform=uniform(keys.groups("partner")),
    )


def begin(key: Array, shape: tuple[int, int, int], delay: int) -> Memory:
    """Random confidences, nothing seen, uniform requests; shape is (g,c,n)."""
    groups, num_classes, images = shape
    confidence_key, image_key, label_key = jax.random.split(key, 3)
    confidence = jax.random.uniform(
        confidence_key, (groups, num_classes), dtype=jnp.float32
    )
    label_keys = jax.random.split(label_key, (delay, groups))
    draw = jax.vmap(jax.vmap(draw_label), in_axes=(0, None))
    return Memory(
        confidence=confidence,
        presence=jnp.zeros(shape, bool),
        image=jax.random.randint(image_key, (delay, groups), 0, images),
        label=draw(label_keys, confidence),
    )


def present(label_ghw: Array, num_classes: int, area: float) -> Array:
    """(g,c) bool, the classes that cover at least this share of the image."""
    hit_ghwc = jax.nn.one_hot(label_ghw, num_classes, dtype=jnp.bool_)
    count_gc = jnp.sum(hit_ghwc, axis=(1, 2), dtype=jnp.int32)
    return count_gc >= area * label_ghw[0].size


def remember(memory: Memory, seen: Seen, slot: Array) -> Memory:
    """Notes the classes of a step's images, then requests the next partners.

    A partner is uniform among the images that hold its class, or among all if none is
    known to.

    Args:
      memory: before.
      seen: of any number of groups.
      slot: () int32, the row of the requests to be replaced.
    """
    presence = memory.presence
    for place in range(2):
        presence = presence.at[seen.group, :, seen.image[:, place]].set(
            seen.present[:, place]
        )

    def choose(holds_n: Array, uniform: Array) -> Array:
        candidates_n = holds_n | ~jnp.any(holds_n)
        count = jnp.sum(candidates_n, dtype=jnp.int32)
        return nth_true(candidates_n, pick(uniform, count)).astype(jnp.int32)

    image = jax.vmap(choose)(presence[seen.group, seen.label], seen.uniform)
    return memory.replace(
        presence=presence,
        image=memory.image.at[slot, seen.group].set(image),
        label=memory.label.at[slot, seen.group].set(seen.label),
    )
