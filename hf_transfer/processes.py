"""Lets the processes of one run wait for each other without a time limit, and ends all of them if one dies.

A collective (all-reduce, broadcast) fails if one process arrives later than a timeout: 10 minutes with NCCL, 30 with gloo. So
before a collective that follows uneven work, the processes meet in `wait_for_everyone`, which polls the key-value store of the
process group. A process that dies would leave the others in a collective. So a thread of every process watches a TCP
connection: the operating system closes the connection of a process that dies, even if that process was killed.
"""

import atexit
import json
import logging
import os
import re
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from hf_transfer.errors import describe_error
from hf_transfer.interrupts import Interrupted

log = logging.getLogger(__name__)

TIMEOUT = "HF_TRANSFER_COLLECTIVE_TIMEOUT_S"  # environment variable: seconds after which a collective fails
CONNECT_S = 60.0  # time limit for the connections between processes
MESSAGE_S = 15.0  # time that a process with a broken collective waits for the message of the process that died
LEAVE_S = 10.0  # time that the main process, which has the store, waits at its end for the others to leave
LONGEST_SLEEP_S = 0.2
BROKEN_COLLECTIVE = re.compile(r"pair\.cc|connection (closed|reset)|broken pipe|NCCL|gloo|TCPStore", re.IGNORECASE)

Result = TypeVar("Result")


def start(*, cpu: bool) -> PartialState:
    """Connects the processes that a launcher started. The first call decides; later calls return the same state.

    The environment variable HF_TRANSFER_COLLECTIVE_TIMEOUT_S changes the timeout of collectives.
    """
    seconds = os.environ.get(TIMEOUT)
    return PartialState(cpu=cpu, **({"timeout": timedelta(seconds=float(seconds))} if seconds else {}))


def wait_for_everyone() -> None:
    """Returns when every process has called this function, however long that takes."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        _Meetings.of_group().wait()


@contextmanager
def main_first() -> Iterator[None]:
    """Runs the `with` block on the main process first, and then on the others."""
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    if not is_main:
        wait_for_everyone()
    yield
    if is_main:
        wait_for_everyone()


def run_on_main(work: Callable[[], Result]) -> Result:
    """Returns, on every process, the result of `work()` on the main process. The others wait without a time limit.

    An error of `work` is raised on every process: as it is on the main process, and elsewhere as a ValueError or RuntimeError.
    """
    result: Result | None = None
    error: Exception | None = None
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    if dist.get_rank() == 0:
        try:
            result = work()
        except (ValueError, OSError, RuntimeError) as raised:
            error = raised
    wait_for_everyone()
    value, message = broadcast_object_list([result, error and (isinstance(error, ValueError), describe_error(error))])
    if error is not None:
        raise error
    if message is not None:
        raise (ValueError if message[0] else RuntimeError)(message[1])
    shared: Result = value
    return shared


def gather(value: Result) -> list[Result]:
    """Returns the values of all processes, by rank. The processes wait for each other without a time limit."""
    wait_for_everyone()
    values: list[Result] = gather_object([value])
    return values


class _Meetings:
    """Counts in the store of a process group how many processes have arrived at each meeting."""

    current: "_Meetings | None" = None

    def __init__(self, store: Any) -> None:
        self.store = store
        self._number = 0

    @classmethod
    def of_group(cls) -> "_Meetings":
        """Returns the meetings of the default process group."""
        store = dist.distributed_c10d._get_default_store()
        if cls.current is None or cls.current.store is not store:
            cls.current = cls(store)
        return cls.current

    def wait(self) -> None:
        key, count = f"hf_transfer/meeting/{self._number}", dist.get_world_size()
        self._number += 1
        arrived, sleep_s = self.store.add(key, 1), 0.001
        while arrived < count:
            time.sleep(sleep_s)
            sleep_s = min(1.5 * sleep_s, LONGEST_SLEEP_S)
            arrived = self.store.add(key, 0)


# --- a process that dies ends the others ------------------------------------------------------------------------------


def watch() -> None:
    """Starts to watch the other processes. If one dies, this process ends with one line and exit status 1."""
    if _Watch.current is None and dist.is_initialized() and dist.get_world_size() > 1:
        _Watch.current = _Watch(dist.get_rank(), dist.get_world_size())
        atexit.register(leave)


def leave() -> None:
    """Stops watching: from now on, the end of this process is no failure for the others, unless an exception ends it.

    A program may run many trainings, so the processes disconnect only here, at its end.
    """
    error = getattr(sys, "last_value", None)  # the exception that ended the main thread
    _say_goodbye({"left": True} if error is None else {"error": describe_error(error)})
    if error is None and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def ending_together() -> Iterator[None]:
    """Ends the other processes, with this process's error message, if the `with` block (or decorated function) raises."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        # At an interrupt that all processes share, each one saves its part and leaves by itself.
        if _Watch.current is not None and not (isinstance(error, Interrupted) and error.is_shared):
            if isinstance(error, RuntimeError) and BROKEN_COLLECTIVE.search(str(error)):
                time.sleep(MESSAGE_S)  # another process died: the watching thread ends this process, with its message
            _say_goodbye({"error": describe_error(error)})
        raise


def _say_goodbye(message: dict[str, Any]) -> None:
    watch, _Watch.current = _Watch.current, None
    if watch is not None:
        watch.tell(message)


class _Watch:
    """Connections over which processes tell each other that they leave or fail: from the main process to each other one."""

    current: "_Watch | None" = None

    def __init__(self, rank: int, count: int) -> None:
        self.rank = rank
        self._peers: dict[socket.socket, int] = {}  # rank of the process at the other end
        self._is_over = False
        self._lock = threading.Lock()
        meetings = _Meetings.of_group()
        key, host = "hf_transfer/watch", os.environ.get("MASTER_ADDR", "localhost")
        if rank == 0:
            server, token = socket.create_server(("", 0), backlog=count), secrets.token_hex(16)
            meetings.store.set(key, f"{server.getsockname()[1]} {token}")
            with server:
                self._accept(server, token, count)
        else:
            port, token = meetings.store.get(key).decode().split()
            connection = socket.create_connection((host, int(port)), timeout=CONNECT_S)
            connection.sendall(f"{token} {rank}\n".encode())
            self._add(connection, 0)
        self._thread = threading.Thread(target=self._run, daemon=True, name="hf_transfer-watch")
        self._thread.start()

    def _accept(self, server: socket.socket, token: str, count: int) -> None:
        server.settimeout(CONNECT_S)
        while len(self._peers) < count - 1:
            connection, _ = server.accept()
            connection.settimeout(CONNECT_S)
            with connection.makefile("rb") as lines:
                words = lines.readline(100).decode(errors="replace").split()
            if len(words) == 2 and secrets.compare_digest(words[0], token):
                self._add(connection, int(words[1]))
            else:
                connection.close()  # not one of our processes

    def _add(self, connection: socket.socket, rank: int) -> None:
        connection.settimeout(CONNECT_S)
        # If a machine fails without closing its connections, probes notice within 40 seconds.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._peers[connection] = rank

    def tell(self, message: dict[str, Any]) -> None:
        """Sends the processes at the other ends the last message of this process."""
        with self._lock:
            self._is_over = True
            self._send({"rank": self.rank, **message})
        if self.rank == 0:
            self._thread.join(LEAVE_S)  # the others may still read the store

    def _send(self, message: dict[str, Any]) -> None:
        for connection in self._peers:
            try:
                connection.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                continue  # the other process has ended already

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._peers:
                selector.register(connection, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    assert isinstance(key.fileobj, socket.socket)
                    message = self._read(key.fileobj)
                    if "left" not in message:
                        self._fail(message)
                    selector.unregister(key.fileobj)

    def _read(self, connection: socket.socket) -> dict[str, Any]:
        """Returns the last message of the process at the other end, or only the rank if the process died without a word."""
        received = b""
        try:
            while not received.endswith(b"\n") and (more := connection.recv(1 << 16)):
                received += more
        except OSError:
            pass  # the connection was reset
        message: dict[str, Any] = (
            json.loads(received) if received.endswith(b"\n") else {"rank": self._peers[connection]}
        )
        return message

    def _fail(self, message: dict[str, Any]) -> None:
        """Ends this process, after telling the others, unless this process is ending already."""
        with self._lock:
            if self._is_over:
                return
            self._send(message)
        reason = message.get("error", "it was killed, ran out of memory, or its machine failed")
        sys.stderr.write(f"process {self.rank} ends because process {message['rank']} ended: {reason}\n")
        sys.stderr.flush()
        # The main thread may wait in a collective for ever, where no exception reaches it.
        os._exit(1)
