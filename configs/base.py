"""The configuration that the file of every data set starts from.

`mpmc_jax/experiments/base_config.py` declares its keys.
"""

from mpmc_jax.experiments.base_config import FORMAT_VERSION as FORMAT_VERSION
from mpmc_jax.experiments.base_config import get_base as get_base
