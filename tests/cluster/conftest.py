"""The two hosts, once for all tests that want them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.network import Network, install, two_hosts, why_not


@pytest.fixture(scope="session")
def two_nodes() -> Iterator[Network]:
    reason = why_not() or install()
    if reason:
        pytest.skip(f"no two hosts here: {reason}")
    with two_hosts() as network:
        yield network


@pytest.fixture
def hosts(two_nodes: Network) -> Iterator[Network]:
    """The two hosts, empty; a test that leaves something behind does not disturb the next."""
    yield two_nodes
    two_nodes.clear()
