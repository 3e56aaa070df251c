"""The flags with which a user names a data set that is not prepared yet."""

from absl import flags

from mpmc_jax.data import build
from mpmc_jax.data.source import Source

_DATASET = flags.DEFINE_enum("dataset", None, list(build.BUILDERS), "Data set.")
_SOURCE = flags.DEFINE_string("source", "", "Its folder; `synthetic` has none.")
_CLASSES = flags.DEFINE_list("classes", [], "Class names, for `folder`.")


def read_source() -> Source:
    """The source that the flags name.

    Raises:
      FileNotFoundError: its folder is missing or empty.
    """
    # The launchers mark --dataset as required.
    name = _DATASET.value or ""
    return build.read_source(name, _SOURCE.value, tuple(_CLASSES.value))
