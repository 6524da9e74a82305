"""Older servers: their answers are read as data, and whatever else a pickle can do is refused before it is done."""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import pickletools
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crd_fast.errors import ConfigError, RewardError
from crd_fast.rewards import registry
from crd_fast.rewards.base import PartialRewardError, score_batch
from crd_fast.rewards.remote import pickles
from crd_fast.rewards.remote.legacy import LegacyOptions, LegacyReward
from crd_fast.rewards.remote.pickles import UnsafePickleError, load_plain
from tests.rewards.remote.servers import Served, pictures

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(), inner)
        | st.tuples()
        | st.lists(inner).map(tuple)
    ),
    max_leaves=20,
)


@given(PLAIN, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_data_comes_back(value, protocol):
    try:
        loaded = load_plain(pickle.dumps(value, protocol))
    except UnsafePickleError as error:
        # before protocol 3 bytes are a call
        assert protocol < 3 and ("GLOBAL" in str(error) or "REDUCE" in str(error))
    else:
        assert loaded == value


class Command:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


class State:
    """Is rebuilt from a state, with BUILD."""

    def __init__(self) -> None:
        self.state = {"a": 1}


class Arguments:
    """Is rebuilt with NEWOBJ_EX."""

    def __new__(cls, **_: int) -> Arguments:
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, int]]:
        return (), {"a": 1}


def nested(value: object) -> object:
    return {"scores": [0.5, [({"deep": [value]},)]]}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrap", [lambda value: value, nested])
def test_a_command_is_not_run(protocol, wrap, tmp_path):
    proof = tmp_path / "proof"
    data = pickle.dumps(wrap(Command(f"touch {proof}")), protocol)
    with pytest.raises(UnsafePickleError, match="GLOBAL at byte"):
        load_plain(data)
    assert not proof.exists()
    pickle.loads(data)  # it is a real one
    assert proof.exists()


def touching(path: Path) -> dict[str, bytes]:
    """Commands written by hand, in every way that a pickle has to name something and call it."""
    command = f"touch {path}".encode()
    short = struct.pack("<B", len(command)) + command
    return {
        "GLOBAL": b"cposix\nsystem\n(S'" + command + b"'\ntR.",
        "INST": b"(S'" + command + b"'\niposix\nsystem\n.",
        "OBJ": b"(cposix\nsystem\nS'" + command + b"'\no.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c" + short + b"\x85R.",
        "names from the memo": b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x940h\x00h\x01\x93\x8c" + short + b"\x85R.",
        "after the answer": b"\x80\x04]0cposix\nsystem\n(S'" + command + b"'\ntR0].",
    }


@pytest.mark.parametrize("way", touching(Path()))
def test_every_way_to_name_a_function_is_refused(way, tmp_path):
    proof = tmp_path / "proof"
    data = touching(proof)[way]
    with pytest.raises(UnsafePickleError, match="only plain numbers, texts, lists and dictionaries are read"):
        load_plain(data)
    assert not proof.exists()
    pickle.loads(data)
    assert proof.exists()


@pytest.mark.parametrize(
    "value", [State(), Arguments(), {1, 2}, 1j, bytearray(b"x"), np.float32(0.5), np.zeros(3), torch]
)
def test_objects_are_refused(value):
    buffer = io.BytesIO()
    try:
        pickle.dump(value, buffer)
    except TypeError:  # a module
        buffer = io.BytesIO(b"cbuiltins\neval\n.")
    with pytest.raises(UnsafePickleError):
        load_plain(buffer.getvalue())


@pytest.mark.parametrize("code", [1, 0x1234, 0x12345678])
def test_registered_extensions_are_refused_even_when_they_were_loaded_before(code):
    copyreg.add_extension("posix", "system", code)
    try:
        data = pickle.dumps(os.system, 2)
        assert "EXT" in {opcode.name[:3] for opcode, _, _ in pickletools.genops(data)}
        assert pickle.loads(data) is os.system  # now in the cache, where find_class is not asked
        with pytest.raises(UnsafePickleError, match="EXT"):
            load_plain(data)
    finally:
        copyreg.remove_extension("posix", "system", code)


@pytest.mark.parametrize("data", [b"P12\n.", b"\x80\x02U\x0212Q.", b"\x80\x05\x97.", b"\x80\x05\x97\x98."])
def test_objects_from_outside_are_refused(data):
    with pytest.raises(UnsafePickleError):
        load_plain(data)


def test_the_second_lock_holds_alone(monkeypatch, tmp_path):
    everything = frozenset(opcode.name for opcode in pickletools.opcodes)
    monkeypatch.setattr(pickles, "_ALLOWED", everything)
    for data in touching(tmp_path / "proof").values():
        with pytest.raises(UnsafePickleError, match="the pickle names posix.system"):
            load_plain(data)
    with pytest.raises(UnsafePickleError, match="refers to an object outside"):
        load_plain(b"P12\n.")
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # a memo of 2^31 places
        b"Np99999999999\n.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x0fN.",  # a frame of 2^60 bytes
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0fab.",  # bytes
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x0fab.",  # text
        b"\x80\x04\x8b\xff\xff\xff\x7fab.",  # a number
        b"\x80\x04]",
        b"",
        b"\x80\x63N.",
        b"\x80\x04h\x07.",
        b"\x80\x04a.",
        b"I" + b"9" * 10**5 + b"\n.",
        b"no pickle at all",
    ],
)
def test_claims_and_damage_cost_no_memory(data):
    tracemalloc.start()
    try:
        with pytest.raises(UnsafePickleError):
            load_plain(data)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def reward(server: Served, kind: str, path: str | None = None, **options: object) -> LegacyReward:
    settings = LegacyOptions(f"{server.url}/{path or f'legacy_{kind}'}", kind, **{"batch": 4} | options)
    built = registry.build("legacy_remote", settings)
    assert isinstance(built, LegacyReward)
    return built


def score(legacy: LegacyReward, count: int = 6) -> dict[str, torch.Tensor]:
    metadata = [{"tag": "counting", "include": [{"class": "dog", "count": 1}], "prompt": "x"}] * count
    return score_batch(legacy, pictures(count), ["x" * i for i in range(count)], metadata)


def test_each_kind_of_server_is_asked_in_its_way(faulty):
    halves = torch.tensor([0.5, 1.5, 2.5, 3.5, 0.5, 1.5])  # six images are two requests
    assert torch.equal(score(reward(faulty, "deqa"))["legacy_remote"], halves)
    assert torch.equal(score(reward(faulty, "unifiedreward"))["legacy_remote"], torch.arange(6.0))
    geneval = reward(faulty, "geneval")
    assert geneval.requires == {"include", "tag", "prompt"}
    assert {k: v.tolist() for k, v in score(geneval).items()} == {
        "legacy_remote": halves.tolist(),
        "rewards": [1.0] * 6,
        "strict_rewards": [0.0] * 6,
    }
    assert score(reward(faulty, "geneval", score="rewards"))["legacy_remote"].tolist() == [1.0] * 6


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("legacy_short", "'outputs' has 3 entries for 4 items"),
        ("legacy_nan", r"outputs\[0\] is nan: expected a finite number"),
        ("legacy_huge", "the answer is larger than 81920 bytes"),
        ("legacy_code", "the pickle has GLOBAL at byte 0: .* numpy arrays too"),
        ("legacy_list", "the answer is a list: expected a dictionary"),
        ("legacy_500", r"status 500: Traceback .*KeyError: 'tag' \(attempt 1 of 1\)"),
        ("legacy_geneval", "attempt 1 of 1"),  # which was not sent what it needs
    ],
)
def test_a_wrong_answer_is_an_error_that_names_the_server(faulty, path, message):
    with pytest.raises(RewardError, match=rf"'legacy_remote' \('deqa' at .*items \d to \d of 6: .*{message}") as raised:
        score(reward(faulty, "deqa", path, attempts=1))
    assert not isinstance(raised.value, PartialRewardError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": "deqas"}, "server is 'deqas'; did you mean 'deqa'"),
        ({"server": "geneval", "score": "reward"}, "score is 'reward'; did you mean 'rewards'"),
        ({"server": "deqa", "score": "rewards"}, "score is 'rewards'; valid names: outputs"),
    ],
)
def test_wrong_options_are_refused(changes, message):
    with pytest.raises(ConfigError, match=f"rewards.legacy_remote.{message}"):
        LegacyOptions("http://127.0.0.1:1", **changes)
