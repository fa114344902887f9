from __future__ import annotations

from pathlib import Path

import pytest

from vlscale.cluster.hostfile import MAX_BYTES, Host, read_hostfile, select
from vlscale.errors import VlscaleError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hosts"
    path.write_text(text, encoding="utf-8")
    return path


def shape(hosts: tuple[Host, ...]) -> dict[str, tuple[int, ...]]:
    return {host.name: host.slots for host in hosts}


def test_comments_blank_lines_and_order(tmp_path: Path) -> None:
    path = write(tmp_path, "# cluster\n\nnode-b slots=2 # the master\n  10.0.0.7\tslots=1\nn_1.site slots=3\n")
    hosts = read_hostfile(path)
    assert list(shape(hosts).items()) == [("node-b", (0, 1)), ("10.0.0.7", (0,)), ("n_1.site", (0, 1, 2))]
    assert hosts[1].line == f"{path}:4"


def test_the_example_is_read() -> None:
    example = Path(__file__).resolve().parents[2] / "launch" / "hostfile.example"
    assert shape(read_hostfile(example)) == {"node-01": tuple(range(8)), "node-02": tuple(range(8))}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a slots=1\nb slots=1\na slots=2\n", ":3: host a stands twice, first in "),
        ("a slots=0\n", ":1: host a: slots=0; expected 1 to 1024"),
        ("a slots=-2\n", ":1: host a: found 'slots=-2'"),
        ("a slots=two\n", ":1: host a: found 'slots=two'"),
        ("a slots=99999\n", "expected 1 to 1024"),
        ("a slots=" + "9" * 5000 + "\n", "..."),
        ("a\n", ":1: host a: found no slots"),
        ("a slots = 2\n", "found '=' after it"),
        ("a slots=2 max_slots=4\n", "found 'max_slots=4' after it"),
        ("a gpus=2\n", "expected `host slots=N`"),
        ("-oProxyCommand=touch${IFS}x slots=1\n", ":1: '-oProxyCommand=touch${IFS}x' is no host name"),
        ("a;reboot slots=1\n", "is no host name"),
        ("node[1-3] slots=1\n", "is no host name"),
        ("a,b slots=1\n", "is no host name"),
        ("root@a slots=1\n", "put the user into ~/.ssh/config"),
        ("\x1b[2Ja slots=1\n", "'\\x1b[2Ja' is no host name"),
        ("a slots=1\u2028b slots=1\n", ":1: host a: found 'b' after it"),
        ("a slots=1\x0b\nb slots=0\n", ":2: host b: slots=0"),
        ("".join(f"a{number} slots=1\n" for number in range(1025)), ":1025: more than 1024 hosts"),
        ("# nothing\n", "no host; expected `host slots=N` per line"),
        ("#" * (MAX_BYTES + 1), "larger than"),
    ],
)
def test_wrong_hostfiles_are_told_by_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(VlscaleError) as raised:
        read_hostfile(write(tmp_path, text))
    assert told in str(raised.value)
    assert len(str(raised.value)) < 600
    assert str(raised.value).isprintable()


def test_a_missing_hostfile(tmp_path: Path) -> None:
    with pytest.raises(VlscaleError, match="cannot be read"):
        read_hostfile(tmp_path / "none")


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ("", "", {"a": (0, 1), "b": (0, 1, 2, 3)}),
        ("b", "", {"b": (0, 1, 2, 3)}),
        ("b:0,2@a:1", "", {"a": (1,), "b": (0, 2)}),
        ("b:0@b:3", "", {"b": (0, 3)}),
        ("", "a", {"b": (0, 1, 2, 3)}),
        ("", "b:0,1", {"a": (0, 1), "b": (2, 3)}),
    ],
)
def test_filters_agree_with_deepspeed(
    tmp_path: Path, include: str, exclude: str, left: dict[str, tuple[int, ...]]
) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    path = write(tmp_path, "a slots=2\nb slots=4\n")
    hosts = select(read_hostfile(path), include, exclude)
    assert shape(hosts) == left
    theirs = runner.parse_inclusion_exclusion(runner.fetch_hostfile(str(path)), include, exclude)
    assert {name: tuple(slots) for name, slots in theirs.items()} == left
    assert list(theirs) == list(left)


@pytest.mark.parametrize(
    ("include", "exclude", "told"),
    [
        ("a", "b", "exclude each other"),
        ("c", "", "host 'c' is not in the hostfile"),
        ("", "a@b", "no slot is left"),
        ("b:4", "", "host b has no slot 4"),
        ("b:x", "", "expected NAME:SLOT"),
        ("b:", "", "expected NAME:SLOT"),
    ],
)
def test_wrong_filters(tmp_path: Path, include: str, exclude: str, told: str) -> None:
    hosts = read_hostfile(write(tmp_path, "a slots=2\nb slots=4\n"))
    with pytest.raises(VlscaleError, match=told):
        select(hosts, include, exclude)
