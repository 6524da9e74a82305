"""Rewards of the user's own: what they may be, where they run, and what is said when they are wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crd_fast import cli
from crd_fast.data import PromptSet
from crd_fast.errors import ConfigError, DataError, RewardError
from crd_fast.evaluation.pictures import to_pixels, write_png
from crd_fast.evaluation.scoring import version_of
from crd_fast.rewards import Reward, registry, score_batch
from crd_fast.rewards.base import BrokenRewardError, ChecksPrompts, DifferentiableReward, PartialRewardError
from crd_fast.rewards.custom import CustomOptions, CustomReward
from crd_fast.rewards.remote.client import RemoteOptions, RemoteReward
from crd_fast.rewards.scorer import RewardChoice, Scorer
from tests.rewards.remote.servers import reward_server

ROOT = Path(__file__).parents[2]
COLORFUL = f"{ROOT}/examples/rewards/colorfulness.py:colorfulness"
SOURCE = """
import os
import torch
from dataclasses import dataclass
from crd_fast.errors import DataError

def level(images, prompts, metadata, times=1.0):
    return images.mean((1, 2, 3)) * times

def listed(images, prompts, metadata):
    return [image.mean().item() for image in images]

def array(images, prompts, metadata):
    return images.mean((1, 2, 3)).double().numpy()

def where(images, prompts, metadata):
    return {"score": images.mean((1, 2, 3)), "process": [os.getpid()] * len(images)}

def unscored(images, prompts, metadata):
    return [float("nan") if entry.get("bad") else 1.0 for entry in metadata]

def breaks(images, prompts, metadata):
    return [entry["stile"] for entry in metadata]

def nameless(images, prompts, metadata):
    return {"level": images.mean((1, 2, 3))}

def doubled(images, prompts, metadata):
    return {"score": images.mean((1, 2, 3)), "custom": images.amax((1, 2, 3))}

def square(images, prompts, metadata):
    return images.mean((2, 3))

def scalar_part(images, prompts, metadata):
    return {"score": images.mean((1, 2, 3)), "part": 3.0}

def some(images, prompts, metadata):
    return [0.5, None, 0.5]

def lazily(images, prompts, metadata):
    yield from images.mean((1, 2, 3))

async def later(images, prompts, metadata):
    return images.mean((1, 2, 3))

def leaves(images, prompts, metadata):
    raise SystemExit(0)

def spoils(images, prompts, metadata):
    scores = images.mean((1, 2, 3))
    images.zero_()
    for entry in metadata:
        entry["inner"].clear()
    prompts.clear()
    return scores

def flat(images, prompts, metadata):
    with torch.no_grad():
        return images.mean((1, 2, 3))
flat.differentiable = True

def text_keys(images, prompts, metadata): ...
text_keys.requires = "style"

def wrong_range(images, prompts, metadata): ...
wrong_range.range = "0-1"

def no_end(images, prompts, metadata): ...
no_end.range = (0, float("inf"))

def turned(images, prompts, metadata): ...
turned.range = (1, 0)

class Moody:
    @property
    def requires(self):
        raise RuntimeError("not today")
    def __call__(self, images, prompts, metadata): ...

class Named:
    name = "named"
    def __call__(self, images, prompts, metadata):
        return {"score": images.mean((1, 2, 3))}

@dataclass
class Styled:
    wanted: str = "blue"
    name = "styled"
    requires = {"style"}
    range = (0, 1)
    differentiable = True

    def __call__(self, images, prompts, metadata):
        right = torch.tensor([entry["style"] == self.wanted for entry in metadata])
        return {"styled": right.half(), "blue": images[:, 2].mean((1, 2))}

    def differentiable_scores(self, images, prompts, metadata):
        return images[:, 2].mean((1, 2))

    def check_prompt(self, prompt, metadata):
        if metadata["style"] == "plaid":
            raise DataError("plaid is not known")

VALUE = 3
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(SOURCE)
    return str(path)


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


def scored(source: str, **options: object) -> dict[str, Tensor]:
    reward = registry.build("custom:mine", CustomOptions(source, **options))
    return score_batch(reward, images(), ["p"] * 3, [{}] * 3)


@pytest.mark.parametrize("name", ["level", "listed", "array"])
def test_a_function_returns_numbers_in_any_form(source: str, name: str) -> None:
    found = scored(f"{source}:{name}")
    assert set(found) == {"custom:mine"} and found["custom:mine"].dtype == torch.float32
    torch.testing.assert_close(found["custom:mine"], images().mean((1, 2, 3)))


def test_arguments_reach_a_function_at_every_call(source: str) -> None:
    found = scored(f"{source}:level", arguments={"times": -2.0})
    torch.testing.assert_close(found["custom:mine"], -2 * images().mean((1, 2, 3)))


def test_a_class_is_made_once_and_keeps_its_attributes(source: str) -> None:
    reward = registry.build("custom", CustomOptions(f"{source}:Styled", {"wanted": "red"}))
    assert isinstance(reward, CustomReward) and reward.name == "custom"
    assert reward.requires == {"style"} and reward.range == (0, 1) and reward.differentiable
    entries = [{"style": "red"}, {"style": "blue"}, {"style": "red"}]
    found = score_batch(reward, images(), ["p"] * 3, entries)
    assert found["custom"].tolist() == [1, 0, 1] and found["custom"].dtype == torch.float32
    torch.testing.assert_close(found["blue"], images()[:, 2].mean((1, 2)))
    with pytest.raises(DataError, match="made, prompt 1: prompt 'b' has metadata keys .*requires 'style'"):
        PromptSet(("a", "b"), ({"style": "red"}, {}), "made").require_for(reward)
    with pytest.raises(DataError, match="made, prompt 1: reward 'custom': plaid is not known"):
        PromptSet(("a", "b"), ({"style": "red"}, {"style": "plaid"}), "made").require_for(reward)


def test_a_module_is_a_source_too() -> None:
    reward = registry.build("custom:colors", CustomOptions("examples.rewards.colorfulness:colorfulness"))
    assert isinstance(reward, Reward) and isinstance(reward, ChecksPrompts)
    alike = registry.build("custom:colors", CustomOptions(COLORFUL))
    batch = images(), ["p"] * 3, [{}] * 3
    assert torch.equal(reward(*batch)["custom:colors"], alike(*batch)["custom:colors"])


def test_the_example_is_the_published_measure() -> None:
    reward = registry.build("custom", CustomOptions(COLORFUL, {"scale": 255.0}))
    picture = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(0)).double().numpy()
    rg, yb = picture[..., 0] - picture[..., 1], (picture[..., 0] + picture[..., 1]) / 2 - picture[..., 2]
    expected = (rg.std() ** 2 + yb.std() ** 2) ** 0.5 + 0.3 * (rg.mean() ** 2 + yb.mean() ** 2) ** 0.5
    image = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    assert reward(image, ["p"], [{}])["custom"].item() == pytest.approx(expected, rel=1e-5)
    assert reward(torch.full((1, 3, 8, 8), 0.5), ["p"], [{}])["custom"].item() < 1e-3


def test_gradients_go_through_the_call_or_a_path_of_its_own(source: str) -> None:
    for name in (COLORFUL, f"{source}:Styled"):
        reward = registry.build("custom", CustomOptions(name))
        assert reward.differentiable and isinstance(reward, DifferentiableReward)
        seen = images().requires_grad_()
        scores = reward.differentiable_scores(seen, ["p"] * 3, [{}] * 3)
        (slope,) = torch.autograd.grad(scores.sum(), seen)
        assert scores.shape == (3,) and slope.isfinite().all() and (slope[:, 2] != 0).all()
    assert not registry.build("custom", CustomOptions(f"{source}:level")).differentiable


@pytest.mark.parametrize(("runs", "workers"), [("here", 1), ("thread", 2), ("process", 2)])
def test_it_runs_where_it_says_and_in_order(source: str, runs: str, workers: int) -> None:
    choice = RewardChoice(CustomOptions(f"{source}:where", runs=runs, workers=workers))
    pictures = images(5)
    with Scorer({"custom:w": choice}) as scorer:
        scorer.try_out(pictures[:1], "p", {})
        scorer.submit(pictures, ["p"] * 5, [{}] * 5)
        found = scorer.collect()
    torch.testing.assert_close(found.scores["custom:w"], pictures.mean((1, 2, 3)))
    here = found.diagnostics["custom:w_process"] == torch.tensor(os.getpid(), dtype=torch.float32)
    assert here.all() if runs != "process" else not here.any()


@pytest.mark.parametrize("runs", ["here", "thread", "process"])
def test_a_failure_of_the_code_is_never_masked_and_names_its_line(source: str, runs: str) -> None:
    line = SOURCE.splitlines().index('    return [entry["stile"] for entry in metadata]') + 1
    choice = RewardChoice(CustomOptions(f"{source}:breaks", runs=runs), on_error="mask")
    with Scorer({"custom": choice}) as scorer, pytest.raises(RewardError) as raised:
        scorer.submit(images(), ["p"] * 3, [{}] * 3)
        scorer.collect()
    assert f"mine.py:{line} in " in str(raised.value) and "KeyError: 'stile'" in str(raised.value)
    assert "reward 'custom' broke at items 0 to 2, prompt 'p'" in str(raised.value)


@pytest.mark.parametrize("runs", ["here", "thread", "process"])
def test_code_that_exits_ends_nothing_silently(source: str, runs: str) -> None:
    choice = RewardChoice(CustomOptions(f"{source}:leaves", runs=runs))
    with Scorer({"custom": choice}) as scorer, pytest.raises(RewardError, match="mine.py:.* in leaves: SystemExit: 0"):
        scorer.submit(images(), ["p"] * 3, [{}] * 3)
        scorer.collect()


@pytest.mark.parametrize("runs", ["here", "thread"])
def test_what_it_does_to_its_inputs_stays_its_own(source: str, runs: str) -> None:
    choices = {
        f"custom:{name}": RewardChoice(CustomOptions(f"{source}:{name}", runs=runs)) for name in ("spoils", "level")
    }
    pictures, prompts, entries = images(), ["p"] * 3, [{"inner": {"a": 1}}] * 3
    with Scorer(choices) as scorer:
        scorer.submit(pictures, prompts, entries)
        found = scorer.collect()
    torch.testing.assert_close(found.scores["custom:level"], images().mean((1, 2, 3)))
    assert torch.equal(pictures, images()) and prompts == ["p"] * 3 and entries == [{"inner": {"a": 1}}] * 3


def test_a_thread_that_hangs_does_not_keep_the_process(tmp_path: Path) -> None:
    path = tmp_path / "hangs.py"
    path.write_text("import time\n\ndef hangs(images, prompts, metadata):\n    time.sleep(300)\n")
    script = (
        "import torch\n"
        "from crd_fast.rewards.custom import CustomOptions\n"
        "from crd_fast.rewards.scorer import RewardChoice, Scorer\n"
        f"choice = RewardChoice(CustomOptions({f'{path}:hangs'!r}, runs='thread'))\n"
        "with Scorer({'custom': choice}, timeout_seconds=0.5) as scorer:\n"
        "    scorer.submit(torch.rand(2, 3, 8, 8), ['p'] * 2, [{}] * 2)\n"
        "    scorer.collect()\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "has not scored items 0 to 1 after" in ended.stderr


def test_a_thread_in_compiled_code_does_not_make_the_end_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "busy.py"
    path.write_text("def busy(images, prompts, metadata):\n    while True:\n        images = images.roll(1, 0) + 0\n")
    script = (
        "import time, torch\n"
        "from crd_fast import cli\n"
        "from crd_fast.rewards.custom import CustomOptions\n"
        "from crd_fast.rewards.scorer import RewardChoice, Scorer\n"
        "def command():\n"
        f"    with Scorer({{'custom': RewardChoice(CustomOptions({f'{path}:busy'!r}, runs='thread'))}}) as scorer:\n"
        "        scorer.submit(torch.rand(8, 3, 64, 64), ['p'] * 8, [{}] * 8)\n"
        "        time.sleep(0.5)\n"
        "    print('saved')\n"
        "    return 3\n"
        "cli.main = command\n"
        "cli.console()\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "saved\n", "")


def test_an_item_that_it_cannot_score_is_masked(source: str) -> None:
    choice = RewardChoice(CustomOptions(f"{source}:unscored"), on_error="mask")
    with Scorer({"custom": choice}) as scorer:
        scorer.submit(images(), ["p"] * 3, [{}, {"bad": True}, {}])
        found = scorer.collect()
    assert found.scores["custom"].isnan().tolist() == [False, True, False] and set(found.failures["custom"]) == {1}
    with pytest.raises(PartialRewardError):
        reward = registry.build("custom", CustomOptions(f"{source}:unscored"))
        score_batch(reward, images(1), ["p"], [{"bad": True}])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("levl", "mine.py has no 'levl'; did you mean 'level'"),
        ("VALUE", "mine.py:VALUE is of type int, which cannot be called"),
        ("text_keys", r"requires is 'style': expected names of metadata keys, such as \['style'\]"),
        ("wrong_range", r"range is '0-1': expected \(lowest, highest\)"),
        ("no_end", r"range is \(0, inf\): expected two finite numbers, the lowest first"),
        ("turned", r"range is \(1, 0\): expected two finite numbers"),
    ],
)
def test_what_is_not_there_is_named(source: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.build("custom", CustomOptions(f"{source}:{name}"))


def test_a_source_that_cannot_be_imported_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is in nowhere\.py, which is not a file"):
        registry.build("custom", CustomOptions("nowhere.py:level"))
    with pytest.raises(ConfigError, match="no_such_package.x:level cannot be imported: .*ModuleNotFoundError"):
        registry.build("custom", CustomOptions("no_such_package.x:level"))
    broken = tmp_path / "broken.py"
    broken.write_text("import torch\nvalue = torch.no_such_thing\n")
    with pytest.raises(ConfigError, match=r"cannot be imported: .*broken\.py:2 in <module>: AttributeError"):
        registry.build("custom", CustomOptions(f"{broken}:level"))
    broken.write_text("def level(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    assert registry.build("custom", CustomOptions(f"{broken}:level"))(images(), ["p"] * 3, [{}] * 3)["custom"].shape


def test_wrong_arguments_and_results_are_named(source: str) -> None:
    with pytest.raises(BrokenRewardError, match="unexpected keyword argument 'want'"):
        registry.build("custom", CustomOptions(f"{source}:Styled", {"want": "red"}))
    with pytest.raises(BrokenRewardError, match="'custom' failed in .*mine.py:.* in requires: RuntimeError: not today"):
        registry.build("custom", CustomOptions(f"{source}:Moody"))
    reward = registry.build("custom", CustomOptions(f"{source}:listed"))
    with pytest.raises(BrokenRewardError, match=r"its differentiable scores are a list: expected a tensor \(3,\)"):
        reward.differentiable_scores(images(), ["p"] * 3, [{}] * 3)
    reward = registry.build("custom", CustomOptions(f"{source}:flat"))
    assert reward.differentiable_scores(images(), ["p"] * 3, [{}] * 3).shape == (3,)
    with pytest.raises(BrokenRewardError, match="have no gradient in the images"):
        reward.differentiable_scores(images().requires_grad_(), ["p"] * 3, [{}] * 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nameless", r"it returned \['level'\]: expected its score under 'score'"),
        ("doubled", "it returned a diagnostic under its own name, 'custom'"),
        ("square", r"it returned shape \(3, 3\) for 3 images: expected \(3,\)"),
        ("scalar_part", r"its diagnostic 'part' returned shape \(\) for 3 images"),
        ("some", r"it returned \[0.5, None, 0.5\]: expected 3 numbers, NaN for an image that cannot be scored"),
        ("lazily", "it returned a generator: expected 3 numbers"),
        ("later", "it returned a coroutine: expected 3 numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine")
def test_results_that_are_no_scores_are_named(source: str, name: str, message: str) -> None:
    reward = registry.build("custom", CustomOptions(f"{source}:{name}"))
    with pytest.raises(BrokenRewardError, match=message):
        reward(images(), ["p"] * 3, [{}] * 3)


def test_a_name_of_its_own_may_be_the_key_of_the_score(source: str) -> None:
    reward = registry.build("custom", CustomOptions(f"{source}:Named"))
    torch.testing.assert_close(reward(images(), ["p"] * 3, [{}] * 3), {"custom": images().mean((1, 2, 3))})


def test_a_package_in_the_working_directory_is_found_by_the_console_script(tmp_path: Path) -> None:
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("")
    (tmp_path / "own_package" / "rewards.py").write_text(SOURCE)
    code = (
        "import sys\n"
        "sys.path[:] = [entry for entry in sys.path if entry != '']\n"
        "from crd_fast.rewards.custom import CustomOptions, CustomReward\n"
        "print(CustomReward(CustomOptions('own_package.rewards:level')).name)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.stdout == "custom\n", ended.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "level"}, "source of a custom reward is 'level': expected FILE.py:NAME"),
        ({"source": "mine.py:a b"}, "expected FILE.py:NAME"),
        ({"source": "mine.py::level"}, "expected FILE.py:NAME"),
        ({"source": "m:f", "runs": "proces"}, "did you mean 'process'"),
        ({"source": "m:f", "workers": 0}, "workers of a custom reward is 0: expected at least 1"),
        ({"source": "m:f", "workers": 2}, "is 2: expected 1, or runs set to thread or process"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CustomOptions(**options)


def test_scores_of_other_code_have_another_version(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    options = CustomOptions(f"{path}:level")
    before = version_of("custom", options)
    assert before == version_of("custom", options) and before["options"]["source"] == options.source
    path.write_text(SOURCE + "\n# changed\n")
    assert version_of("custom", options) != before


def test_a_server_serves_it(tmp_path: Path, source: str) -> None:
    options = tmp_path / "options.yaml"
    options.write_text(json.dumps({"custom:mine": {"source": f"{source}:level"}}))
    with reward_server("custom:mine", "--options", str(options), token=None) as server:
        client = RemoteReward(RemoteOptions(server.url, "custom:mine"))
        pictures = (images() * 255).round() / 255
        found = score_batch(client, pictures, ["p"] * 3, [{}] * 3)["remote"]
    torch.testing.assert_close(found, pictures.mean((1, 2, 3)))


def test_score_knows_it(tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    pictures = images(2)
    for index, pixels in enumerate(to_pixels(pictures)):
        write_png(folder / f"{index}.png", pixels)
    rows = [{"file_name": f"{index}.png", "prompt": "p"} for index in range(2)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = tmp_path / "options.yaml"
    options.write_text(json.dumps({"custom:mine": {"source": f"{source}:level"}}))
    assert cli.main(["score", "custom:mine", str(folder), "--options", str(options), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = ((pictures * 255).round() / 255).mean((1, 2, 3))
    assert found["scores"]["custom:mine"] == pytest.approx(expected.tolist(), abs=1e-6)
