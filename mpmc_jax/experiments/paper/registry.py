"""The paper's experiments and our own, by name."""

from mpmc_jax.experiments.paper import (
    evidence,
    supp_table1,
    supp_table2,
    supp_table3,
    supp_table4,
    supp_table5,
    supp_table6,
    table1,
    table2,
    table3,
    table4,
    table5,
    table6,
)
from mpmc_jax.experiments.paper.base import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    "table1": table1.EXPERIMENT,
    "table2": table2.EXPERIMENT,
    "table3": table3.EXPERIMENT,
    "table4": table4.EXPERIMENT,
    "table5": table5.EXPERIMENT,
    "table6": table6.EXPERIMENT,
    "supp_table1": supp_table1.EXPERIMENT,
    "supp_table2": supp_table2.EXPERIMENT,
    "supp_table3": supp_table3.EXPERIMENT,
    "supp_table4": supp_table4.EXPERIMENT,
    "supp_table5": supp_table5.EXPERIMENT,
    "supp_table6": supp_table6.EXPERIMENT,
}
OWN: dict[str, Experiment] = {
    "evidence1": evidence.STAGE1,
    "evidence2": evidence.STAGE2,
    "evidence3": evidence.STAGE3,
}


def all_experiments() -> dict[str, Experiment]:
    """Returns the paper's experiments, then our own."""
    return {**EXPERIMENTS, **OWN}
