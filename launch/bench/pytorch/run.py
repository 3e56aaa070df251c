"""PyTorch in a process beside us; its step on the same network, weights and views."""

import contextlib
import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import jax
import ml_collections
import numpy as np

from configs import base
from launch import cli
from launch.bench.gpu import hlo
from launch.bench.step import TimedStep
from launch.bench.timing import spread
from mpmc_jax.experiments.build import init_state
from mpmc_jax.experiments.step_program import noise_setup, random_batch
from mpmc_jax.training.state import TrainState
from mpmc_jax.training.train_step import make_keys
from mpmc_jax.types import Batch, PyTree

# How the peer runs, by what is measured; see `TorchPeer`.
PEERS = {
    "step": ("torch", "torch_amp", "torch_best"),
    "eval": ("torch",),
    "compile": ("torch",),
}
# By method: the encoders that the peer has.
_NETWORKS = {
    "unimatch": ("resnet50", "resnet101"),
    "unimatch_v2": ("dinov2_s14", "dinov2_b14", "dinov2_l14"),
}


class Peer:
    """PyTorch in a process of its own: neither's threads wait for the other's.

    Used as a context; the process ends with it.

    Args:
      make: makes what the process answers with, as often as it is asked; a module's
        function.
      args: its arguments.
    """

    def __init__(self, make: Callable[..., Callable[[], Any]], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._theirs = theirs
        self._process = context.Process(
            target=_serve, args=(make, args, theirs), daemon=True
        )

    def __enter__(self) -> "Peer":
        # Its JAX draws the views, on the CPU, and does no more.
        before = os.environ.get("JAX_PLATFORMS")
        os.environ["JAX_PLATFORMS"] = "cpu"
        try:
            self._process.start()
            # Only the process holds its end now, so that its own end is seen.
            self._theirs.close()
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

    def ask(self) -> tuple[Any, float]:
        """What its function returns now, and the wall time that it takes.

        Raises:
          ValueError: the process ended.
        """
        try:
            self._ours.send(None)
            return self._ours.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise ValueError(
                f"PyTorch's process ended with status {self._process.exitcode} (-9: "
                "memory is too small for both); its error is above"
            ) from error


def check_peers(config: ml_collections.ConfigDict, what: str, kinds: list[str]) -> None:
    """Raises ValueError: torch is not there, or has no such peer for such a run."""
    if not kinds:
        return
    known = PEERS.get(what, ())
    if unknown := set(kinds) - set(known):
        raise ValueError(f"--peer={sorted(unknown)}: of {what} valid are {known}")
    if importlib.util.find_spec("torch") is None:
        raise ValueError("--peer=torch needs torch: pip install torch")
    backbones = _NETWORKS.get(config.method.name, ())
    if config.model.backbone not in backbones or (what == "eval" and _is_v2(config)):
        raise ValueError(
            "--peer=torch knows --method=unimatch with --backbone=resnet50 or "
            "resnet101 and, except for --what=eval, --method=unimatch_v2 with "
            f"{', '.join(_NETWORKS['unimatch_v2'])}"
        )
    if _is_v2(config) and (
        config.mpmc.enabled or config.train.batch_size != config.train.group_size
    ):
        raise ValueError(
            "--peer=torch knows --method=unimatch_v2 without MPMC on a single group: "
            f"set --mpmc=off --group_size={config.train.batch_size}"
        )


def _is_v2(config: ml_collections.ConfigDict) -> bool:
    return config.method.name == "unimatch_v2"


def _serve(
    make: Callable[..., Callable[[], Any]], args: tuple[Any, ...], asked: Connection
) -> None:
    answer = make(*args)
    while True:
        asked.recv()
        begin = time.perf_counter()
        found = answer()
        asked.send((found, time.perf_counter() - begin))


def restored(settings: dict[str, Any]) -> ml_collections.ConfigDict:
    """The configuration whose `to_dict` came to the peer's process."""
    config = base.get_base()
    config.update(settings)
    return config


def _make_step(kind: str, settings: dict[str, Any]) -> Callable[[], float]:
    """One update; the loss."""
    return _make_peer(kind, settings).step


def _make_count(settings: dict[str, Any]) -> Callable[[], tuple[list[hlo.Kernel], int]]:
    """The operations and the peak memory of one update, on tensors without values."""
    from launch.bench.pytorch import count

    peer = _make_peer("torch", settings, "meta")
    return lambda: count.count_step(peer.update)


def count_peer(config: ml_collections.ConfigDict) -> tuple[list[hlo.Kernel], int]:
    """Lists the operations of PyTorch's step on one device, and its peak memory."""
    with Peer(_make_count, config.to_dict()) as peer:
        return peer.ask()[0]


def _make_peer(kind: str, settings: dict[str, Any], device: str = "") -> Any:
    from launch.bench.pytorch.step import TorchPeer
    from launch.bench.pytorch.step_v2 import TorchPeerV2

    config = restored(settings)
    if kind != "torch":
        cli.keep_memory()
    setup = noise_setup(config, axis_name=None)
    state = init_state(setup, config.seed)
    batch = random_batch(config, setup)

    def augment(state: TrainState, batch: Batch) -> PyTree:
        keys = make_keys(setup.step, state, batch)
        return setup.step.method.augment(batch, state.method_state, keys)

    make = TorchPeerV2 if _is_v2(config) else TorchPeer
    return make(
        kind,
        setup,
        state,
        jax.jit(augment)(state, batch),
        bfloat16=config.model.dtype == "bfloat16",
        optimizer=settings["optimizer"],
        device=device,
    )


def bench_peers(
    config: ml_collections.ConfigDict,
    repeats: int,
    kinds: list[str],
    ours: TimedStep | None = None,
) -> dict[str, Any]:
    """Times of both in turns (A B A B), and the ratios of neighbors.

    Args:
      config: of a UniMatch run on one device.
      repeats: timed steps of each; one before them warms up.
      kinds: of PEERS, checked.
      ours: our step; None to make it.

    Returns:
      Our figures; for every kind the spread (least, median, most) of its times and of
      ours over its, and both first losses.
    """
    with contextlib.ExitStack() as stack:
        peers = {
            kind: stack.enter_context(Peer(_make_step, kind, config.to_dict()))
            for kind in kinds
        }
        ours = ours or TimedStep(config)
        found: dict[str, Any] = {"loss": ours.step()}
        found |= {f"{kind}_loss": peer.ask()[0] for kind, peer in peers.items()}
        times: dict[str, list[float]] = {"": [], **{kind: [] for kind in peers}}
        for _ in range(repeats + 1):
            times[""].append(ours.seconds())
            for kind, peer in peers.items():
                times[kind].append(peer.ask()[1])
    measured = {kind: values[1:] for kind, values in times.items()}
    found["step_seconds"] = spread(measured[""])
    for kind in kinds:
        found[f"{kind}_seconds"] = spread(measured[kind])
        ratios = np.divide(measured[""], measured[kind])
        found[f"over_{kind}"] = spread(ratios.tolist())
    return {**found, **ours.figures}
