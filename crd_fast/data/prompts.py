"""Prompt sets: the field's file formats, checks at load time, and the order of prompts over epochs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crd_fast.errors import ConfigError, CrdFastError, DataError
from crd_fast.rewards.base import QUOTED_TEXT, ChecksPrompts, Reward
from crd_fast.rewards.geneval import check_metadata
from crd_fast.rewards.ocr import quoted_text

Check = Callable[[str, dict[str, Any]], object]  # of a prompt and its metadata; raises DataError


@dataclass(frozen=True)
class PromptSet:
    """Prompts with one metadata entry each. `name` and `lines` say in messages where a prompt came from.

    `lines` are 1-based line numbers in the file `name`; empty for prompts that were not read from a file.
    """

    prompts: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...]
    name: str
    lines: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompts:
            raise DataError(f"prompt set {self.name!r} is empty: expected at least one prompt")
        if len(self.metadata) != len(self.prompts):
            raise DataError(
                f"prompt set {self.name!r} has {len(self.prompts)} prompts and "
                f"{len(self.metadata)} metadata entries: expected as many of one as of the other"
            )
        if self.lines and len(self.lines) != len(self.prompts):
            raise DataError(f"prompt set {self.name!r} has {len(self.lines)} lines for {len(self.prompts)} prompts")
        for index, prompt in enumerate(self.prompts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise DataError(f"{self.where(index)}: prompt is {prompt!r}: expected text")

    def __len__(self) -> int:
        return len(self.prompts)

    def where(self, index: int) -> str:
        """Where prompt `index` came from, for messages."""
        return f"{self.name}:{self.lines[index]}" if self.lines else f"{self.name}, prompt {index}"

    def require(self, keys: Iterable[str]) -> None:
        """Checks that every prompt has what a reward requires: metadata keys, or a text in double quotes.

        `keys` is a reward's `requires`. GenEval's "include" is checked in full. Raises DataError naming the
        line.
        """
        for key in sorted(keys):
            check = _CHECKS.get(key)
            for index, (prompt, entry) in enumerate(zip(self.prompts, self.metadata, strict=True)):
                if key != QUOTED_TEXT and key not in entry:
                    raise DataError(
                        f"{self.where(index)}: prompt {prompt!r} has metadata keys {sorted(entry)}: "
                        f"a configured reward requires {key!r}; add it or leave that reward out"
                    )
                if check is not None:
                    self._check(index, check)

    def require_for(self, reward: Reward) -> None:
        """Checks that `reward` can score images of every prompt. Raises DataError naming the line."""
        self.require(reward.requires)
        if isinstance(reward, ChecksPrompts):
            for index in range(len(self)):
                self._check(index, reward.check_prompt, f"reward {reward.name!r}: ")

    def _check(self, index: int, check: Check, asked_by: str = "") -> None:
        try:
            check(self.prompts[index], self.metadata[index])
        except CrdFastError as error:
            raise DataError(f"{self.where(index)}: {asked_by}{error}") from error


_CHECKS: dict[str, Check] = {
    QUOTED_TEXT: lambda prompt, entry: quoted_text(prompt),
    "include": lambda prompt, entry: check_metadata(entry),
}


def load_prompts(path: str | Path, split: str | None = None) -> PromptSet:
    """Prompts from a file, or from the file of one split in a folder.

    - `.jsonl`: an object a line with "prompt"; the whole object is the metadata. Where it has "include" it is
      checked as a GenEval entry.
    - `.txt`: a prompt a line. When every line has a text in double quotes (OCR prompts) the lines are kept as
      they are; otherwise repeated prompts are dropped, as preference prompt lists repeat theirs.
    - a folder: `<split>_metadata.jsonl`, `<split>.jsonl` or `<split>.txt` in it, whichever one exists.

    Raises DataError with file, line number and content.
    """
    path = Path(path)
    if path.is_dir():
        path = _split_file(path, split)
    elif split is not None:
        raise ConfigError(f"split {split!r} was given with {path}, which is not a folder: give the folder, or no split")
    if path.suffix == ".jsonl":
        return _load_jsonl(path)
    if path.suffix == ".txt":
        return _load_txt(path)
    raise DataError(f"{path}: expected a .jsonl or .txt file of prompts, or a folder of splits")


def _split_file(folder: Path, split: str | None) -> Path:
    if split is None:
        files = sorted(file for file in folder.iterdir() if file.suffix in (".jsonl", ".txt"))
        example = f", such as {files[0]}" if files else ""
        raise ConfigError(f"{folder} is a folder: give the file of one split in it{example}, or name the split")
    names = (f"{split}_metadata.jsonl", f"{split}.jsonl", f"{split}.txt")
    present = [folder / name for name in names if (folder / name).is_file()]
    if len(present) != 1:
        found = " and ".join(p.name for p in present) or "none of them"
        raise DataError(f"{folder} has {found}: expected exactly one of {', '.join(names)} for split {split!r}")
    return present[0]


def _lines(path: Path) -> list[tuple[int, str]]:
    """(1-based number, stripped text) of every line that is not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: expected a file of prompts") from error
    except UnicodeDecodeError as error:
        number = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{number}: not UTF-8 ({error.reason}): save the file as UTF-8") from error
    # not splitlines(): it also breaks at form feeds and Unicode separators, which may stand inside a JSON
    # string
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise DataError(f"{path} has no prompts: expected one a line")
    return lines


def _load_txt(path: Path) -> PromptSet:
    lines = _lines(path)
    if not all(_has_quoted_text(line) for _, line in lines):
        first: dict[str, int] = {}
        for number, line in lines:
            first.setdefault(line, number)
        lines = [(number, line) for line, number in first.items()]
    numbers, prompts = zip(*lines, strict=True)
    return PromptSet(prompts, tuple({} for _ in prompts), str(path), numbers)


def _has_quoted_text(prompt: str) -> bool:
    try:
        quoted_text(prompt)
    except DataError:
        return False
    return True


def _load_jsonl(path: Path) -> PromptSet:
    prompts: list[str] = []
    metadata: list[dict[str, Any]] = []
    lines = _lines(path)
    for number, line in lines:
        where = f"{path}:{number}"
        shown = line if len(line) <= 160 else f"{line[:160]}..."
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno}): {shown}") from error
        if not isinstance(entry, dict):
            raise DataError(f"{where}: expected an object with a prompt: {shown}")
        prompt = entry.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"{where}: 'prompt' is {prompt!r}, expected text: {shown}")
        if entry.get("include"):  # an empty list is how other tasks stand in a GenEval file
            try:
                check_metadata(entry)
            except DataError as error:
                raise DataError(f"{where}: {error}: {shown}") from error
        prompts.append(prompt)
        metadata.append(entry)
    return PromptSet(tuple(prompts), tuple(metadata), str(path), tuple(number for number, _ in lines))


def assert_disjoint(train: PromptSet, test: PromptSet) -> None:
    """Raises DataError when a prompt is in both sets, case and spacing aside; lists up to five of them."""
    held_out = {" ".join(prompt.casefold().split()) for prompt in test.prompts}
    shared = list(dict.fromkeys(p for p in train.prompts if " ".join(p.casefold().split()) in held_out))
    if shared:
        listed = "; ".join(repr(prompt) for prompt in shared[:5])
        raise DataError(
            f"{len(shared)} prompts of {train.name} are also in {test.name}: {listed}"
            f"{'; ...' if len(shared) > 5 else ''}; remove them from the training set"
        )


def shuffled_slice(prompt_count: int, size: int, number: int, seed: int) -> Tensor:
    """Slice `number` of an endless row of seeded permutations of all prompts, int64 (size,); see `GroupSampler`."""
    positions = np.arange(number * size, (number + 1) * size)
    rounds, offsets = np.divmod(positions, prompt_count)
    picked = np.empty(size, dtype=np.int64)
    for turn in np.unique(rounds):
        order = np.random.default_rng([seed, int(turn)]).permutation(prompt_count)
        picked[rounds == turn] = order[offsets[rounds == turn]]
    return torch.from_numpy(picked)


@dataclass(frozen=True)
class GroupSampler:
    """Which prompts an epoch trains on: `groups` prompts with `group_size` samples each.

    Epochs are consecutive slices of an endless row of seeded permutations of all prompts, so no prompt comes
    again before all others have come. A slice is a pure function of (seed, epoch): resuming needs the epoch
    and no state, and every rank computes the same one. With more groups than prompts, or where a slice
    crosses into the next permutation, a prompt can stand in an epoch more than once, as groups of their own.
    """

    prompt_count: int
    groups: int
    group_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("prompt_count", "groups"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} is {getattr(self, field)}: expected at least 1")
        if self.group_size < 2:
            raise ConfigError(
                f"group_size is {self.group_size}: expected at least 2: samples are compared in their group"
            )
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}: expected 0 or more")

    def prompts(self, epoch: int) -> Tensor:
        """Prompt index of each group of an epoch, int64 (groups,). Raises ValueError for epoch < 0."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}: expected 0 or more")
        return shuffled_slice(self.prompt_count, self.groups, epoch, self.seed)

    def samples(self, epoch: int) -> Tensor:
        """Prompt index of each sample of an epoch, groups one after another, int64 (groups * group_size,)."""
        return self.prompts(epoch).repeat_interleave(self.group_size)

    def group_ids(self) -> Tensor:
        """The group of each sample, in the order of `samples`, int64 (groups * group_size,)."""
        return torch.arange(self.groups).repeat_interleave(self.group_size)
