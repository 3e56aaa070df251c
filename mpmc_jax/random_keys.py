"""Random keys derived from name, step, example and group, never from the device."""

import dataclasses

import jax

from mpmc_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Keys:
    """The random keys of one micro-batch on one device, and the run's progress.

    An example's key depends on (seed, name of the draw, step, example) and a group's
    key on (seed, name, step, group), so no draw depends on the device count. Keys of
    examples, of groups and of steps differ even if their names are the same: example 0
    and group 0 have different keys.

    Attributes:
      root: the run's key.
      step: () int32.
      example: (b,) int32, positions of the labeled examples in the global batch.
      group: (g,) int32, indices of the groups that these examples form.
      progress: () finished epochs as a fraction of the run's, for schedules per epoch.
    """

    root: Array
    step: Array
    example: Array
    group: Array
    progress: Array

    def shared(self, name: str) -> Array:
        """() key, the same for all examples of the step."""
        return self._of_step(f"step/{name}")

    def _of_step(self, name: str) -> Array:
        return jax.random.fold_in(key_of_name(self.root, name), self.step)

    def _fold(self, name: str, identities: Array) -> Array:
        base = self._of_step(name)
        return jax.vmap(lambda i: jax.random.fold_in(base, i))(identities)

    def examples(self, name: str) -> Array:
        """(b,) keys, one per example."""
        # "record" means example; another word would change what every run draws.
        return self._fold(f"record/{name}", self.example)

    def groups(self, name: str) -> Array:
        """(g,) keys, one per group."""
        return self._fold(f"group/{name}", self.group)


def key_of_name(root: Array, name: str) -> Array:
    """The key of this name, which does not depend on the order of calls."""
    number = 0
    for byte in name.encode():
        number = (number * 257 + byte) % (2**31 - 1)
    return jax.random.fold_in(root, number)
