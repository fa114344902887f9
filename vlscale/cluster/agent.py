"""The far end: ``python -m vlscale.cluster.agent``, started over ssh on every host by ``vlscale launch``.

It reads one JSON object per line from stdin and answers each with one line on stdout, behind :data:`MARK` (a login
shell may print more). Before the run it says what the host has and tries the network. During the run it stands guard:
when it is told to, or when nothing is heard of the launcher any more, it ends the run's processes on its host.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any, NoReturn

from vlscale.cluster import run_processes
from vlscale.cluster.facts import look

MARK = "vlscale-agent: "
MAX_LINE = 1 << 20
MAX_WORDS = 4096
_TOKEN_BYTES = 16
_STOP = signal.SIGUSR2  # vlscale.train.resilience.STOP, without importing PyTorch
_LEAVING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Lines:
    """Lines of stdin, with a time-out that Python's own buffered reading does not have."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._read = descriptor, b""

    def next(self, timeout_s: float | None) -> str | None:
        """Return the next line, or None at the end.

        Raises:
            TimeoutError: none came in time.
            ValueError: it is too long.
        """
        while b"\n" not in self._read:
            if not select.select([self._descriptor], [], [], timeout_s)[0]:
                raise TimeoutError
            more = os.read(self._descriptor, 1 << 16)
            if not more:
                return None
            self._read += more
            if len(self._read) > MAX_LINE:
                raise ValueError("line too long")
        line, _, self._read = self._read.partition(b"\n")
        return line.decode("utf-8", errors="replace")


class Listener:
    """Stands where rank 0 will, and hands a token to whoever connects: so it is this host that was reached.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, port: int) -> None:
        self.token = secrets.token_hex(_TOKEN_BYTES)
        self._socket, self._closed = _listening(port), False
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while not self._closed:
            try:
                caller, _ = self._socket.accept()
                with caller:
                    caller.sendall(self.token.encode())
                    caller.settimeout(1)
                    caller.recv(1)  # the caller closes first, so that no state of the port stays behind here
            except OSError:
                continue

    def close(self) -> None:
        """Give the port back."""
        self._closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, which holds the port as long as it waits
        self._socket.close()


def _listening(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
    return socket.create_server(("", port), backlog=1024)


def reach(addresses: list[str], port: int, token: str, timeout_s: float) -> dict[str, str]:
    """Connect to each address at once; address -> why it failed, or an empty text."""
    found = dict.fromkeys(addresses, f"no answer within {timeout_s:g} s")

    def connect(address: str) -> None:
        try:
            with socket.create_connection((address, port), timeout_s) as line:
                line.settimeout(timeout_s)
                answer = line.makefile("rb").read(2 * _TOKEN_BYTES)
            found[address] = "" if answer == token.encode() else "another program or host answers there"
        except TimeoutError:
            return
        except OSError as error:
            found[address] = error.strerror or str(error)

    threads = [threading.Thread(target=connect, args=(address,), daemon=True) for address in addresses]
    for thread in threads:
        thread.start()
    until = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return dict(found)


class Agent:
    """Answers the launcher, until it stands guard or the launcher goes."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._listener: Listener | None = None

    def serve(self) -> None:
        """Answer until the launcher has gone."""
        while (line := self._lines.next(None)) is not None:
            request = json.loads(line)
            if request["do"] == "guard":
                return self._guard(str(request["run_id"]), float(request["lease_s"]))
            _answer(self._handle(request))

    def _handle(self, request: dict[str, Any]) -> dict[str, Any]:
        what = request["do"]
        if what == "look":
            return look([str(path) for path in request["paths"][:MAX_WORDS]], str(request["master"]))
        if what == "listen":
            try:
                self._listener = Listener(int(request["port"]))
            except OSError as error:
                return {"problem": error.strerror or str(error)}
            return {"token": self._listener.token}
        if what == "connect":
            addresses = [str(address) for address in request["addresses"][:64]]
            return {"failed": reach(addresses, int(request["port"]), request["token"], float(request["wait_s"]))}
        if what == "close" and self._listener:
            self._listener.close()
        return {}

    def _guard(self, run_id: str, lease_s: float) -> None:
        """Stand guard over a run. Every line renews the lease; without one for so long, the launcher is lost."""
        if not re.fullmatch(r"[0-9a-f]{16}", run_id):
            raise ValueError("run_id")
        stopping = seen = False
        try:
            _answer({})
            until = time.monotonic() + lease_s
            while time.monotonic() < until:
                seen = seen or bool(run_processes.find(run_id))
                try:
                    line = self._lines.next(min(1.0, lease_s))
                except TimeoutError:
                    line = ""
                if line is None or line == "end":
                    break
                if line:
                    until = time.monotonic() + lease_s
                stopping = stopping or line == "stop"
                if stopping:  # again and again: some ranks may only just have started
                    run_processes.ask_to_stop(run_id, _STOP)
        finally:
            for number in _LEAVING:
                signal.signal(number, signal.SIG_IGN)  # a second one would stop the ending half-way
            run_processes.kill_launchers(run_id)
            left = run_processes.end(run_id)
            if not seen:
                run_processes.end_latecomers(run_id)
            _answer({"left": left})


def _answer(content: dict[str, Any]) -> None:
    try:
        sys.stdout.write(f"{MARK}{json.dumps(content)}\n")
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (nobody listens any more)


def _leave(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def main() -> None:
    """Serve the launcher at the other end of stdin and stdout."""
    for number in _LEAVING:
        signal.signal(number, _leave)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    Agent(Lines(sys.stdin.fileno())).serve()


if __name__ == "__main__":
    main()
