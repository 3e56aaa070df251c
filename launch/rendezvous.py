"""Waits until all processes of a run are started, and names those that are missing.

JAX would abort with a stack trace instead. Process 0 listens on the port that JAX's
coordination service will use; the others connect and send their index.
"""

import contextlib
import json
import socket
import time
from typing import Any

_MAX_BYTES = 1000  # of a message


def wait(coordinator: str, count: int, index: int, seconds: float) -> None:
    """Returns when all processes have connected.

    Args:
      coordinator: HOST:PORT of process 0.
      count: the number of processes.
      index: the index of this process.
      seconds: how long to wait.

    Raises:
      ValueError: a process is missing or started twice, or the port is taken.
    """
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + seconds
    if index == 0:
        _accept_all(coordinator, int(port), count, deadline)
    else:
        _connect(host.strip("[]"), int(port), count, index, deadline)


def _accept_all(coordinator: str, port: int, count: int, deadline: float) -> None:
    """Process 0: accepts the others and sends all the same problem, "" for none."""
    connections: dict[int, socket.socket] = {}
    problem = ""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(_listen(port))
        except OSError as error:
            raise ValueError(
                f"--coordinator={coordinator}: process 0 cannot listen there "
                f"({error.strerror}): is another process 0 running? choose a free port"
            ) from error
        while len(connections) < count - 1 and not problem:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, count)) - connections.keys())
                problem = f"no sign of process {_join(missing)} of {count}"
                break
            stack.enter_context(connection)
            try:
                message = _receive(connection)
                index, their_count = int(message["process"]), message["processes"]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not a process of a run
            if their_count != count:
                problem = (
                    f"process {index} has --processes={their_count}, 0 has {count}"
                )
            elif index in connections and not _is_closed(connections[index]):
                problem = f"process {index} of {count} was started twice"
                _send(connection, {"problem": problem})
                break
            connections[index] = connection
        for connection in connections.values():
            _send(connection, {"problem": problem})
    if problem:
        raise ValueError(f"{problem}; end all processes, and start each of them once")


def _connect(host: str, port: int, count: int, index: int, deadline: float) -> None:
    """The other processes: connects to process 0 and waits for its answer."""
    problem = "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                _send(connection, {"process": index, "processes": count})
                connection.settimeout(max(deadline - time.monotonic(), 0.01) + 5)
                problem = _receive(connection)["problem"]
            if not problem:
                return
            break
        except OSError as error:  # process 0 does not listen yet
            problem = error.strerror or str(error)
            time.sleep(0.2)
        except (ValueError, KeyError, TypeError):
            problem = "a run that is under way, or another program, answers there"
            break
    raise ValueError(
        f"process {index} of {count} does not reach process 0 at {host}:{port}: "
        f"{problem}; end all processes, and start each of them once"
    )


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        family = socket.AF_INET6
        return socket.create_server(("", port), family=family, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the other process is gone; JAX will report it
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    """Receives a message of one line.

    Raises:
      ValueError: something else was sent.
      OSError: nothing was sent.
    """
    if connection.gettimeout() is None:
        connection.settimeout(5)
    content = b""
    while not content.endswith(b"\n"):
        part = connection.recv(_MAX_BYTES)
        content += part
        if content and (not part or len(content) > _MAX_BYTES):
            raise ValueError("not a message of a run's process")
        if not part:
            raise ConnectionResetError(0, "the connection was closed")
    return json.loads(content)


def _is_closed(connection: socket.socket) -> bool:
    try:
        connection.setblocking(False)
        return not connection.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(5)


def _join(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")
