"""Noticing within seconds that another process of a run is gone.

With NCCL a process whose peer is gone waits inside a kernel, for minutes; then PyTorch aborts it without a word about
the cause. Here every process holds a TCP connection to the first one. The system closes the connections of a process
that dies, whatever killed it, and notices by keepalive probes that a machine is gone.
"""

import hmac
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from pipelines.cli import EXIT_FAILURE, START_ALL_AGAIN
from wan.utils.errors import InputError, Interrupted

log = logging.getLogger(__name__)

MEETING_SECONDS = 60.0
"""Within which all processes must be connected."""
GRACE_SECONDS = 10.0
"""That the main thread has to end by itself when a process is gone: it may know more about the cause."""
POLL_SECONDS = 0.5
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""Options of the system, where it has them: a machine that does not answer for a minute is gone."""
TOKEN_BYTES = 32
MET, DONE, LOST = b"m", b"d", b"l"
"""All processes are connected; this one has finished; another one is gone."""


@contextmanager
def watching_peers(accelerator: Accelerator) -> Iterator[None]:
    """End this process with a line on standard error if another one of the run is gone. All ranks must enter.

    Where processes cannot connect to the first one, a warning says so, and nothing is watched.
    """
    if accelerator.num_processes == 1:
        yield
        return
    connections = _meet(accelerator)
    finished = threading.Event()
    if connections:
        threading.Thread(target=_watch, args=(connections, finished), name="peers", daemon=True).start()
    try:
        yield
    except (InputError, Interrupted, KeyboardInterrupt):
        _leave(connections, finished)  # on all ranks, or with words of its own
        raise
    _leave(connections, finished)


def _meet(accelerator: Accelerator) -> list[socket.socket]:
    """Connections to all others on the first rank, and to the first one on the others; none if some did not come."""
    with ExitStack() as kept:
        server, place = None, [0, b""]
        if accelerator.is_main_process:
            server = kept.enter_context(_listening())
            place = [server.getsockname()[1], secrets.token_bytes(TOKEN_BYTES)]
        port, token = broadcast_object_list(place)
        try:
            connections = (
                [_join(port, token)] if server is None else _gather(server, token, accelerator.num_processes - 1)
            )
        except OSError as error:
            log.warning(
                "no connection between the first process and the others (%s): if one of them dies, the rest may wait "
                "for minutes before they end",
                error,
            )
            return []
    for connection in connections:
        connection.settimeout(None)
    return connections


def _listening() -> socket.socket:
    """A socket at a free port of all addresses."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _join(port: int, token: bytes) -> socket.socket:
    """Connect to the first rank.

    Raises:
        OSError: it is not reached, or others do not reach it.
    """
    connection = socket.create_connection((os.environ.get("MASTER_ADDR", "localhost"), port), MEETING_SECONDS)
    try:
        _keep_alive(connection)
        connection.sendall(token)
        connection.settimeout(2 * MEETING_SECONDS)
        if connection.recv(1) != MET:
            raise OSError("the first process did not meet all others")
    except OSError:
        connection.close()
        raise
    return connection


def _gather(server: socket.socket, token: bytes, count: int) -> list[socket.socket]:
    """Accept connections of all other ranks; strangers are sent away.

    Raises:
        OSError: they did not come in time.
    """
    deadline = time.monotonic() + MEETING_SECONDS
    connections: list[socket.socket] = []
    try:
        while len(connections) < count:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            connection, _ = server.accept()
            if _knows(connection, token):
                _keep_alive(connection)
                connections.append(connection)
            else:
                connection.close()
        for connection in connections:
            connection.sendall(MET)
    except OSError:
        for connection in connections:
            connection.close()
        raise
    return connections


def _knows(connection: socket.socket, token: bytes) -> bool:
    """Whether who connects is of this run."""
    connection.settimeout(MEETING_SECONDS)
    try:
        said = connection.recv(TOKEN_BYTES, socket.MSG_WAITALL)
    except OSError:
        return False
    return hmac.compare_digest(said, token)


def _keep_alive(connection: socket.socket) -> None:
    """Let the system find out if the other machine does not answer any more."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _watch(connections: list[socket.socket], finished: threading.Event) -> None:
    """Wait until others have finished, this process has, or one is gone; then tell the others and end."""
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection, selectors.EVENT_READ, connection)
        while selector.get_map() and not finished.is_set():
            for key, _ in selector.select(POLL_SECONDS):
                ready: socket.socket = key.data
                selector.unregister(ready)
                if _received(ready) != DONE:
                    _tell(connections, LOST)
                    _end(finished)
                    return


def _received(connection: socket.socket) -> bytes:
    """What another process says; nothing if it is gone."""
    try:
        return connection.recv(1)
    except OSError:
        return b""


def _tell(connections: list[socket.socket], word: bytes) -> None:
    for connection in connections:
        with suppress(OSError):
            connection.sendall(word)


def _end(finished: threading.Event) -> None:
    """End the process, unless its main thread does so in time."""
    if not finished.wait(GRACE_SECONDS):
        sys.stderr.write(f"error: another process of this run is gone: {START_ALL_AGAIN}\n")
        sys.stderr.flush()
        os._exit(EXIT_FAILURE)  # the main thread may hang in a kernel that never ends


def _leave(connections: list[socket.socket], finished: threading.Event) -> None:
    """Tell the others that this process has finished."""
    finished.set()
    _tell(connections, DONE)
