"""Two hosts on one machine: network namespaces joined by a cable, each with its name, sshd, mounts and /dev/shm."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = {"/usr/sbin/sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh", "ip": "iproute2"}
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
NODES = ("node-a", "node-b")
ADDRESSES = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}
SILENT = "10.77.0.9"
"""An address that swallows packets: nobody has it, and nobody says so."""

_NAMESPACE = re.compile(r"vl(\d+)[ab]")
_NETNS = Path("/etc/netns")


def why_not() -> str | None:
    """Why this machine cannot have such hosts; None if it can."""
    if os.geteuid() != 0:
        return "needs root (network namespaces)"
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    if missing and not shutil.which("apt-get"):
        return f"needs {', '.join(missing)}"
    return None


def install() -> str | None:
    """Install the Debian packages that are missing, and try what :func:`two_hosts` needs; returns why it cannot be."""
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    apt = ["apt-get", "-qq", "-o", "Acquire::http::Timeout=10", "-o", "Acquire::Retries=1"]
    wanted = [[*apt, "update"], [*apt, "install", "-y", "--no-install-recommends", *missing]] if missing else []
    # A container's root need not have the rights.
    wanted += [["unshare", "-n", "-m", "-u", "sh", "-c",
                "ip link add name va type veth peer name vb && hostname a && mount -t tmpfs t /mnt"]]  # fmt: skip
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in wanted:
        what = "apt-get" if words[0] == "apt-get" else "making a network namespace"
        try:
            done = subprocess.run(words, capture_output=True, text=True, env=quiet, timeout=300)
        except (subprocess.TimeoutExpired, OSError) as error:
            return f"{what}: {error}"
        if done.returncode:
            return f"{what}: {(done.stderr.strip().splitlines() or [f'status {done.returncode}'])[-1]}"
    return None


@dataclass(frozen=True)
class Node:
    """One host.

    Attributes:
        name: as the other host knows it.
        namespace: of its network.
        cable: its interface.
        sshd: process id of its daemon, in whose namespaces everything on this host runs.
    """

    name: str
    namespace: str
    cable: str
    sshd: int

    def inside(self, *words: str | Path) -> list[str]:
        """The command that runs ``words`` on this host."""
        return ["nsenter", "-t", str(self.sshd), "-n", "-m", "-u", "--wd=/", "--", *map(str, words)]

    def call(self, *words: str | Path) -> None:
        """Run a short command on this host."""
        subprocess.run(self.inside(*words), check=True, capture_output=True, timeout=20)

    def processes(self) -> dict[int, dict[str, str]]:
        """Process id -> environment of all that runs here but the daemon."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True)
        found = {int(word): _environment(int(word)) for word in listed.stdout.split() if int(word) != self.sshd}
        return {pid: variables for pid, variables in found.items() if variables}

    def ranks(self) -> dict[int, int]:
        """Rank -> process id of the ranks that run here, their children aside."""
        found = {pid: int(env["RANK"]) for pid, env in self.processes().items() if env.get("RANK", "").isdecimal()}
        return {rank: pid for pid, rank in found.items() if _parent(pid) not in found}

    def of_run(self) -> dict[int, str]:
        """Process id -> command of what belongs to a run: DeepSpeed's launchers, ranks, agents, and their children."""
        commands = {pid: _command(pid) for pid in self.processes()}
        words = ("deepspeed", "RANK", "vlscale", "pretrain.py", "torchrun", str(ROOT / "tests"))
        return {
            pid: command
            for pid, command in commands.items()
            if any(word in command for word in words) or "RANK" in _environment(pid)
        }

    @contextmanager
    def covered(self, path: Path, by: Path | None = None) -> Iterator[None]:
        """On this host alone, show a file or folder in place of another, or an empty folder."""
        if by is None:
            self.call("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path)
        else:
            self.call("mount", "--bind", by, path)
        try:
            yield
        finally:
            self.call("umount", "-l", path)

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        """Take the cable out."""
        self.call("ip", "link", "set", self.cable, "down")
        try:
            yield
        finally:
            self.call("ip", "link", "set", self.cable, "up")


@dataclass
class Network:
    """The two hosts, and how to run something on the first."""

    folder: Path
    nodes: dict[str, Node] = field(default_factory=dict)

    def environment(self, **more: str | None) -> dict[str, str]:
        """Variables of a user on a host: ssh is our wrapper, so that nobody's ~/.ssh is touched."""
        path = f"{self.folder / 'bin'}:{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        ours = {
            "TMPDIR": str(self.folder),
            "PATH": path,
            "HOME": os.environ.get("HOME", "/root"),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        return {name: value for name, value in {**ours, **more}.items() if value is not None}

    @contextmanager
    def start(self, node: str, *words: str | Path, **variables: str | None) -> Iterator[subprocess.Popen[str]]:
        """Start a command in the root of the repository on a host; at the end, it is gone."""
        here = self.nodes[node].inside("env", f"--chdir={ROOT}", *words)
        pipe = subprocess.PIPE
        process = subprocess.Popen(here, env=self.environment(**variables), stdout=pipe, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL, text=True, start_new_session=True)  # fmt: skip
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def run(self, node: str, *words: str | Path, timeout: float = 170, **variables: str | None) -> Finished:
        """Run a command to its end."""
        begun = time.monotonic()
        with self.start(node, *words, **variables) as process:
            try:
                out, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise AssertionError(f"no end after {timeout} s: {process.communicate()[0][-5000:]}") from None
        return Finished(process.returncode, out, time.monotonic() - begun)

    def left(self, patience_s: float = 0.0) -> dict[int, str]:
        """What of a run is still there on either host, once ``patience_s`` has passed or nothing is."""
        until = time.monotonic() + patience_s
        while True:
            found = {pid: command for node in self.nodes.values() for pid, command in node.of_run().items()}
            if not found or time.monotonic() > until:
                return found
            time.sleep(0.2)

    def clear(self) -> None:
        """End everything on both hosts but the daemons."""
        for node in self.nodes.values():
            for pid in node.processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Finished:
    """Exit status, output (both streams) and duration of a command."""

    status: int
    out: str
    seconds: float

    @property
    def tail(self) -> str:
        """For assertion messages."""
        return f"status {self.status} after {self.seconds:.0f} s\n{self.out[-6000:]}"


@contextmanager
def two_hosts() -> Iterator[Network]:
    """Make the hosts; whatever happens, they are taken down, and so are those that a killed run has left."""
    _sweep_leftovers()
    spaces = {name: f"vl{os.getpid()}{name[-1]}" for name in NODES}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"vlscale-hosts-{os.getpid()}-")))
        network = Network(folder)
        for space in spaces.values():
            stack.callback(_remove, space)
        _wire(spaces)
        _write_ssh_files(folder)
        for name in NODES:
            network.nodes[name] = _boot(name, spaces[name], folder)
        yield network


def _wire(spaces: Mapping[str, str]) -> None:
    for own, space in spaces.items():
        _ip("netns", "add", space)
        _ip("-n", space, "link", "set", "lo", "up")
        _write_hosts(space, own)
    one, other = spaces.values()
    # The two ends have different names, as interfaces of different machines do.
    _ip("link", "add", f"{one}0", "netns", one, "type", "veth", "peer", "name", f"{other}1", "netns", other)
    for (name, space), end in zip(spaces.items(), "01", strict=True):
        _ip("-n", space, "addr", "add", f"{ADDRESSES[name]}/24", "dev", f"{space}{end}")
        _ip("-n", space, "link", "set", f"{space}{end}", "up")
    nobody = ("neigh", "add", SILENT, "lladdr", "02:00:00:00:00:99", "dev", f"{one}0", "nud", "permanent")
    _ip("-n", one, *nobody)


def _write_hosts(space: str, own: str) -> None:
    """As Debian does it: a host's own name means a loopback address there."""
    others = [(name, address) for name, address in ADDRESSES.items() if name != own]
    pairs = [("localhost", "127.0.0.1"), (own, "127.0.1.1"), *others, ("node-silent", SILENT)]
    (_NETNS / space).mkdir(parents=True, exist_ok=True)
    (_NETNS / space / "hosts").write_text("".join(f"{address} {name}\n" for name, address in pairs), encoding="utf-8")


def _write_ssh_files(folder: Path) -> None:
    (folder / "bin").mkdir()
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    public = (folder / "host.pub").read_text(encoding="utf-8")
    names = ",".join(f"[{name}]:2222,[{ADDRESSES[name]}]:2222" for name in NODES)
    (folder / "known_hosts").write_text(f"{names} {public}", encoding="utf-8")
    (folder / "ssh_config").write_text(
        f"Host *\n  Port 2222\n  User root\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n  StrictHostKeyChecking yes\n",
        encoding="utf-8",
    )
    wrapper = folder / "bin" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {folder}/ssh_config "$@"\n', encoding="utf-8")
    wrapper.chmod(0o755)
    for name in NODES:
        (folder / f"sshd_{name}").write_text(
            f"Port 2222\nHostKey {folder}/host\nPidFile {folder}/{name}.pid\nAuthorizedKeysFile {folder}/user.pub\n"
            f"StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
            f"MaxStartups 100\nLogLevel ERROR\n",
            encoding="utf-8",
        )


def _boot(name: str, space: str, folder: Path) -> Node:
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    start = (
        f"hostname {name} && mount -t tmpfs -o size=1g tmpfs /dev/shm && exec /usr/sbin/sshd -f {folder}/sshd_{name}"
    )
    subprocess.run(["ip", "netns", "exec", space, "unshare", "-u", "sh", "-c", start], check=True, timeout=20)
    until = time.monotonic() + 10
    while not (pid := _read(folder / f"{name}.pid").strip()):
        if time.monotonic() > until:
            raise RuntimeError(f"sshd of {name} did not start")
        time.sleep(0.05)
    return Node(name, space, f"{space}{NODES.index(name)}", int(pid))


def _remove(space: str) -> None:
    """Take a namespace of ours down with all that runs in it."""
    for _ in range(50):
        listed = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
        if not listed.stdout.split():
            break
        for word in listed.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(word), signal.SIGKILL)
        time.sleep(0.1)
    subprocess.run(["ip", "netns", "del", space], capture_output=True)
    shutil.rmtree(_NETNS / space, ignore_errors=True)
    with suppress(OSError):
        _NETNS.rmdir()


def _sweep_leftovers() -> None:
    """Remove namespaces and folders whose test run is gone."""
    for folder in Path(tempfile.gettempdir()).glob("vlscale-hosts-*-*"):
        if not Path(f"/proc/{folder.name.split('-')[2]}").exists():
            shutil.rmtree(folder, ignore_errors=True)
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True)
    for line in listed.stdout.splitlines():
        match = _NAMESPACE.fullmatch(line.split()[0])
        if match and not Path(f"/proc/{match[1]}").exists():
            _remove(match[0])


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _environment(pid: int) -> dict[str, str]:
    pairs = (entry.partition("=") for entry in _read(Path(f"/proc/{pid}/environ")).split("\0") if entry)
    return {name: value for name, _, value in pairs}


def _command(pid: int) -> str:
    return _read(Path(f"/proc/{pid}/cmdline")).replace("\0", " ")


def _parent(pid: int) -> int:
    match = re.search(r"^PPid:\s*(\d+)$", _read(Path(f"/proc/{pid}/status")), re.MULTILINE)
    return int(match[1]) if match else 0
