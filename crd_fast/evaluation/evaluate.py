"""`crd-fast eval`: a suite's images from one model or from the states of a run, their scores, tables and a page."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from crd_fast.backbones.base import Backbone, LoadOptions
from crd_fast.errors import ConfigError, CrdFastError, DataError
from crd_fast.evaluation import shapes_suite
from crd_fast.evaluation.candidates import Candidate
from crd_fast.evaluation.folders import open_folder
from crd_fast.evaluation.generate import Images, batches, has_all, write_metadata
from crd_fast.evaluation.models import digest_of, load_model
from crd_fast.evaluation.page import write_page
from crd_fast.evaluation.pictures import read_image
from crd_fast.evaluation.results import column_name, columns, result_rows, shapes_columns
from crd_fast.evaluation.score_store import ScoreStore
from crd_fast.evaluation.scoring import UNUSABLE, Scores, build_options, version_of
from crd_fast.evaluation.settings import DTYPES, Evaluation
from crd_fast.evaluation.suites import plan
from crd_fast.lora_file import read_adapter
from crd_fast.progress import Reporter
from crd_fast.ranks import Ranks
from crd_fast.rewards import registry
from crd_fast.rewards.base import Reward
from crd_fast.whole_files import write_json, write_text

SCORE_BATCH = 32
TIMEOUT_MINUTES = 120.0
# the shapes suite's names of an image's scores -> columns
_SHAPES = {name: f"geneval/{name}" for name in ("accuracy", "strict", "soft")} | {"ocr_exact": "ocr/ocr_exact"}


def evaluate(evaluation: Evaluation, device: torch.device, reporter: Reporter | None = None) -> Path:
    """Make and score what is not there yet; returns the page. Under torchrun, every rank calls it.

    Raises CrdFastError: a model, LoRA or setting that does not fit, or a folder that holds images of other settings.
    """
    ranks = Ranks.from_environment(device, TIMEOUT_MINUTES)
    try:
        with reporter or (Reporter() if ranks.first else Reporter.silent()) as report:
            return _Job(evaluation, device, ranks, report).run()
    except torch.OutOfMemoryError as error:
        raise CrdFastError(
            f"out of memory on {device}: give a smaller --batch than {evaluation.settings.batch}, and another --out "
            f"({error})"
        ) from error
    finally:
        ranks.close()


class _Job:
    def __init__(self, evaluation: Evaluation, device: torch.device, ranks: Ranks, report: Reporter) -> None:
        self.evaluation, self.device, self.ranks, self.report = evaluation, device, ranks, report
        settings = evaluation.settings
        self.items = plan(evaluation.suite, evaluation.prompts, settings.images, settings.seed)
        self.batches = batches(self.items, settings.batch)
        self.mine = self.batches[ranks.rank :: ranks.world]
        self._built: dict[str, tuple[Reward, Any] | str] = {}

    def run(self) -> Path:
        evaluation, ranks, settings = self.evaluation, self.ranks, self.evaluation.settings
        digest = ranks.tell(digest_of(settings.model, settings.transformer) if ranks.first else "")
        with ranks.together("opening the output folder"):
            if ranks.first:
                open_folder(evaluation.out)
                for candidate in evaluation.candidates:
                    self._open(candidate, digest)
        with ranks.together("making the images"):
            self._generate()
        summaries = [self._score(candidate, digest) for candidate in evaluation.candidates]
        page = evaluation.out / "report.html"
        with ranks.together("writing the results"):
            if ranks.first:
                write_page(evaluation, [summary for summary in summaries if summary is not None], page)
                self.report.say(f"report {page}")
        return page

    def _open(self, candidate: Candidate, digest: str) -> None:
        """Settle which images belong into a candidate's folder."""
        evaluation = self.evaluation
        wanted = {
            "suite": evaluation.suite.name,
            "prompts": hashlib.sha256(json.dumps(evaluation.prompts.metadata).encode()).hexdigest(),
            "texts": hashlib.sha256(json.dumps(evaluation.prompts.prompts).encode()).hexdigest(),
            "model_digest": digest,
            "lora_digest": candidate.digest,
            "device": self.device.type,
            **vars(evaluation.settings),
        }
        folder = candidate.folder
        file = folder / "settings.json"
        try:
            found = json.loads(file.read_text()) if file.is_file() else None
        except ValueError as error:
            raise DataError(f"{file} is not JSON ({error}): delete {folder} or give another --out") from error
        if found is not None:
            keys = sorted((wanted | found).keys() - {"model", "transformer"})  # folders may move, their digests not
            changed = [key for key in keys if wanted.get(key) != found.get(key)]
            if changed:
                listed = ", ".join(f"{key} was {found.get(key)!r}, now {wanted.get(key)!r}" for key in changed)
                raise ConfigError(f"{folder} holds images of other settings: {listed}; give another --out")
        write_metadata(folder, evaluation.prompts, self.items)
        write_json(file, wanted)

    # --- images ---

    def _generate(self) -> None:
        evaluation = self.evaluation
        waiting = [c for c in evaluation.candidates if not all(has_all(c.folder, batch) for batch in self.mine)]
        if not waiting:
            return
        adapters = {c.label: read_adapter(str(c.lora)) for c in waiting if c.lora is not None}
        settings = evaluation.settings
        images = Images(
            self._load(),
            next(iter(adapters.values()), None),
            evaluation.prompts,
            self.mine,
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed,
            start_share=settings.start_share,
        )
        total = sum(len(batch) for batch in self.mine)
        for candidate in waiting:
            self.report.begin(f"images of {candidate.label}", total)
            images.make(candidate.folder, adapters.get(candidate.label), self._shown(total))

    def _shown(self, total: int) -> Callable[[int], None]:
        """Shows how many images of a phase are done, and how fast."""
        began = time.perf_counter()

        def show(done: int) -> None:
            self.report.update(min(done, total), f"{done / (time.perf_counter() - began):.1f} images/s")

        return show

    def _load(self) -> Backbone:
        settings = self.evaluation.settings
        options = LoadOptions(
            device=self.device,
            dtype=DTYPES[settings.dtype],
            max_sequence_length=settings.max_sequence_length,
            resolution=settings.resolution,
            distilled_guidance=settings.distilled_guidance,
        )
        return load_model(settings.model, settings.transformer, options)

    # --- scores ---

    def _score(self, candidate: Candidate, digest: str) -> dict[str, Any] | None:
        """On the first rank the candidate's summary, which it writes with results.jsonl."""
        evaluation = self.evaluation
        prompts, items = evaluation.prompts, self.items
        files = [candidate.folder / item.file_name for item in items]
        extra: dict[str, Any] = {}
        failures: list[dict[str, Any]] = []
        if evaluation.suite.name == "shapes":
            if not self.ranks.first:
                return None
            self.report.begin(f"scores of {candidate.label}", 1)
            result = self._shapes(files)
            self.report.update(1)
            made, extra = shapes_columns(result), {"summary": result.summary}
            raw: Sequence[Mapping[str, float | None]] = [
                {_SHAPES.get(name, name): value for name, value in row.items()} for row in result.scores
            ]
            versions = {name: version_of(name, build_options(name, {})) for name in ("geneval", "ocr")}
        else:
            scores, versions = self._rewards(candidate, files)
            if not self.ranks.first:
                return None
            made = columns(prompts, items, scores)
            raw = [_raw(scores, index) for index in range(len(items))]
            failures = [
                {"reward": name, "file_name": items[index].file_name, "reason": why}
                for name, scored in scores.items()
                for index, why in sorted(scored.failures.items())
            ]
        summary = {
            "label": candidate.label,
            "epoch": candidate.epoch,
            "suite": evaluation.suite.name,
            "settings": vars(evaluation.settings),
            "checkpoint": {"model": digest, "lora": candidate.digest},
            "prompts": {"n": len(prompts), "official": evaluation.suite.official},
            "n": len(items),
            "columns": made,
            "trained_on": sorted(evaluation.trained),
            "versions": versions,
            "failures": failures,
            **extra,
        }
        lines = [json.dumps(row) + "\n" for row in result_rows(prompts, items, raw, failures)]
        write_text(candidate.folder / "results.jsonl", "".join(lines))
        write_json(candidate.folder / "summary.json", summary)
        return summary

    def _shapes(self, files: Sequence[Path]) -> shapes_suite.Evaluated:
        settings = self.evaluation.settings
        pictures = torch.stack([read_image(file) for file in files])
        return shapes_suite.score(pictures, self.evaluation.prompts, images=settings.images, seed=settings.seed)

    def _rewards(self, candidate: Candidate, files: Sequence[Path]) -> tuple[dict[str, Scores], dict[str, Any]]:
        """Every reward's scores, from disk where an earlier start left them; on the first rank those of all ranks."""
        evaluation, ranks = self.evaluation, self.ranks
        stores: dict[str, ScoreStore] = {}
        scores: dict[str, Scores] = {}
        for name in evaluation.scorers:
            built = self._build(name)
            if ranks.any(isinstance(built, str)):
                reason = built if isinstance(built, str) else "another rank cannot use it: see its packages"
                scores[name] = Scores(reason=reason)
                continue
            assert not isinstance(built, str)
            reward, options = built
            stores[name] = ScoreStore(
                candidate.folder / "scores" / name,
                version_of(name, options),
                batches(range(len(files)), SCORE_BATCH),
                files,
            )
            self.report.begin(f"{name} of {candidate.label}", len(files))
            with ranks.together(f"scoring with {name}"):
                prompts = [evaluation.prompts.prompts[item.prompt] for item in self.items]
                metadata = [evaluation.prompts.metadata[item.prompt] for item in self.items]
                stores[name].fill(reward, prompts, metadata, ranks.rank, ranks.world, self._shown(len(files)))
            scores[name] = stores[name].read() if ranks.first else Scores()
        return scores, {name: store.version for name, store in stores.items()}

    def _build(self, name: str) -> tuple[Reward, Any] | str:
        """A reward and its options, one for all candidates; or why it cannot be used."""
        if name not in self._built:
            options = self.evaluation.scorer_options(name)
            try:
                reward = registry.build(name, options)
                self.evaluation.prompts.require_for(reward)
                self._built[name] = reward, options
            except UNUSABLE as error:
                self._built[name] = str(error)
        return self._built[name]


def _raw(scores: dict[str, Scores], index: int) -> dict[str, float | None]:
    return {
        column_name(name, key): values[index]
        for name, scored in scores.items()
        for key, values in scored.values.items()
    }
