"""Scoring beside other work: order, failures, workers that die, hang or break."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from crd_fast.errors import RewardError
from crd_fast.rewards import registry
from crd_fast.rewards.base import Metadata, PartialRewardError, score_batch
from crd_fast.rewards.jpeg import JpegSettings
from crd_fast.rewards.ocr import OcrReward, OcrSettings
from crd_fast.rewards.scorer import RewardChoice, Scored, Scorer, _union
from crd_fast.rewards.workers import score_in_process
from crd_fast.shapes import world


class Brightness:
    """Mean level; cannot score what the metadata calls broken, and raises what the metadata says."""

    name = "jpeg_compressibility"
    requires: frozenset[str] = frozenset()
    differentiable = False
    range = None

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, Tensor]:
        for entry in metadata:
            if "raise" in entry:
                raise entry["raise"]
            time.sleep(entry.get("sleep", 0.0))
        scores = images.mean((1, 2, 3))
        failed = {i: "broken" for i, entry in enumerate(metadata) if entry.get("broken")}
        if failed:
            known = scores.index_fill(0, torch.tensor(list(failed)), torch.nan)
            raise PartialRewardError(self.name, failed, {self.name: known})
        return {self.name: scores, "red": images[:, 0].mean((1, 2))}


@pytest.fixture
def brightness(monkeypatch):
    """A scorer of `Brightness`, in the place of the reward that needs no model; "here" or in a thread."""

    def make(
        on_error: str = "raise", kind: str = "here", workers: int = 1, timeout: float = 600.0, tried: bool = True
    ) -> Scorer:
        entry = (JpegSettings, lambda options: Brightness())
        monkeypatch.setitem(registry._REWARDS, "jpeg_compressibility", entry)
        monkeypatch.setattr(registry, "placement", lambda name, options: registry.Placement(kind, workers, tried))
        return Scorer({"jpeg_compressibility": RewardChoice(JpegSettings(), on_error)}, timeout)

    return make


def levels(*values: float) -> Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 4, 4).clone()


@pytest.mark.parametrize(("kind", "workers"), [("here", 1), ("thread", 1), ("thread", 3)])
def test_scores_come_in_the_order_of_submission_whoever_was_faster(brightness, kind, workers) -> None:
    with brightness(kind=kind, workers=workers) as scorer:
        for start in (1, 4, 7):
            waits = [{"sleep": 0.02 * (8 - start)}] * 3
            scorer.submit(levels(*(0.1 * (start + i) for i in range(3))), ["p"] * 3, waits)
        scored = scorer.collect()
    torch.testing.assert_close(scored.scores["jpeg_compressibility"], torch.arange(1, 10) / 10)
    torch.testing.assert_close(scored.diagnostics["jpeg_compressibility_red"], torch.arange(1, 10) / 10)
    assert scored.failures == {"jpeg_compressibility": {}}


def test_a_collected_scorer_begins_anew(brightness) -> None:
    with brightness() as scorer:
        scorer.submit(levels(0.5), ["p"], [{}])
        scorer.collect()
        scorer.submit(levels(0.25, 0.75), ["p"] * 2, [{}] * 2)
        assert scorer.collect().scores["jpeg_compressibility"].tolist() == [0.25, 0.75]


@pytest.mark.parametrize("kind", ["here", "thread"])
def test_a_failed_item_ends_the_run_with_the_rewards_name_and_the_item(brightness, kind) -> None:
    message = "'jpeg_compressibility' failed at item 3, prompt 'q1': broken"
    with brightness(kind=kind) as scorer, pytest.raises(RewardError, match=message):
        scorer.submit(levels(0.1, 0.2), ["p0", "p1"], [{}, {}])
        scorer.submit(levels(0.1, 0.2), ["q0", "q1"], [{}, {"broken": True}])
        scorer.collect()


@pytest.mark.parametrize("kind", ["here", "thread"])
def test_a_masked_item_is_nan_and_said_why(brightness, kind) -> None:
    with brightness("mask", kind) as scorer:
        scorer.submit(levels(0.1, 0.2), ["p0", "p1"], [{}, {}])
        scorer.submit(levels(0.3, 0.4), ["q0", "q1"], [{}, {"broken": True}])
        scored = scorer.collect()
    scores = scored.scores["jpeg_compressibility"]
    torch.testing.assert_close(scores[:3], torch.tensor([0.1, 0.2, 0.3]))
    assert scores[3].isnan() and scored.failures == {"jpeg_compressibility": {3: "broken"}}
    # of the batch with the failure there is no diagnostic, which is not zero
    assert scored.diagnostics["jpeg_compressibility_red"].isnan().tolist() == [False, False, True, True]


def test_a_batch_that_failed_as_a_whole_is_masked_as_a_whole(brightness) -> None:
    with brightness("mask", "thread") as scorer:
        scorer.submit(levels(0.1, 0.2), ["p"] * 2, [{}, {"raise": RewardError("the server is gone")}])
        scorer.submit(levels(0.3), ["p"], [{}])
        scored = scorer.collect()
    assert scored.scores["jpeg_compressibility"].isnan().tolist() == [True, True, False]
    assert scored.failures["jpeg_compressibility"] == {0: "the server is gone", 1: "the server is gone"}


@pytest.mark.parametrize("kind", ["here", "thread"])
def test_a_programming_error_is_never_masked(brightness, kind) -> None:
    message = "broke at items 0 to 0, prompt 'p': KeyError"
    with brightness("mask", kind) as scorer, pytest.raises(RewardError, match=message):
        scorer.submit(levels(0.1), ["p"], [{"raise": KeyError("x")}])
        scorer.collect()


@pytest.mark.parametrize(("kind", "tried"), [("here", True), ("thread", True), ("thread", False)])
def test_trying_out_finds_what_a_mask_would_hide(brightness, kind, tried) -> None:
    with brightness("mask", kind, tried=tried) as scorer:
        scorer.try_out(levels(0.5), "p", {})
        broken = {"raise": RewardError("no model in /models/clip")}
        if tried:
            with pytest.raises(RewardError, match="failed at item 0, prompt 'p': no model in /models/clip"):
                scorer.try_out(levels(0.5), "p", broken)
        else:  # a server was asked already
            scorer.try_out(levels(0.5), "p", broken)
        scorer.submit(levels(0.25), ["p"], [{}])
        assert scorer.collect().scores["jpeg_compressibility"].tolist() == [0.25]


@pytest.mark.parametrize("on_error", ["mask", "raise"])
@pytest.mark.parametrize("kind", ["here", "thread"])
def test_a_reward_without_a_number_for_the_made_up_image_is_usable(brightness, kind, on_error) -> None:
    with brightness(on_error, kind) as scorer:
        scorer.try_out(levels(0.5), "p", {"broken": True})
        scorer.submit(levels(0.25), ["p"], [{}])
        assert scorer.collect().scores["jpeg_compressibility"].tolist() == [0.25]


def test_a_broken_image_is_never_masked(brightness) -> None:
    with brightness("mask") as scorer, pytest.raises(RewardError, match="image 1 of 2 is NaN"):
        scorer.submit(levels(0.1, torch.nan), ["p"] * 2, [{}] * 2)


def test_a_reward_that_hangs_is_given_up(brightness) -> None:
    with brightness(kind="thread", timeout=0.2) as scorer:
        scorer.submit(levels(0.1), ["slow"], [{"sleep": 2.0}])
        with pytest.raises(RewardError, match="has not scored items 0 to 0 after 0 seconds, prompt 'slow'"):
            scorer.collect()


def test_after_an_error_nothing_of_it_is_left(brightness) -> None:
    with brightness() as scorer:
        with pytest.raises(RewardError):
            scorer.submit(levels(0.1), ["p"], [{"broken": True}])
        with pytest.raises(RewardError):
            scorer.collect()
        scorer.submit(levels(0.5), ["p"], [{}])
        assert scorer.collect().scores["jpeg_compressibility"].tolist() == [0.5]


def test_unequal_numbers_are_refused(brightness) -> None:
    with brightness() as scorer, pytest.raises(RewardError, match="1 images, 2 prompts and 1 metadata"):
        scorer.submit(levels(0.1), ["p", "q"], [{}])


def test_time_beside_other_work_counts_as_hidden(brightness) -> None:
    with brightness(kind="thread") as scorer:
        scorer.submit(levels(0.1), ["p"], [{"sleep": 0.3}])
        time.sleep(0.6)
        hidden = scorer.collect()
        scorer.submit(levels(0.1), ["p"], [{"sleep": 0.3}])
        shown = scorer.collect()
    assert hidden.hidden_share > 0.9
    assert shown.hidden_share < 0.2
    assert 0.29 < hidden.busy_seconds < 0.6


def test_intervals_that_overlap_count_once() -> None:
    assert _union([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0), (5.2, 5.4)]) == pytest.approx(4.0)
    assert Scored({}, {}, {}, 0.0, 1.0).hidden_share == 0.0


@pytest.fixture(scope="module")
def signs() -> tuple[Tensor, list[str]]:
    asked, rng = world.prompts("train", ["text"])[:5], np.random.default_rng(0)
    images = world.render([world.sample_scene(entry, rng) for entry in asked], rng)
    return torch.from_numpy(images), [entry["prompt"] for entry in asked]


def test_worker_processes_read_what_this_process_reads(signs) -> None:
    images, prompts = signs
    settings = OcrSettings(workers=2)
    with Scorer({"ocr": RewardChoice(settings)}) as scorer:
        scorer.submit(images[:3], prompts[:3], [{}] * 3)
        scorer.submit(images[3:], prompts[3:], [{}] * 2)
        scored = scorer.collect()
    here = score_batch(OcrReward(), images, prompts, [{}] * 5)
    assert torch.equal(scored.scores["ocr"], here["ocr"])
    assert torch.equal(scored.diagnostics["ocr_exact"], here["ocr_exact"])
    assert here["ocr"].mean() > 0.8  # they are read at all


@pytest.mark.parametrize("wait", [0.0, 0.5])  # the pool may have noticed or not
def test_a_worker_that_is_killed_ends_the_run_with_a_message(signs, wait) -> None:
    images, prompts = signs
    with Scorer({"ocr": RewardChoice(OcrSettings(workers=1), "mask")}) as scorer:
        scorer.submit(images, prompts, [{}] * 5)
        scorer.collect()
        (worker,) = scorer._executors["ocr"]._processes
        os.kill(worker, signal.SIGKILL)
        time.sleep(wait)
        with pytest.raises(RewardError, match="'ocr': a worker process ended"):
            scorer.submit(images, prompts, [{}] * 5)
            scorer.collect()


HANGS = """
import os, signal, sys
import torch
from crd_fast.errors import RewardError
from crd_fast.rewards.ocr import OcrSettings
from crd_fast.rewards.scorer import RewardChoice, Scorer

if __name__ == "__main__":
    images, prompts = torch.full((1, 3, 64, 64), 0.5), ['a sign "42"']
    with Scorer({"ocr": RewardChoice(OcrSettings(workers=1))}, timeout_seconds=30) as scorer:
        scorer.submit(images, prompts, [{}])
        scorer.collect()
        (worker,) = scorer._executors["ocr"]._processes
        os.kill(worker, signal.SIGSTOP)
        scorer._timeout = 0.5
        scorer.submit(images, prompts, [{}])
        try:
            scorer.collect()
        except RewardError as error:
            print(worker, error, flush=True)
"""


def test_a_worker_that_hangs_keeps_nobody_from_leaving(tmp_path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    worker, _, message = done.stdout.partition(" ")
    assert done.returncode == 0 and "has not scored items 0 to 0" in message, done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(worker), 0)


def test_a_workers_function_is_the_workers_alone(signs) -> None:
    with pytest.raises(RuntimeError, match="workers of process_pool alone"):
        score_in_process(signs[0].numpy(), signs[1], [{}] * 5)
