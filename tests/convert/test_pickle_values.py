"""Plain values come out as pickle would give them; everything else is refused, and nothing runs."""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import os
import pickle
import resource
import subprocess
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlscale.convert.pickle_values import Blob, Grammar, Limits, Opaque, plain, read_pickle
from vlscale.errors import VlscaleError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=4)
    ),
    max_leaves=20,
)


def read(blob: bytes, grammar: Grammar | None = None, limits: Limits | None = None):
    return read_pickle("f.pkl", io.BytesIO(blob), len(blob), grammar or Grammar(), limits)


def refused(blob: bytes, grammar: Grammar | None = None, limits: Limits | None = None) -> str:
    """The one line with which a pickle is refused."""
    with pytest.raises(VlscaleError) as caught:
        read(blob, grammar, limits)
    message = str(caught.value)
    assert message.startswith("f.pkl: ")
    assert "\n" not in message
    assert len(message) < 600
    return message


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def payloads(marker) -> dict[str, object]:
    """Objects whose unpickling makes the file ``marker``."""
    touch = f"touch {marker}"
    return {
        "os.system": Call(os.system, touch),
        "builtins.eval": Call(eval, f"open({str(marker)!r}, 'w')"),
        "builtins.exec": Call(exec, f"open({str(marker)!r}, 'w')"),
        "subprocess.Popen": Call(subprocess.Popen, touch.split()),
        "subprocess.call": Call(subprocess.call, touch.split()),
        "builtins.getattr": Call(getattr, 1, "real"),
        "io.open": Call(io.open, str(marker), "w"),
        "dict value": {"a": [1, {"b": (2, Call(os.system, touch))}]},
        "dict key": {1: 2, "x": {"y": Call(eval, "1")}},
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@given(value=VALUES)
@settings(max_examples=60, deadline=None)
def test_plain_values_are_pickles_own(protocol, value):
    assert read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_known_constructors(protocol):
    shared = [1]
    value = {
        "ordered": collections.OrderedDict(a=1, b=[2]),
        "default": collections.defaultdict(list, x=[1]),
        "counter": collections.Counter("aab"),
        "set": {1, 2},
        "frozen": frozenset("ab"),
        "complex": 1 + 2j,
        "bytes": b"\xff\x00",
        "none": b"",
        "array": bytearray(b"\x80z"),
        "huge": -(1 << 300),
        "twice": (shared, shared),
    }
    found = read(pickle.dumps(value, protocol))
    assert found == value
    assert found["twice"][0] is found["twice"][1]


def test_attributes_of_an_ordered_dict_are_dropped():
    state = collections.OrderedDict(a=1)
    state._metadata = {"": {"version": 1}}  # as torch's modules do
    assert read(pickle.dumps(state, 2)) == {"a": 1}


@pytest.mark.parametrize("protocol", [2, 4])
def test_namespaces_stay_opaque(protocol):
    found = read(pickle.dumps({"args": argparse.Namespace(lr=0.1, names=["a"])}, protocol))
    assert type(found["args"]) is Opaque
    assert plain("f", found) == {"args": {"class": "argparse.Namespace", "state": {"lr": 0.1, "names": ["a"]}}}


def test_opaque_dicts_keep_their_items():
    blob = b"\x80\x02cmmf.utils.configuration\nConfigNode\n)R(U\x01aK\x01U\x01bK\x02u}U\x01cK\x03sb."
    assert plain("f", read(blob)) == {
        "class": "mmf.utils.configuration.ConfigNode",
        "state": {"c": 3},
        "items": {"a": 1, "b": 2},
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", payloads("m"))
def test_payloads_are_refused_and_do_not_run(tmp_path, protocol, name):
    marker = tmp_path / "marker"
    blob = pickle.dumps(payloads(marker)[name], protocol)
    assert "is a pickle that needs" in refused(blob)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        (b"\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93\x8c\x02ls\x85R.", "needs os.system"),
        (b"cposix\nsystem\nU\x02ls\x85R.", "needs posix.system"),
        (b"cnt\nsystem\n.", "needs nt.system"),
        (b"cbuiltins\neval\n.", "needs builtins.eval"),
        (b"c__builtin__\napply\n.", "needs __builtin__.apply"),
        (b"ctorch.storage\n_load_from_bytes\n.", "needs torch.storage._load_from_bytes"),
        (b"ctorch\nload\n.", "needs torch.load"),
        (b"ccopyreg\n_reconstructor\n.", "needs copyreg._reconstructor"),
        (b"coperator\nattrgetter\n.", "needs operator.attrgetter"),
        (b"cnumpy.testing._private.utils\nrunstring\nU\x01x}\x86R.", "calls numpy.testing._private.utils.runstring"),
        (b"ccollections\nnamedtuple\nU\x01x]\x86R.", "calls collections.namedtuple"),
        (b"cargparse\nFileType\nU\x01w\x85R.", "calls argparse.FileType"),
        (b"cbuiltins\nint\nU\x011\x85R.", "calls builtins.int"),
        (b"(U\x02lsios\nsystem\n.", "the step INST"),
        (b"(cargparse\nNamespace\no.", "the step OBJ"),
        (b"\x82\x01.", "EXT1"),
        (b"\x83\x01\x00.", "EXT2"),
        (b"\x84\x01\x00\x00\x00.", "EXT4"),
        (b"\x97.", "NEXT_BUFFER"),
        (b"N\x98.", "READONLY_BUFFER"),
        (b"Pabc\n.", "protocol 0 or 1"),
        (b"NQ.", "persistent"),
        (b"cargparse\nNamespace\n)\x81}U\x0c__setstate__cos\nsystem\nsb.", "needs os.system"),
        (b"K\x01}b.", "a state for something that has none"),
        (b"cargparse\nNamespace\n}b.", "a state for something that has none"),
        (b"}(U\x01aK\x01U\x01aK\x02u.", "the key a stands twice"),
        (b"}U\x01aK\x01sU\x01aK\x01s.", "the key a stands twice"),
        (b"}]K\x01s.", "neither text nor number"),
        (b"r\xff\xff\xff\xff.", "the memo"),
        (b"Nr\xff\xff\xff\xff.", "the memo has no place 4294967295"),
        (b"j\x05\x00\x00\x00.", "damaged"),
        (b"\x8e" + b"\xff" * 8 + b"x.", "a string of 18446744073709551615 bytes"),
        (b"\x8d\x00\x00\x00\x00\x00\x01\x00\x00.", "a string of"),
        (b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "a string of"),
        (b"T\xff\xff\xff\xff.", "less than no bytes"),
        (b"X\xff\xff\xff\x7fab.", "a string of 2147483647 bytes"),
        (b"\x8b\xff\xff\xff\x7f.", "an integer of 2147483647 bytes"),
        (b"NN.", "left on the stack"),
        (b"(N.", "left on the stack"),
        (b".", "left on the stack"),
        (b"N", "truncated"),
        (b"\xfe", "unknown step 0xfe"),
        (b"cos", "a line that does not end"),
        (b"\x8c\x02\xff\xfe.", "damaged"),
        (b"e.", "damaged"),
        (b"R.", "damaged"),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00utf-16\x86R.", "not latin-1"),
        (b"cbuiltins\nset\n]]a\x85R.", "neither text nor number"),
    ],
)
def test_what_is_not_plain_is_refused(steps, says):
    assert says in refused(b"\x80\x02" + steps)


def test_persistent_ids_go_to_the_caller():
    grammar = Grammar(persistent=lambda key: ["found", key], values={("a", "b"): 7}, calls={("a", "c"): lambda x: -x})
    assert read(b"\x80\x02U\x01kQca\nb\nca\nc\nK\x02\x85R\x87.", grammar) == (["found", "k"], 7, -2)
    assert "damaged" in refused(b"\x80\x02ca\nc\n)R.", grammar)


def test_long_strings_stay_in_the_file():
    value = {"b": b"\xff" * 5000, "t": "é" * 3000}
    for protocol in (3, 4):
        blob = pickle.dumps(value, protocol)
        found = read(blob)
        assert [found["b"].kind, found["t"].kind] == ["bytes", "text"]
        assert blob[found["b"].start :][: found["b"].length] == value["b"]
        assert blob[found["t"].start :][: found["t"].length].decode() == value["t"]
    blob = pickle.dumps(value, 2)
    found = read(blob)["b"]
    assert type(found) is Blob
    assert (found.kind, found.length) == ("latin1", 10000)
    assert plain("f", {"x": found}) == {"x": "<10000 bytes of latin1>"}


def test_texts_are_bounded():
    assert "more than 100 bytes of texts" in refused(pickle.dumps(["a" * 60, "b" * 60], 4), limits=Limits(text=100))


@pytest.mark.parametrize("nest", [b"]", b")", b"}"])
def test_deep_nesting_ends(nest):
    """Half a million containers within each other neither recurse nor pass."""
    close = {b"]": b"a", b")": b"\x85", b"}": b"s"}[nest]
    if nest == b")":
        blob = b"\x80\x02)" + close * 500_000 + b"."
    else:
        key = b"K\x01" if nest == b"}" else b""
        blob = b"\x80\x02" + (nest + key) * 500_000 + b"N" + close * 500_000 + b"."
    value = read(blob)
    with pytest.raises(VlscaleError, match="nested too deep"):
        plain("f", value)


def test_nested_tuples_are_no_keys():
    """Their hash recurses in C: of a million it would end the process."""
    blob = b"\x80\x02})" + b"\x85" * 500_000 + b"Ns."
    assert "neither text nor number" in refused(blob)


def test_references_that_double_are_refused():
    """2**60 leaves out of 60 steps."""
    blob = b"\x80\x02N" + b"".join(b"q\x00h\x00\x86" for _ in range(60)) + b"."
    start = time.perf_counter()
    with pytest.raises(VlscaleError, match="too often"):
        plain("f", read(blob))
    assert time.perf_counter() - start < 60  # without the bound: never
    cycle = read(b"\x80\x02]q\x00h\x00a.")
    with pytest.raises(VlscaleError, match="too deep"):
        plain("f", cycle)


def test_copies_of_a_long_list_count_as_steps():
    """A few bytes may not copy a long list again and again."""
    blob = b"\x80\x02cbuiltins\nlist\nq\x00](" + b"K\x01" * 100_000 + b"eq\x01\x85q\x020" + b"h\x00h\x02R0" * 1000
    assert "steps" in refused(blob + b"N.")


def test_steps_are_bounded():
    assert "takes more than 1000 steps" in refused(b"\x80\x02" + b"N0" * 1000 + b"N.", limits=Limits(steps=1000))


def test_declared_lengths_take_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for steps in (b"\x8e" + (1 << 33).to_bytes(8, "little"), b"B\xff\xff\xff\xff", b"X\xff\xff\xff\xff"):
        refused(b"\x80\x04" + steps + b"x" * 100)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


SEEDS = [
    pickle.dumps({"a": [1, 2.5, None, (True, b"x")], "o": collections.OrderedDict(k="v"), "s": {1}}, protocol)
    for protocol in (2, 4)
]


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_damage_is_a_value_or_one_line(data):
    blob = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(blob) - 1))
        cut = data.draw(st.integers(0, 3))
        blob[place : place + cut] = data.draw(st.binary(max_size=4))
        if not blob:
            break
    with contextlib.suppress(VlscaleError):  # anything else is a bug
        plain("f", read(bytes(blob)))


@given(blob=st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_noise_is_a_value_or_one_line(blob):
    with contextlib.suppress(VlscaleError):  # anything else is a bug
        plain("f", read(b"\x80\x04" + blob))
