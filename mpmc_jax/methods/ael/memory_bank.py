"""AEL's memory: confidence in classes, the images of each class, and requests.

Every group of images has its own memory, as every process of the published code has. A
partner image is chosen among all unlabeled images in which a class was last seen. The
pipeline has to read it, so it is used some steps later.
"""

import jax
import jax.numpy as jnp
from flax import struct

from mpmc_jax.losses.sampling import nth_true, pick
from mpmc_jax.random_keys import Keys
from mpmc_jax.types import Array, Batch


class Memory(struct.PyTreeNode):
    """The state of all groups, the same on every device.

    Attributes:
      confidence: (g,c) in 0..1.
      presence: (g,c,n) bool, whether the class was last seen in image n.
      image, label: (delay,g) int32; row t mod delay has the partners of step t and the
        class that each partner was chosen for.
    """

    confidence: Array
    presence: Array
    image: Array
    label: Array


class Seen(struct.PyTreeNode):
    """The images and draws of a step that update the memory, per group.

    Attributes:
      group: (g,) int32, numbers of the groups.
      image: (g,2) int32, indices of the two unlabeled images.
      present: (g,2,c) bool, the classes in each image.
      label: (g,) int32, the class that the next partner should contain.
      uniform: (g,) numbers in [0, 1), which choose the next partner.
    """

    group: Array
    image: Array
    present: Array
    label: Array
    uniform: Array


def draw_label(key: Array, confidence_c: Array) -> Array:
    """Draws a class with probability softmax(1 - confidence)."""
    return jax.random.categorical(key, 1 - confidence_c).astype(jnp.int32)


def observe(batch: Batch, keys: Keys, confidence_gc: Array) -> Seen:
    """Returns a step's images and draws; `present` is filled in later."""
    uniform = jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32))
    return Seen(
        group=keys.group,
        image=jnp.stack([batch.unlabeled.index, batch.partner.index], axis=1),
        present=jnp.zeros((len(keys.group), 2, confidence_gc.shape[1]), bool),
        label=jax.vmap(draw_label)(keys.groups("class"), confidence_gc),
        uniform=uniform(keys.groups("partner")),
    )


def begin(key: Array, shape: tuple[int, int, int], delay: int) -> Memory:
    """A memory of shape (g,c,n) with random confidences and uniform requests."""
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
    """The classes that cover at least `area` of the image, a fraction: (g,c) bool."""
    hit_ghwc = jax.nn.one_hot(label_ghw, num_classes, dtype=jnp.bool_)
    count_gc = jnp.sum(hit_ghwc, axis=(1, 2), dtype=jnp.int32)
    return count_gc >= area * label_ghw[0].size


def remember(memory: Memory, seen: Seen, slot: Array) -> Memory:
    """Records the classes of a step's images, then requests the next partners.

    A partner is drawn uniformly among the images in which its class was last seen, or
    among all images if there is none.

    Args:
      memory: the memory before the step.
      seen: the images and draws of any number of groups.
      slot: () int32, the row of the requests to replace.
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
