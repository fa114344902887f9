from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vlscale.cluster.exports import deepspeed_environment, exported, interface_problem, looks_secret, ssh_environment
from vlscale.errors import VlscaleError

HERE = Path("/project")


def test_named_variables_travel_and_no_others() -> None:
    given = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": "/mine",
        "NCCL_DEBUG": "WARN",
        "VLSCALE_X": "1",
        "OMP_NUM_THREADS": "4",
        "SITE": "a b",
        "HOME": "/home/me",
        "HF_TOKEN": "x",
        "VLSCALE_API_KEY": "x",
        "MLFLOW_TRACKING_PASSWORD": "x",
        "VLSCALE_MICRO_TOKENS": "9",
        "VLSCALE_RUN_ID": "of another run",
        "VLSCALE_LAUNCHER_ID": "of another run",
        "NCCL_IB_PKEY": "3",
        "TMPDIR": "/scratch/of-this-host",
    }
    found = exported(given, ("SITE",), HERE)
    assert found == {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": "/project:/mine",
        "NCCL_DEBUG": "WARN",
        "VLSCALE_X": "1",
        "OMP_NUM_THREADS": "4",
        "SITE": "a b",
        "VLSCALE_MICRO_TOKENS": "9",
        "NCCL_IB_PKEY": "3",
    }
    launcher = deepspeed_environment(given, found)
    assert launcher == {"PATH": found["PATH"], "HOME": "/home/me", "TMPDIR": "/scratch/of-this-host"}
    assert ssh_environment(given) == {
        key: value for key, value in given.items() if not key.endswith(("RUN_ID", "ER_ID"))
    }


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "MY_PASSWORD", "AWS_SECRET_ACCESS_KEY", "passphrase",
                                  "DB_PASS", "MYSQL_PWD", "API_KEYS", "KRB_KEYTAB"])  # fmt: skip
def test_secrets_are_refused_without_being_shown(name: str) -> None:
    with pytest.raises(VlscaleError, match="looks like a secret") as raised:
        exported({name: "planted"}, (name,), HERE)
    assert "planted" not in str(raised.value)


@pytest.mark.parametrize("value", ['a"b', "$(id)", "`id`", "a\nb", "%h", "a\\"])
def test_values_that_a_shell_would_read_are_refused_without_being_shown(value: str) -> None:
    with pytest.raises(VlscaleError, match="NCCL_X: its value holds"):
        exported({"NCCL_X": value}, (), HERE)


@pytest.mark.parametrize("name", ["PWD", "OLDPWD", "NCCL_IB_PKEY", "KEYBOARD", "AUTHOR", "MICRO_TOKENS", "BYPASS"])
def test_harmless_names(name: str) -> None:
    assert not looks_secret(name)


def test_wrong_names() -> None:
    with pytest.raises(VlscaleError, match="expected the name of an environment variable"):
        exported({}, ("A=B",), HERE)
    with pytest.raises(VlscaleError, match="it is not set here"):
        exported({}, ("SITE",), HERE)


@pytest.mark.parametrize(
    ("variable", "value", "fine"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("NCCL_SOCKET_IFNAME", "eth", True),
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "=eth0", True),
        ("NCCL_SOCKET_IFNAME", "^docker", True),
        ("NCCL_SOCKET_IFNAME", "ib0,eth0", True),
        ("NCCL_SOCKET_IFNAME", "ib0", False),
    ],
)
def test_interfaces_that_are_named_have_to_be_there(variable: str, value: str, fine: bool) -> None:
    problems = interface_problem({variable: value}, ["eth0", "lo"])
    assert (problems == []) == fine
    assert fine or f"{variable}={value}, but it has only eth0, lo" in problems[0]
