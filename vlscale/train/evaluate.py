"""Periodic evaluation on held-out data: a fixed list of steps, dealt over all ranks, averaged exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

from vlscale.config import Recipe
from vlscale.data.class_probs import needs_classes
from vlscale.data.dataset import Dataset
from vlscale.data.deal import Rule, fitting_accumulation
from vlscale.data.loader import Loader, Preparer, Window
from vlscale.data.plan import FixedSteps, PlanSettings, evaluation_seed, evaluation_steps
from vlscale.errors import VlscaleError
from vlscale.objectives import Objective
from vlscale.train.engine import Engine
from vlscale.train.metrics import TermSums
from vlscale.train.processes import Processes
from vlscale.train.window import with_window


class Evaluation:
    """Every task of the run on every validation dataset, on the same examples with the same masks each time.

    A validation dataset takes part in the tasks of its ``mix``, or in all tasks of the run if it has none.

    Args:
        recipe: ``data.validation`` and ``evaluation`` are read.
        datasets: the opened validation datasets.
        objectives: task -> objective.

    Raises:
        VlscaleError: a dataset lacks what a task needs, its mix names a task that is not trained, or one of its
            examples (a unit with its views) is above ``batch.micro_batch_tokens``.

    Attributes:
        left_out: dataset name -> texts that are longer than ``data.max_text_tokens`` and take no part.
    """

    def __init__(self, recipe: Recipe, datasets: Mapping[str, Dataset], objectives: Mapping[str, Objective]) -> None:
        self._recipe, self._datasets, self._objectives = recipe, dict(datasets), dict(objectives)
        settings = PlanSettings.from_recipe(recipe)
        steps = []
        for section in recipe.data.validation:
            chosen: list[str] = [task for task, share in section.mix.items() if share > 0]
            for task in chosen or recipe.tasks:
                if task not in self._objectives:
                    raise VlscaleError(
                        f"data.validation {section.name}: task {task} is not trained; train it, or drop it from the mix"
                    )
                dataset = self._datasets[section.name]
                if needs_classes(self._objectives[task], dataset) and dataset.classes is None:
                    raise VlscaleError(
                        f"data.validation {section.name}: task {task} needs a classes/ store, which is not there; "
                        f"build it, or give the dataset a mix without {task}"
                    )
                steps += evaluation_steps(dataset.lengths, task, recipe.evaluation.examples, settings)
        self._rule = Rule("padded" if recipe.batch.mode == "padded" else "packed")
        for step in steps:
            fitting_accumulation(step, 1, settings.micro_batch_tokens, self._rule)  # raises if a group never fits
        self._plan = FixedSteps(steps)
        longest = settings.max_text_tokens
        self.left_out = {name: int((each.lengths.tokens > longest).sum()) for name, each in self._datasets.items()}

    def __bool__(self) -> bool:
        """Whether there is anything to evaluate on."""
        return len(self._plan) > 0

    def run(self, engine: Engine, processes: Processes) -> dict[str, float]:
        """Return ``eval/<dataset>/<task>/<term>``; all ranks have to call it, and all get the same numbers.

        Raises:
            VlscaleError: a row of a validation dataset is bad.
        """
        sums = TermSums()
        with self._loader(processes) as loader, engine.evaluating():
            for step, _, window in _in_step(loader, processes):
                key = f"eval/{step.dataset}/{step.task}"
                objective = self._objectives[step.task]
                for batch in with_window(engine, processes, objective, window):
                    sums.add_counts(key, objective.counts(batch))
                    sums.add(key, engine.forward(step.task, batch.to(processes.device)))
        sums.reduce_counts(processes)
        means = sums.means(processes.total(sums.local()))
        return {f"{key}/{name}": value for key, terms in means.items() for name, value in terms.items()}

    def _loader(self, processes: Processes) -> Loader:
        data, batch = self._recipe.data, self._recipe.batch
        return Loader(
            self._datasets,
            cast("Mapping[str, Preparer]", self._objectives),
            self._plan,
            self._plan.start(),
            processes.rank,
            processes.world_size,
            None,
            batch.micro_batch_tokens,
            data.workers,
            data.prefetch,
            evaluation_seed(self._recipe.seed),
            data.max_regions,
            pin=processes.device.type == "cuda",
            rule=self._rule,
        )


def _in_step(loader: Loader, processes: Processes) -> Iterator[Window]:
    """Yield the loader's windows; if reading fails in one process, all of them raise before they run anything."""
    while True:
        failure = window = None
        try:
            window = next(loader)
        except StopIteration:
            return
        except VlscaleError as error:
            failure = str(error)
        if processes.total([float(failure is not None)])[0]:
            processes.fail_together(failure)
        assert window is not None
        yield window
