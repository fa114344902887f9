"""A rank of ``vlscale doctor --dist`` on a host of its own name, for several command lines one after the other.

Usage: doctor_worker.py FILE.json, a list of scenes (see :class:`Scene`); starting processes is slow, scenes are not.
What each left is written to FILE.<rank>.out: exit status, standard output and standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Scene:
    """A command line, and in which ways ranks are odd.

    Attributes:
        words: of the doctor.
        port: of rank 0.
        ranks: those that take part.
        variables: of the environment, for all ranks; None takes one away.
        installed: folder with the metadata of other versions, for rank 1.
        wrong_sums: rank 1 adds other numbers than it should.
    """

    words: list[str]
    port: int
    ranks: list[int]
    variables: dict[str, str | None] = field(default_factory=dict)
    installed: str = ""
    wrong_sums: bool = False


def main(path: str) -> None:
    """Run the scenes of a file."""
    rank = int(os.environ["RANK"])
    results: list[tuple[int, str, str]] = []
    for scene in json.loads(Path(path).read_text(encoding="utf-8")):
        results.append(_play(Scene(**scene), rank))
        Path(f"{path}.{rank}.out").write_text(json.dumps(results), encoding="utf-8")


def _play(scene: Scene, rank: int) -> tuple[int, str, str]:
    from vlscale.cli import main as vlscale

    if rank not in scene.ranks:
        return 0, "", ""
    variables = {"SLURMD_NODENAME": f"node-{rank}", "MASTER_PORT": str(scene.port)} | scene.variables
    with _environment(variables), _odd(scene, rank), _heard() as said:
        try:
            status = vlscale(["doctor", *scene.words])
        except SystemExit as error:
            status = int(error.code or 0)
    return status, said[0], said[1]


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """What is written to standard output and to standard error in a block, also by C++; filled when it ends."""
    said: list[str] = []
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        files = (out, err)
        try:
            for number, file in enumerate(files, 1):
                os.dup2(file.fileno(), number)
            yield said
        finally:
            for number, (file, before) in enumerate(zip(files, kept, strict=True), 1):
                (sys.stdout, sys.stderr)[number - 1].flush()
                os.dup2(before, number)
                os.close(before)
                file.seek(0)
                said.append(file.read())


@contextlib.contextmanager
def _environment(variables: dict[str, str | None]) -> Iterator[None]:
    before = dict(os.environ)
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _odd(scene: Scene, rank: int) -> Iterator[None]:
    if rank != 1:
        yield
        return
    from vlscale.doctor import allreduce

    right, path = allreduce.values, list(sys.path)
    if scene.installed:
        sys.path.insert(0, scene.installed)
    if scene.wrong_sums:
        allreduce.values = lambda rank, count: right(rank + 1, count)
    try:
        yield
    finally:
        allreduce.values, sys.path[:] = right, path


if __name__ == "__main__":
    from vlscale.train.processes import run_and_exit

    run_and_exit(lambda: main(sys.argv[1]))
