"""Prompts that ask for a readable text, for the OCR reward; no text is in both the training and the test set.

    python -m crd_fast.data.sign_prompts --train 2000 --test 200 --out recipes/prompts

Writes ocr_train.txt and ocr_test.txt, one prompt a line, the text between double quotes. The same seed gives the same
files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SCENES = (
    'A wooden sign at the edge of a forest that says "{}"',
    'A shop window at night with the words "{}" in neon light',
    'A photo of a street with a large banner reading "{}"',
    'A birthday cake with "{}" written on it in icing',
    'A book on a desk with the title "{}" on its cover',
    'A chalkboard in a classroom on which someone wrote "{}"',
    'A white T-shirt with "{}" printed on the chest',
    'A coffee mug on a table, printed with "{}"',
    'A train station with a departure board that shows "{}"',
    'A film poster with the title "{}" in tall letters',
    'A paper note on a refrigerator that reads "{}"',
    'A highway sign under a blue sky that reads "{}"',
    'Graffiti on a brick wall that spells "{}"',
    'A laptop whose screen shows the text "{}"',
    'A gravel path with "{}" laid out in small stones',
    'A sailing boat with the name "{}" painted on its side',
    'A museum label next to a painting that says "{}"',
    'A hot air balloon with "{}" on its envelope',
    'A glass bottle with a label that reads "{}"',
    'A robot holding a card that says "{}"',
)
FIRST = (
    "Open Quiet Golden Silver Northern Hidden Early Gentle Bright Ancient Little Crystal Winter Summer Morning "
    "Midnight Electric Velvet Wild Honest Final Second Modern Broken Rapid Secret Paper Stone Copper Green Scarlet "
    "Hollow"
).split()
SECOND = (
    "Harbor Garden Bakery Kitchen Market Museum Station Library Theatre Valley River Bridge Window Letter Journey "
    "Signal Orchard Anchor Castle Island Meadow Compass Lantern Engine Mirror Canyon Falcon Painter Sailor Teacher "
    "Orbit Thunder"
).split()
THIRD = "Today Tonight Club House Street Society 1924 2041 Open Closed Sale Hours Road Press Tours Studio".split()


def texts() -> list[str]:
    """Every text there is: one to three words."""
    pairs = [f"{a} {b}" for a in FIRST for b in SECOND]
    return [*FIRST, *SECOND, *pairs, *(f"{pair} {c}" for pair in pairs for c in THIRD)]


def sign_prompts(train: int, test: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Training and test prompts, every text used once. Raises ValueError when there are not as many texts, or for a
    negative seed."""
    known = texts()
    if seed < 0:
        raise ValueError(f"seed is {seed}: expected 0 or more")
    if train < 1 or test < 1 or train + test > len(known):
        raise ValueError(f"{train} + {test} prompts: expected at least 1 of each and {len(known)} together at most")
    rng = np.random.default_rng(seed)
    # half of them have one or two words, as far as those go, so that they are not drowned by the many longer ones
    short = [text for text in known if text.count(" ") < 2]
    long = [text for text in known if text.count(" ") == 2]
    wanted = train + test
    shorts = min(len(short), wanted // 2)
    chosen = [*rng.choice(short, shorts, replace=False), *rng.choice(long, wanted - shorts, replace=False)]
    rng.shuffle(chosen)
    prompts = [SCENES[int(rng.integers(len(SCENES)))].format(text) for text in chosen]
    return prompts[:train], prompts[train:]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("recipes/prompts"))
    given = parser.parse_args(arguments)
    try:
        _write(given.out, *sign_prompts(given.train, given.test, given.seed))
    except (ValueError, OSError) as error:
        print(f"sign_prompts: {error}", file=sys.stderr)
        return 2
    return 0


def _write(folder: Path, train: Sequence[str], test: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in (("train", train), ("test", test)):
        (folder / f"ocr_{name}.txt").write_text("".join(prompt + "\n" for prompt in prompts), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
