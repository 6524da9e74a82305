"""Fifty clients at once, and what the server's own process may need for them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import torch

from crd_fast.rewards import registry
from crd_fast.rewards.base import score_batch
from crd_fast.rewards.jpeg import JpegSettings
from crd_fast.rewards.remote.client import RemoteOptions, RemoteReward
from tests.rewards.remote.servers import NEEDS_PROC, Served, pictures, question

JPEG = "jpeg_compressibility"
CLIENTS = 50


def test_fifty_clients_are_all_served_with_their_own_scores(served):
    local = registry.build(JPEG, JpegSettings())

    def client(seed: int) -> bool:
        options = RemoteOptions(served.url, JPEG, token_env="TEST_REWARD_TOKEN", batch=2, concurrency=2)
        reward = RemoteReward(options)
        same = []
        for repetition in range(3):
            images = pictures(4, seed=CLIENTS * repetition + seed)
            arguments = images, [""] * 4, [{}] * 4
            same.append(torch.equal(score_batch(reward, *arguments)["remote"], score_batch(local, *arguments)[JPEG]))
        return all(same)

    with ThreadPoolExecutor(CLIENTS) as pool:
        assert all(pool.map(client, range(CLIENTS)))


@NEEDS_PROC
def test_the_memory_of_fifty_large_requests_is_bounded(served):
    limit = served.ask("GET", "/health")[1]["limits"]["body_bytes"]
    tree = question(pictures(1))
    body = json.dumps(tree).encode().ljust(limit)  # large, and yet soon scored
    alone = served.score(tree)[1]["scores"]
    before = served.peak_bytes()

    def client(_: int) -> dict[str, list[float]]:
        return ask(served, body)

    with ThreadPoolExecutor(CLIENTS) as pool:
        assert list(pool.map(client, range(CLIENTS))) == [alone] * CLIENTS
    # Bodies of (2 workers + 2) x the cap are held, each once more on its way to the worker and while it grows; fifty
    # of them would be three times as much.
    bound = 3 * 4 * limit
    assert CLIENTS * len(body) > 3 * bound
    assert served.peak_bytes() - before < bound


def ask(server: Served, body: bytes) -> dict[str, list[float]]:
    status, answer, _ = server.ask("POST", "/v1/score", body)
    assert status == 200, answer
    return answer["scores"]
