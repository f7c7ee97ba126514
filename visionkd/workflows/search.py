"""Find the student that suits a teacher, without training any."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from visionkd.config.schema import NetworkConfig
from visionkd.config.search import SearchConfig
from visionkd.data.open import open_data
from visionkd.data.subset import stratified_subset
from visionkd.errors import DataError, InterruptedRunError, RequestError, WorkError, first_line
from visionkd.models.factory import create_network
from visionkd.search.budget import exceeded
from visionkd.search.evolution import Answer, Search, SearchSettings
from visionkd.search.examine import Examiners, Job, build_untrained, with_cost
from visionkd.search.spaces import Space
from visionkd.types import Listener, Progress
from visionkd.workflows._networks import image_batches, seed_of
from visionkd.workflows._request import check_mode, command_line
from visionkd.workflows._rundir import RunDirectory, open_run
from visionkd.workflows._search_cost import Cost, training_cost
from visionkd.workflows._search_files import files_of, read_state, rows, write_files, write_state
from visionkd.workflows._search_latency import latency_ms
from visionkd.workflows._search_request import (
    described,
    distill_command,
    distill_settings,
    no_weights,
    options_of,
    search_config,
    student_options,
)
from visionkd.workflows._stages import write_environment
from visionkd.workflows._training import run_path
from visionkd.workflows.results import RunResult, SearchResult


def search(
    *,
    teacher: str | None = None,
    space: str | None = None,
    data: str | None = None,
    budget: str | Mapping[str, float] | None = None,
    score: str | None = None,
    evaluations: int | None = None,
    strategy: str | None = None,
    population: int | None = None,
    tournament: int | None = None,
    seed: int | None = None,
    init: str | None = None,
    img_size: int | None = None,
    batch_size: int | None = None,
    backend: str | None = None,
    workers: int | None = None,
    options: Sequence[str] | None = None,
    distill: bool = False,
    out: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> SearchResult:
    """Rank students of a space for ``teacher`` by a zero-cost score, and leave a run directory with all of them.

    One batch of training images is looked at; nothing is trained, and no accuracy of anything is read.

    Args:
        teacher: MODEL that the student is to learn from; its weights are drawn at random for most scores.
        space: Name of a space, or the ``.yaml`` or ``.py`` file of one.
        data: DATA; None takes the embedded ``shapes``.
        budget: ``params_m=0.5,macs_g=0.05,latency_ms=3`` or a mapping: what a student may cost at most.
        score: Name of a score of :mod:`visionkd.search.scores`.
        evaluations: Candidates within the budget to examine, at most.
        strategy: ``auto``, ``evolution``, ``random`` or ``exhaustive``.
        population: Scored candidates that parents are taken from.
        tournament: Candidates drawn from these, of which the best becomes a parent.
        seed: Seed of everything.
        init: How weights are drawn, ``default`` or ``gaussian``.
        img_size: Input size of candidates in pixels; None takes each network's own.
        batch_size: Images in the batch.
        backend: ``torch``, ``onnxruntime`` or ``onnxruntime-int8``: measures the latency of each candidate on it.
        workers: Processes.
        options: ``KEY=VALUE`` settings of the distillation that follows; those of ``data`` hold for the search too.
        distill: Distil the teacher into the best candidate at the end.
        out: Run directory; None makes a name from space, teacher and data.
        resume: Go on with the search in ``out``; more ``evaluations`` may be asked for.
        overwrite: Replace the run in ``out``.
        listener: Is told what happens.

    Raises:
        RequestError: If the request is wrong; all problems are listed.
        WorkError: If no candidate is within the budget, or none can be scored.
    """
    check_mode(resume=resume, overwrite=overwrite)
    given = {
        "teacher": teacher, "space": space, "data": data, "budget": budget, "score": score, "evaluations": evaluations,
        "strategy": strategy, "population": population, "tournament": tournament, "seed": seed, "init": init,
        "img_size": img_size, "batch_size": batch_size, "backend": backend, "workers": workers,
        "options": options_of(options),
    }  # fmt: skip
    config, found = search_config(given, out=out, resume=resume)
    if distill and (problem := no_weights(config)) is not None:
        raise RequestError(problem)
    return _Search(config, found, listener or Listener()).run(out, distill, resume=resume, overwrite=overwrite)


class _Search:
    """One search, from its settings to the files it leaves."""

    def __init__(self, config: SearchConfig, space: Space, listener: Listener) -> None:
        self.config, self.space, self.listener = config, space, listener
        self.settings = distill_settings(config)
        self.job, self.data_name = self._job()
        self.image = torch.from_numpy(self.job.image).float().div(255.0)
        self.started, self.before_s = time.monotonic(), 0.0

    def _job(self) -> tuple[Job, str]:
        config, settings = self.config, self.settings
        # Of the teacher, the search wants its kind and its input: published weights are not fetched.
        spec = NetworkConfig(name=config.teacher, pretrained=False)
        shown = create_network(spec, in_training=True)
        data = open_data(
            settings.data.path, config=settings.data, seed=settings.data.split_seed, task=settings.task,
            img_size=min(640, max(32, config.img_size or max(shown.input.img_size))),
        )  # fmt: skip
        if not len(data.splits.get("train", ())):
            raise DataError(f"{data.name} has no images in its split 'train'.")
        source = stratified_subset(data.splits["train"], config.batch_size, seed=config.seed)
        batches = list(image_batches(source, shown, batch_size=config.batch_size, workers=0))
        if not batches:
            raise DataError(f"None of the images looked at in {data.name} can be read.")
        for text in data.messages:
            self.listener.message(text)
        job = Job(
            score=config.score,
            teacher=spec,
            num_classes=len(data.classes),
            # contiguous: its copy in another process has that layout, and rounding depends on it
            image=torch.cat([image for image, _ in batches]).mul(255).round().to(torch.uint8).contiguous().numpy(),
            target=torch.cat([target for _, target in batches]).numpy(),
            seed=config.seed,
            teacher_seed=seed_of(config.seed, "teacher0"),
            student_seed=seed_of(config.seed, "student"),
            init=config.init,
            params_limit_m=config.budget.get("params_m"),
        )
        self.num_train = len(data.splits["train"])
        return job, data.name

    def run(self, out: str | None, distil: bool, *, resume: bool, overwrite: bool) -> SearchResult:
        config, command = self.config, command_line()
        name = f"search_{self.space.name}.{config.score}_{Path(config.teacher).name}_{self.data_name}"
        path = run_path(out, name)
        opened = open_run(
            path, config=config, command=command, resume=resume, overwrite=overwrite, listener=self.listener
        )
        with opened as (run, listener):
            self.listener = listener
            write_environment(run, command)
            stages = ["search", *(["distill"] if distil else [])]
            listener.stage("search", f"Search the space {self.space.name}", 1, len(stages))
            search = self._searched(run)
            ranking = search.ranking()
            self._say(search)
            if not ranking:
                raise WorkError(
                    _nothing_found(search), hint="Allow a larger --budget, more --evaluations, or another --space."
                )
            student = self.space.network(ranking[0].candidate)
            seconds = self._seconds()
            if (cost := self._cost(student, seconds * config.compute.workers / len(ranking))) is not None:
                listener.message(str(cost))
            write_files(run.path, self._state(search), search, self.config, self.space)
            distilled = None
            if distil:
                listener.stage("distill", f"Distil into {described(student)}", 2, len(stages))
                distilled = self._distilled(student, run.path / "distill")
            statuses = [record.status for record in search.records]
            return SearchResult(
                run=run.path,
                table=rows(ranking, self.space),
                command=distill_command(config, student),
                student=student.model_dump(),
                strategy=search.strategy,
                num_scored=statuses.count("scored"),
                num_failed=statuses.count("failed"),
                num_over_budget=statuses.count("over_budget"),
                seconds=seconds,
                files=files_of(run.path),
                distilled=distilled,
            )

    # The search -------------------------------------------------------------------------------------------------------

    def _searched(self, run: RunDirectory) -> Search:
        config = self.config
        settings = SearchSettings(
            evaluations=config.evaluations, strategy=config.strategy, seed=config.seed,
            population=config.population, tournament=config.tournament,
        )  # fmt: skip
        state = read_state(run.path)
        if state is not None:
            self.before_s = state.get("seconds", 0.0)
        with Examiners(self.job, workers=config.compute.workers) as examiners:
            search = Search(
                self.space, settings, measure=lambda configs: self._measured(examiners, configs),
                score=examiners.score, limits=config.budget, state=state,
                on_batch=lambda search: self._batch_done(run, search),
            )  # fmt: skip
            if state is not None:
                self.listener.message(f"Going on after {search.done} evaluations")
            try:
                search.run()
            except KeyboardInterrupt:
                raise InterruptedRunError(
                    f"Interrupted after {search.done} of {config.evaluations} evaluations; those are kept.",
                    hint=f"Continue with --resume --out {shlex.quote(str(run.path))}",
                ) from None
        return search

    def _batch_done(self, run: RunDirectory, search: Search) -> None:
        write_state(run.path, self._state(search))
        ranking = search.ranking()
        done, total = search.done, self.config.evaluations
        left_s = self._seconds() / max(done, 1) * (total - done)
        metrics = {"score": float(ranking[0].score or 0.0)} if ranking else {}
        self.listener.progress(Progress("search", done, total, eta_s=left_s, metrics=metrics))

    def _state(self, search: Search) -> dict[str, Any]:
        return {**search.state(), "strategy": search.strategy, "seconds": round(self._seconds(), 3)}

    def _seconds(self) -> float:
        return self.before_s + time.monotonic() - self.started

    def _cost(self, student: NetworkConfig, scored_s: float) -> Cost | None:
        """Return what scoring cost beside training; None where the training's share cannot be timed."""
        job, epochs = self.job, self.settings.training.epochs
        network = build_untrained(student, job.student_seed, num_classes=job.num_classes)
        try:
            return training_cost(
                network, self.image, torch.from_numpy(job.target), images=epochs * self.num_train, scored_s=scored_s
            )
        except RuntimeError:  # a batch that is scored without its graph may be too large to train on
            return None

    # Costs ------------------------------------------------------------------------------------------------------------

    def _measured(self, examiners: Examiners, configs: Sequence[NetworkConfig]) -> list[Answer]:
        """Return costs; latency is measured here, one candidate after the other, while no other process works."""
        answers = examiners.measure(configs)
        backend, budget = self.config.backend, self.config.budget
        if backend is None:
            return answers
        done = []
        for config, answer in zip(configs, answers, strict=True):
            if answer.reason is None and exceeded(answer.values, budget) is None:
                try:
                    answer = with_cost(
                        answer, "latency_ms", latency_ms(examiners.first.build(config), backend, self.image)
                    )
                except Exception as error:  # an export or a kernel may fail in any way: not the search's matter
                    reason = f"latency cannot be measured with {backend}: {first_line(error)}"
                    answer = Answer(answer.values, reason=reason)
            done.append(answer)
        return done

    # What is said and done afterwards ---------------------------------------------------------------------------------

    def _say(self, search: Search) -> None:
        say = self.listener.message
        statuses = [record.status for record in search.records]
        seconds = self._seconds()
        scored = statuses.count("scored")
        say(
            f"{scored} candidates scored by {self.config.score} ({search.strategy}) in {seconds:.0f} s,"
            f" {60 * scored / max(seconds, 1e-9):.0f} a minute;"
            f" {statuses.count('over_budget')} over the budget, {statuses.count('failed')} failed"
        )
        if search.ended:
            say(f"The search ended before its {self.config.evaluations} evaluations: {search.ended}")
        if (problem := no_weights(self.config)) is not None:
            say(f"{problem.message}, which a search does not mind but a distillation does. {problem.hint}")
        by_class = {record.parts.get("semantic_by_class") for record in search.ranking()} - {None}
        if len(by_class) > 1:
            say(
                "Some candidates have the teacher's width and are compared with it channel by channel, the others class"
                " by class: the two are not one scale. --score diswot_by_class compares all of them alike",
                level="warning",
            )

    def _distilled(self, student: NetworkConfig, path: Path) -> RunResult:
        from visionkd.workflows.distill import distill

        begun = (path / "config.yaml").is_file()
        if begun:
            return distill(out=str(path), resume=True, listener=self.listener)
        return distill(
            teacher=self.config.teacher,
            student=student.name,
            data=self.config.data,
            seed=self.config.seed,
            options=(*self.config.options, *student_options(student)),
            out=str(path),
            listener=self.listener,
        )


def _nothing_found(search: Search) -> str:
    reasons = [record.reason for record in search.records if record.reason]
    if not reasons:
        return "No candidate was found."
    kinds = {record.status for record in search.records}
    what = "is within the budget" if kinds == {"over_budget"} else "could be scored"
    return f"None of {len(search.records)} candidates {what}. The last one: {reasons[-1]}"
