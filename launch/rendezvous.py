"""Waiting for the processes of a run, before JAX does: it would abort with a dump.

Process 0 listens where JAX's service will; the others connect and tell their number.
"""

import contextlib
import json
import socket
import time
from typing import Any

_LIMIT = 1000  # bytes of a message


def wait(coordinator: str, count: int, index: int, seconds: float) -> None:
    """Returns when all processes are there.

    Args:
      coordinator: HOST:PORT of process 0.
      count: how many processes there are.
      index: which of them this is.
      seconds: how long to wait.

    Raises:
      ValueError: one is missing or there twice, or the port is taken; says which.
    """
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + seconds
    if index == 0:
        _gather(coordinator, int(port), count, deadline)
    else:
        _come(host.strip("[]"), int(port), count, index, deadline)


def _gather(coordinator: str, port: int, count: int, deadline: float) -> None:
    """Process 0's part: all get the same answer, empty where all is well."""
    there: dict[int, socket.socket] = {}
    problem = ""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(_listen(port))
        except OSError as error:
            raise ValueError(
                f"--coordinator={coordinator}: process 0 cannot listen there "
                f"({error.strerror}): is another process 0 running? choose a free port"
            ) from error
        while len(there) < count - 1 and not problem:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, count)) - there.keys())
                problem = f"no sign of process {_join(missing)} of {count}"
                break
            stack.enter_context(connection)
            try:
                asked = _receive(connection)
                index, their_count = int(asked["process"]), asked["processes"]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # somebody else's
            if their_count != count:
                problem = (
                    f"process {index} has --processes={their_count}, 0 has {count}"
                )
            elif index in there and not _hung_up(there[index]):
                problem = f"process {index} of {count} was started twice"
                _send(connection, {"problem": problem})
                break
            there[index] = connection
        for connection in there.values():
            _send(connection, {"problem": problem})
    if problem:
        raise ValueError(f"{problem}; end them all, and start each of them once")


def _come(host: str, port: int, count: int, index: int, deadline: float) -> None:
    """The part of the other processes."""
    problem = "nobody answers"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                _send(connection, {"process": index, "processes": count})
                connection.settimeout(max(deadline - time.monotonic(), 0.01) + 5)
                problem = _receive(connection)["problem"]
            if not problem:
                return
            break
        except OSError as error:  # process 0 is not there yet
            problem = error.strerror or str(error)
            time.sleep(0.2)
        except (ValueError, KeyError, TypeError):
            problem = "a run that is under way, or another program, answers there"
            break
    raise ValueError(
        f"process {index} of {count} does not reach process 0 at {host}:{port}: "
        f"{problem}; end them all, and start each of them once"
    )


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        family = socket.AF_INET6
        return socket.create_server(("", port), family=family, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it is gone; JAX will miss it
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    """A message of one line.

    Raises:
      ValueError: it is none.
      OSError: it did not come.
    """
    if connection.gettimeout() is None:
        connection.settimeout(5)
    content = b""
    while not content.endswith(b"\n"):
        part = connection.recv(_LIMIT)
        content += part
        if content and (not part or len(content) > _LIMIT):
            raise ValueError("no message of a process of a run")
        if not part:
            raise ConnectionResetError(0, "it hung up")
    return json.loads(content)


def _hung_up(connection: socket.socket) -> bool:
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
