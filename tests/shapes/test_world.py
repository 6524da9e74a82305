from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from crd_fast.rewards.geneval import evaluate
from crd_fast.rewards.shapes import detect_shapes
from crd_fast.shapes import world
from crd_fast.shapes.detector import cleanliness, find_shapes

ROOT = Path(__file__).parents[2]


def renders(prompts: list[world.Metadata], seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(world.render([world.sample_scene(p, rng) for p in prompts], rng))


def drawn(tasks: tuple[str, ...], count: int, seed: int) -> list[world.Metadata]:
    catalogue = world.prompts("all", tasks)
    return [catalogue[i] for i in np.random.default_rng(seed).integers(len(catalogue), size=count)]


@pytest.mark.parametrize("task", world.GENEVAL_TASKS)
def test_true_renders_satisfy_their_prompts(task: str) -> None:
    prompts = drawn((task,), 200, 1)
    found = detect_shapes(renders(prompts, 2))
    strict = [evaluate(boxes, entry).strict for boxes, entry in zip(found, prompts, strict=True)]
    assert np.mean(strict) >= 0.97


@pytest.mark.parametrize("task", world.GENEVAL_TASKS)
def test_corrupted_prompts_are_seen_to_be_wrong(task: str) -> None:
    rng = np.random.default_rng(3)
    prompts = drawn((task,), 150, 4)
    found = detect_shapes(renders([world.corrupt(p, rng) for p in prompts], 5))
    strict = [evaluate(boxes, entry).strict for boxes, entry in zip(found, prompts, strict=True)]
    assert np.mean(strict) <= 0.1


def test_corrupting_a_number_changes_it_and_keeps_its_length() -> None:
    rng = np.random.default_rng(0)
    for entry in drawn(("text",), 100, 6):
        wrong = world.corrupt(entry, rng)
        assert wrong["text"] != entry["text"] and len(wrong["text"]) == len(entry["text"])


def test_detector_reads_every_shape_colour_and_box() -> None:
    item = world.Item("square", "blue", 20.0, 40.0, 10.0)
    ((blob,),) = find_shapes(torch.from_numpy(world.render([world.Scene((item,))])))
    half = 10.0 * np.sqrt(np.pi) / 2
    assert (blob.shape, blob.color, blob.valid) == ("square", "blue", True)
    assert np.allclose(blob.box, (20 - half, 40 - half, 20 + half, 40 + half), atol=1.01)
    assert abs(blob.area - np.pi * 100) < 20


def test_stray_paint_is_not_a_shape_and_is_not_clean() -> None:
    image = torch.from_numpy(world.render([world.Scene((world.Item("circle", "red", 20.0, 20.0, 9.0),))]))
    clean = cleanliness(image)[0]
    image[0, :, 45:60, 30:34] = torch.tensor(world.COLORS["green"])[:, None, None] / 255
    blobs = find_shapes(image)[0]
    assert clean == 1.0
    assert [blob.valid for blob in blobs] == [True, False]
    assert 0.7 < cleanliness(image)[0] < 0.95


def test_blank_and_sign_images_have_no_shapes() -> None:
    sign = world.render([world.Scene(text="42"), world.Scene()])
    assert find_shapes(torch.from_numpy(sign)) == [[], []]
    assert cleanliness(torch.from_numpy(sign)).tolist() == [0.0, 0.0]


def test_detector_rejects_integers() -> None:
    with pytest.raises(ValueError, match=r"torch.uint8.*expected float \(N, 3, H, W\)"):
        find_shapes(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_splits_are_disjoint_and_cover_every_task() -> None:
    train, test = world.prompts("train"), world.prompts("test")
    assert not {p["prompt"] for p in train} & {p["prompt"] for p in test}
    for task in world.TASKS:
        held_out = len(world.prompts("test", [task]))
        assert held_out == len(world.prompts("all", [task])) // 4


def test_unknown_split_and_task_are_named() -> None:
    with pytest.raises(ValueError, match="'dev'.*expected 'train', 'test' or 'all'"):
        world.prompts("dev")
    with pytest.raises(ValueError, match="unknown tasks.*shape"):
        world.prompts("test", ["shape"])


def test_committed_prompt_files_are_the_worlds(tmp_path: Path) -> None:
    script = ROOT / "examples" / "shapes" / "write_prompts.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == sorted(p.name for p in (ROOT / "recipes" / "prompts").glob("shapes_*.jsonl"))
    for name in files:
        assert (tmp_path / name).read_text() == (ROOT / "recipes" / "prompts" / name).read_text()
    assert all(json.loads(line)["tag"] in world.TASKS for line in (tmp_path / files[0]).read_text().splitlines())
