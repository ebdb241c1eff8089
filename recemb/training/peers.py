"""A line between the ranks of a run, over which the loss of one is told to the others at once, by name.

A collective does not say who is missing: gloo reports "connection closed by peer", NCCL nothing until its
timeout. So every rank keeps one TCP connection to rank 0, served by a thread of its own. The system closes it
when a process is killed, whatever state that was in; a rank that fails says why before it goes; and when a
collective times out, rank 0 asks every process, which tells a stopped one from one that is late.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch.distributed.distributed_c10d import Store

# A rank that has learnt of a loss and is still stuck, as in an NCCL kernel, is ended after this.
GRACE_SECONDS: Final = 2.5
ANSWER_SECONDS: Final = 1.0
_MAX_LINE: Final = 1 << 16
_KEY: Final = "recemb/peers"


@dataclass(frozen=True)
class Loss:
    """A rank that is gone, the exit code that it gave or caused, and what it or the system says."""

    rank: int
    exit_code: int
    message: str


class PeerLink:
    """This rank's end of the line; rank 0 is its middle.

    Args:
        rank: of this process.
        size: number of ranks.
        store: where rank 0 leaves its port, and the others find it.
        host: an address of rank 0's machine.
        timeout_seconds: for everyone to connect.

    Attributes:
        doing: what the rank is doing, in words, for messages.
        waiting: whether it has done that, and waits for the others.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: Store,
        host: str,
        timeout_seconds: float,
        *,
        one_machine: bool = True,
    ) -> None:
        self.rank, self.size = rank, size
        self.doing: object = "starting up"
        self.waiting = False
        self._lines: dict[int, _Line] = {}
        self._left: set[int] = set()
        self._answers: dict[int, str] = {}
        self._reply: str | None = None
        self._loss: Loss | None = None
        self._changed = threading.Condition()
        self._closed = False
        if rank == 0:
            listener = _listen(host if one_machine else "")
            token = secrets.token_hex(16)
            store.set(_KEY, json.dumps({"port": listener.getsockname()[1], "token": token}))
            self._accept(listener, token, timeout_seconds)
        else:
            known = json.loads(store.get(_KEY))
            line = _Line(socket.create_connection((host, known["port"]), timeout_seconds))
            line.send({"hello": rank, "token": known["token"]})
            self._lines[0] = line
        threading.Thread(target=self._serve, name="recemb-peers", daemon=True).start()

    @property
    def where(self) -> str:
        """What this rank is doing, in words."""
        return f"waiting for the others after {self.doing}" if self.waiting else f"{self.doing}"

    def loss(self, wait_seconds: float = 0.0) -> Loss | None:
        """The first rank that was lost, if one is known within ``wait_seconds``."""
        with self._changed:
            self._changed.wait_for(lambda: self._loss is not None, wait_seconds)
            return self._loss

    def who_is_missing(self) -> str:
        """Ask every rank what it is doing, and say who does not answer or is elsewhere than this one."""
        if self.rank == 0:
            return self._ask()
        with self._changed:
            self._reply = None
        self._lines[0].send({"ask": True})
        with self._changed:
            self._changed.wait_for(lambda: self._reply is not None, 2 * ANSWER_SECONDS)
            return self._reply or "rank 0 does not answer: it is stopped, or its machine cannot be reached"

    def leave(self, exit_code: int, message: str) -> None:
        """Say goodbye; with an exit code other than 0 the others stop, with the same code."""
        if self._closed:
            return
        self._closed = True
        for line in list(self._lines.values()):
            line.send({"leave": self.rank, "code": exit_code, "message": message[: _MAX_LINE // 4]})

    def end_process_within(self, seconds: float, exit_code: int, message: str) -> None:
        """Exit, with ``message`` on stderr, unless the process has ended by itself by then."""

        def end() -> None:
            time.sleep(seconds)
            # Not print: the main thread may be stuck with the lock of stderr's buffer.
            os.write(2, f"recemb: error: {message}\n".encode())
            os._exit(exit_code)

        threading.Thread(target=end, name="recemb-end", daemon=True).start()

    def _accept(self, listener: socket.socket, token: str, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        with listener:
            while len(self._lines) < self.size - 1:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    line = _Line(listener.accept()[0])
                except TimeoutError:
                    late = sorted(set(range(1, self.size)) - self._lines.keys())
                    raise TimeoutError(f"no word from ranks {_some(late)} in {timeout_seconds} s") from None
                hello = line.first(ANSWER_SECONDS)
                rank = hello.get("hello")
                # Anyone can reach a port: who does not know the token is no rank.
                if hello.get("token") == token and isinstance(rank, int) and 0 < rank < self.size:
                    self._lines[rank] = line
                else:
                    line.close()

    def _serve(self) -> None:
        selector = selectors.DefaultSelector()
        for rank, line in self._lines.items():
            selector.register(line.socket, selectors.EVENT_READ, rank)
        while selector.get_map():
            for key, _ in selector.select():
                rank = key.data
                messages = self._lines[rank].receive()
                for message in messages or ():
                    self._handle(rank, message)
                if messages is None:
                    selector.unregister(key.fileobj)
                    if rank not in self._left:
                        self._lose(Loss(rank, 1, f"rank {rank} died: it was killed, or its machine was lost"))

    def _handle(self, rank: int, message: Mapping[str, Any]) -> None:
        if "leave" in message:
            self._left.add(rank)
            if message["code"] != 0:
                text = f"rank {message['leave']} stopped: {message['message']}"
                self._lose(Loss(int(message["leave"]), int(message["code"]), text))
        elif "lost" in message:
            self._lose(Loss(int(message["lost"]), int(message["code"]), str(message["message"])))
        elif "ping" in message:
            self._lines[rank].send({"pong": self.where})
        elif "ask" in message:
            # Not here: answers arrive through this thread.
            threading.Thread(
                target=lambda: self._lines[rank].send({"reply": self._ask()}), daemon=True
            ).start()
        with self._changed:
            if "pong" in message:
                self._answers[rank] = str(message["pong"])
            elif "reply" in message:
                self._reply = str(message["reply"])
            self._changed.notify_all()

    def _ask(self) -> str:
        asked = set(self._lines) - self._left
        with self._changed:
            self._answers = {}
        for rank in asked:
            self._lines[rank].send({"ping": True})
        with self._changed:
            self._changed.wait_for(lambda: asked <= self._answers.keys(), ANSWER_SECONDS)
            answers = {0: self.where, **self._answers}
        silent = sorted(asked - answers.keys())
        if silent:
            who = f"rank {silent[0]} does" if len(silent) == 1 else f"ranks {_some(silent)} do"
            return f"{who} not answer: stopped, or the machine cannot be reached"
        return "every rank answers; " + _some([f"rank {rank} is {at}" for rank, at in answers.items()])

    def _lose(self, loss: Loss) -> None:
        with self._changed:
            if self._loss is not None or self._closed:
                return
            self._loss = loss
            self._changed.notify_all()
        if self.rank == 0:
            for rank, line in self._lines.items():
                if rank != loss.rank:
                    line.send({"lost": loss.rank, "code": loss.exit_code, "message": loss.message})
        self.end_process_within(GRACE_SECONDS, loss.exit_code, loss.message)


class _Line:
    """One connection: a JSON object a line."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that vanishes closes nothing; the system then finds out by asking.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.settimeout(ANSWER_SECONDS)
        self.socket = connection
        self._buffer = b""
        self._sending = threading.Lock()

    def send(self, message: Mapping[str, object]) -> None:
        # Who cannot be told is gone, which is found out when reading.
        with self._sending, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived; ``None`` at the end of the connection."""
        try:
            data = self.socket.recv(_MAX_LINE)
        except TimeoutError:
            return []
        except OSError:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if not data or len(self._buffer) > _MAX_LINE:
            return None
        return [message for line in lines for message in _parsed(line)]

    def first(self, seconds: float) -> dict[str, Any]:
        """The first message, or an empty one."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            messages = self.receive()
            if messages is None or messages:
                return messages[0] if messages else {}
        return {}

    def close(self) -> None:
        self.socket.close()


def _parsed(line: bytes) -> list[dict[str, Any]]:
    try:
        message = json.loads(line)
    except ValueError:
        return []
    return [message] if isinstance(message, dict) else []


def _listen(host: str) -> socket.socket:
    """On ``host`` if it is this machine's own address, else on all of them, of either version of IP.

    The name by which the others know this machine may be its loopback address to itself.
    """
    if host:
        try:
            return socket.create_server((host, 0))
        except OSError:
            pass
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _some(items: list[Any], limit: int = 8) -> str:
    shown = ", ".join(map(str, items[:limit]))
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
