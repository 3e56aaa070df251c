"""Our step beside PyTorch's, on the same network, weights and views."""

import contextlib
import importlib.util
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import jax
import ml_collections
import numpy as np

from configs import base
from launch import cli
from launch.bench_step import TimedStep, noise_setup, random_batch
from launch.measuring import spread
from mpmc_jax.training.build import init_state
from mpmc_jax.training.state import TrainState
from mpmc_jax.training.step import make_keys
from mpmc_jax.types import Batch, PyTree

# How the peer runs: as commonly trained, and at its best.
PEERS = ("torch", "torch_best")


class _Peer:
    """PyTorch's step, in a process of its own: neither's threads wait for the other's.

    Used as a context; the process ends with it.
    """

    def __init__(self, kind: str, config: ml_collections.ConfigDict) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(kind, config.to_dict(), theirs), daemon=True
        )

    def __enter__(self) -> "_Peer":
        # Its JAX draws the views, on the CPU, and does no more.
        before = os.environ.get("JAX_PLATFORMS")
        os.environ["JAX_PLATFORMS"] = "cpu"
        try:
            self._process.start()
        finally:
            del os.environ["JAX_PLATFORMS"]
            if before is not None:
                os.environ["JAX_PLATFORMS"] = before
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.join()

    def step(self) -> float:
        """One update; the loss."""
        return self._ask()[0]

    def seconds(self) -> float:
        """Wall time of the next step."""
        return self._ask()[1]

    def _ask(self) -> tuple[float, float]:
        self._ours.send(None)
        while not self._ours.poll(1):
            if not self._process.is_alive():
                raise ValueError("PyTorch's process ended; its error is above")
        return self._ours.recv()


def _serve(kind: str, settings: dict[str, Any], connection: Connection) -> None:
    """Answers every message with a step's loss and seconds."""
    from launch import peer_step

    config = base.get_base()
    config.update(settings)
    if kind == "torch_best":
        cli.keep_memory()
    setup = noise_setup(config, axis_name=None)
    state = init_state(setup, config.seed)
    batch = random_batch(config, setup)

    def augment(state: TrainState, batch: Batch) -> PyTree:
        keys = make_keys(setup.step, state, batch)
        return setup.method.augment(batch, state.method_state, keys)

    rates = config.optimizer
    optimizer = {
        "lr": rates.lr,
        "momentum": rates.momentum,
        "decay": rates.weight_decay,
        "heads": rates.head_multiplier,
    }
    peer = peer_step.TorchPeer(
        kind,
        setup,
        state,
        jax.jit(augment)(state, batch),
        bfloat16=config.model.dtype == "bfloat16",
        optimizer=optimizer,
    )
    while True:
        connection.recv()
        begin = time.perf_counter()
        loss = peer.step()
        connection.send((loss, time.perf_counter() - begin))


def bench_peers(
    config: ml_collections.ConfigDict, repeats: int, kinds: list[str]
) -> dict[str, Any]:
    """Times of both in turns (A B A B), and the ratios of neighbours.

    Args:
      config: of a UniMatch run on one device.
      repeats: timed steps of each; one before them warms up.
      kinds: of `peer_step.PEERS`.

    Returns:
      Our figures; for every kind the spread (least, median, most) of its times and of
      ours over its, and both first losses.

    Raises:
      ValueError: torch is not there, or the peer does not know such a run.
    """
    if importlib.util.find_spec("torch") is None:
        raise ValueError("--peer=torch needs torch: pip install torch")
    published = config.model.backbone in ("resnet50", "resnet101")
    if config.method.name != "unimatch" or not published:
        raise ValueError(
            "--peer=torch knows --method=unimatch with --backbone=resnet50 or resnet101"
        )
    unknown = set(kinds) - set(PEERS)
    if unknown:
        raise ValueError(f"--peer={sorted(unknown)}: valid are {PEERS}")
    with contextlib.ExitStack() as stack:
        peers = {kind: stack.enter_context(_Peer(kind, config)) for kind in kinds}
        ours = TimedStep(config)
        found: dict[str, Any] = {"loss": ours.step()}
        found |= {f"{kind}_loss": peer.step() for kind, peer in peers.items()}
        times: dict[str, list[float]] = {"": [], **{kind: [] for kind in peers}}
        for _ in range(repeats + 1):
            times[""].append(ours.seconds())
            for kind, peer in peers.items():
                times[kind].append(peer.seconds())
    measured = {kind: values[1:] for kind, values in times.items()}
    found["step_seconds"] = spread(measured[""])
    for kind in kinds:
        found[f"{kind}_seconds"] = spread(measured[kind])
        ratios = np.divide(measured[""], measured[kind])
        found[f"over_{kind}"] = spread(ratios.tolist())
    return {**found, **ours.figures}
