"""The client against a server that does everything wrong: it stops in time, says which reward, and invents nothing."""

from __future__ import annotations

import random
import socket
import threading
import time

import pytest
import torch

from crd_fast.errors import RewardError
from crd_fast.rewards.base import PartialRewardError, score_batch
from crd_fast.rewards.remote.client import RemoteOptions, RemoteReward
from crd_fast.rewards.remote.transport import Call, StoppedError, TransportError, split_url
from crd_fast.rewards.scorer import RewardChoice, Scorer
from tests.rewards.remote.servers import Served, faulty_server, pictures


def reward(server: Served, fault: str, **options: object) -> RemoteReward:
    return RemoteReward(RemoteOptions(f"{server.url}/{fault}", "good", **{"batch": 4, "concurrency": 2} | options))


def attempts(server: Served, fault: str) -> int:
    return server.ask("GET", f"/{fault}/attempts")[1]


def score(remote: RemoteReward, count: int = 8) -> dict[str, torch.Tensor]:
    return score_batch(remote, pictures(count), [f"prompt {i}" for i in range(count)], [{"include": []}] * count)


def test_a_good_server_is_believed(faulty):
    remote = reward(faulty, "good")
    assert (remote.requires, remote.range, remote.differentiable) == (frozenset({"include"}), (0.0, 1.0), False)
    # 8 items are two requests, whose items the server numbers from 0
    torch.testing.assert_close(score(remote)["remote"], torch.tensor([0.25, 1.25, 2.25, 3.25] * 2), rtol=0, atol=0)


WRONG_ANSWERS = {
    "short": "scores.good has 3 entries for 4 items",
    "long": "scores.good has 5 entries for 4 items",
    "null": r"scores.good\[1\] is null without a reason",
    "nan": "NaN is no JSON number",
    "overflow": r"scores.good\[0\] is inf: expected a finite number",
    "float32_overflow": r"scores.good\[0\] is 1e\+39: expected a finite number",
    "boolean": r"scores.good\[0\] is True",
    "text": r"scores.good\[0\] is '0.5'",
    "other_reward": r"scores of \['better'\]: expected 'good'",
    "other_request": 'is for request "somebody else\'s"',
    "other_version": "version 2, expected 1: client and server need the same release",
    "bad_position": r"errors.good has \['4'\]: expected positions below 4",
    "no_json": "is no JSON",
    "deep": "nested too deeply",
    "list": r"the message is \[1\]: expected an object",
    "endless": "larger than 16777216 bytes",
    "error_400": "status 400: a bad request",
    "redirect": "status 307, a redirect to /good/v1/score: it is not followed",
}


@pytest.mark.parametrize("fault", WRONG_ANSWERS)
def test_a_wrong_answer_ends_it_at_the_first_attempt(faulty, fault):
    remote = reward(faulty, fault, concurrency=1)
    where = rf"reward 'remote' \('good' at {faulty.url}/{fault}\), items 0 to 3 of 8: .*"
    with pytest.raises(RewardError, match=where + WRONG_ANSWERS[fault]) as raised:
        score(remote)
    assert not isinstance(raised.value, PartialRewardError)
    assert attempts(faulty, fault) == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("error_500", r"status 500: out of luck \(attempt 3 of 3\)"),
        ("closed", r"RemoteDisconnected.*\(attempt 3 of 3\)"),
        ("truncated", r"IncompleteRead.*\(attempt 3 of 3\)"),
    ],
)
def test_a_passing_fault_that_stays_is_tried_three_times(faulty, fault, message):
    began = time.monotonic()
    with pytest.raises(RewardError, match=rf"'good' at {faulty.url}.*items 0 to 3 of 4: {message}"):
        score(reward(faulty, fault), 4)
    assert attempts(faulty, fault) == 3
    # pauses of 0.25 to 0.5 and 0.5 to 1 second
    assert 0.75 <= time.monotonic() - began < 5


def test_fewer_attempts_are_fewer(faulty):
    before = attempts(faulty, "error_500")
    with pytest.raises(RewardError, match=r"\(attempt 1 of 1\)"):
        score(reward(faulty, "error_500", attempts=1), 4)
    assert attempts(faulty, "error_500") == before + 1


@pytest.mark.parametrize("fault", ["once_408", "once_429", "once_500", "once_502", "closed_once"])
def test_a_fault_that_passes_is_survived(faulty, fault):
    assert score(reward(faulty, fault), 4)["remote"].tolist() == [0.25, 1.25, 2.25, 3.25]
    assert attempts(faulty, fault) == 2


def test_retry_after_is_waited_for(faulty):
    began = time.monotonic()
    assert score(reward(faulty, "busy_twice"), 4)["remote"].tolist() == [0.25, 1.25, 2.25, 3.25]
    assert attempts(faulty, "busy_twice") == 3
    assert 2 <= time.monotonic() - began < 6


def test_retry_after_may_be_a_date(faulty):
    began = time.monotonic()
    assert score(reward(faulty, "busy_until_a_date"), 1)["remote"].tolist() == [0.25]
    assert 1 <= time.monotonic() - began < 4  # a date has no fractions


def test_a_retry_after_past_the_deadline_ends_it_now(faulty):
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"status 503: busy .*the next in 3600.0 s is past the deadline of 20 s"):
        score(reward(faulty, "busy_for_an_hour", timeout_seconds=20), 4)
    assert attempts(faulty, "busy_for_an_hour") == 1
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("fault", ["silent", "drip", "drip_until_closed"])
def test_the_deadline_holds_however_the_server_stalls(faulty, fault):
    remote = reward(faulty, fault, timeout_seconds=1)
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"items 0 to 3 of 8: no answer within timeout_seconds=1"):
        score(remote)
    assert time.monotonic() - began < 2


def test_a_server_that_never_reads_does_not_hold_the_client():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = split_url(f"http://127.0.0.1:{listener.getsockname()[1]}", "url")
        body = bytes(2**26)  # more than the kernel takes in
        began = time.monotonic()
        with Call(url, 1.0, 3, {}) as call, pytest.raises(TransportError, match="no answer within timeout_seconds=1"):
            call.request("POST", "/v1/score", body, "application/json", 2**20)
        assert time.monotonic() - began < 2


def test_one_failure_ends_the_other_requests():
    with faulty_server() as server:
        remote = reward(server, "silent", batch=1, concurrency=4, timeout_seconds=30)
        killer = threading.Timer(0.5, server.process.kill)
        killer.start()
        began = time.monotonic()
        with pytest.raises(RewardError, match=r"items \d to \d of 8: .*(refused|reset|closed|disconnect)") as raised:
            score(remote)
        killer.join()
    assert "stopped" not in str(raised.value)
    assert time.monotonic() - began < 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("remote-reward")]


def test_closing_the_rewards_of_a_run_ends_what_is_under_way(faulty):
    """A server that hangs keeps neither a run that stops nor its process."""
    for fault in ("silent", "error_500"):
        scorer = Scorer({"remote": RewardChoice(RemoteOptions(f"{faulty.url}/{fault}", "good", timeout_seconds=60))})
        scorer.submit(pictures(8), ["p"] * 8, [{"include": []}] * 8)
        time.sleep(0.3)
        began = time.monotonic()
        scorer.close()
        assert time.monotonic() - began < 2
        names = [thread.name for thread in threading.enumerate()]
        assert not [name for name in names if name.startswith(("remote-reward", "reward-remote"))]
        with pytest.raises(StoppedError, match="the rewards were closed"):
            score_batch(scorer.rewards["remote"], pictures(1), ["p"], [{"include": []}])


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(RewardError, match=rf"'good' at http://127.0.0.1:{port}\): ConnectionRefused.*attempt 3 of 3"):
        RemoteReward(RemoteOptions(f"http://127.0.0.1:{port}", "good"))
    assert time.monotonic() - began < 3


def test_the_server_is_asked_at_once_what_it_has(faulty):
    with pytest.raises(RewardError, match="no reward 'goood'; did you mean 'good'"):
        RemoteReward(RemoteOptions(f"{faulty.url}/good", "goood"))
    with pytest.raises(RewardError, match="version 2, expected 1"):
        reward(faulty, "old_health")


def test_an_item_without_a_score_is_a_failure_with_its_reason(faulty):
    with pytest.raises(PartialRewardError) as raised:
        score(reward(faulty, "item"), 7)
    nan = float("nan")
    assert raised.value.failures == {2: "this one is no sign", 6: "this one is no sign"}
    expected = {"remote": [0.25, 1.25, nan, 3.25, 0.25, 1.25, nan], "extra": [7.0, 8.0, nan, 9.0, 7.0, 8.0, nan]}
    assert raised.value.scores.keys() == expected.keys()
    for key, values in expected.items():
        torch.testing.assert_close(raised.value.scores[key], torch.tensor(values), equal_nan=True, rtol=0, atol=0)


def test_metadata_that_is_no_json_is_named(faulty):
    with pytest.raises(RewardError, match=r"items 0 to 3 of 4: the metadata of item 2, prompt 'p2', is no JSON"):
        score_batch(reward(faulty, "good"), pictures(4), ["p0", "p1", "p2", "p3"], [{}, {}, {"include": {1, 2}}, {}])


def test_proxies_of_the_environment_are_not_used(faulty, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert len(score(reward(faulty, "good"))["remote"]) == 8


def test_pauses_leave_the_seeded_generator_alone(faulty):
    random.seed(5)
    state = random.getstate()
    with pytest.raises(RewardError):
        score(reward(faulty, "error_500", attempts=2), 1)
    assert random.getstate() == state
