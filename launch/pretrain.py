"""Pre-train: deepspeed launch/pretrain.py --ds_config ds_configs/NAME.json [--recipe FILE] [--set KEY=VALUE ...]."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from vlscale.train.options import parse
from vlscale.train.resilience import hold_stop

if __name__ == "__main__":
    hold_stop()  # before anything starts threads, which imports do

RECIPES = Path(__file__).parent / "recipes"


def main(arguments: Sequence[str] | None = None) -> None:
    """Build a run: stores -> plan -> objectives -> model in its engine. ``vlscale/train/loop.py`` then trains it."""
    hold_stop()
    args = parse((__doc__ or "").split(":")[0], arguments)
    # Imported here, because reader processes import this file too, and need none of it.
    from vlscale.config import load_recipe
    from vlscale.data.deal import accumulation
    from vlscale.data.plan import Plan
    from vlscale.data.prefetch import check_room, class_tasks
    from vlscale.objectives import build_objectives
    from vlscale.train import loop
    from vlscale.train.checkpoint import Checkpoints
    from vlscale.train.ds_config import check_machine, find_recipe, read_ds_config, resolve_ds_config
    from vlscale.train.engine import connect
    from vlscale.train.environment import choose_accelerator, compute_capability
    from vlscale.train.evaluate import Evaluation
    from vlscale.train.pretraining import build_engine, data_facts, inner_model, open_datasets, vocabulary_of
    from vlscale.train.processes import launched
    from vlscale.train.progress import Reporter
    from vlscale.train.run_folder import RunFolder

    with launched("pretrain"):
        settings = read_ds_config(args.ds_config)
        recipe_path = args.recipe or find_recipe(args.ds_config, RECIPES)
        recipe = load_recipe(recipe_path, tuple(args.set))
        accelerator = choose_accelerator(args.device)
        check_machine(settings, accelerator, compute_capability(accelerator))
        processes = connect(accelerator, args.timeout, "pretrain", args.join_timeout)
        with processes.agreed():
            datasets = open_datasets(recipe.data.datasets, recipe.data)
            validation = open_datasets(recipe.data.validation, recipe.data)
            facts = data_facts([*datasets.values(), *validation.values()])
            plan = Plan.from_recipe(recipe, datasets)
            objectives = build_objectives(recipe.objectives, recipe.tasks, vocabulary_of(datasets.values()))
            evaluation = Evaluation(recipe, validation, objectives)
            check_room(plan, datasets, class_tasks(objectives), recipe.data.window_shards)
            gas, examples = accumulation(plan, processes.world_size), recipe.batch.global_batch_examples
            config = resolve_ds_config(settings, gas, processes.world_size, examples)
            folder = RunFolder(args.run_dir or Path("runs") / recipe.name)
        reporter = Reporter(processes.main, folder.log)
        checkpoints = Checkpoints(folder.checkpoints, processes, recipe.checkpoint.keep, reporter.line)
        found = checkpoints.find(args.resume)
        engine, started = build_engine(processes, recipe, objectives, facts, config)
        run = loop.Training(processes, recipe, settings.precision, plan, datasets, objectives, engine,
                            inner_model(engine), evaluation, folder, checkpoints, reporter)  # fmt: skip
        with closing(run):
            run.describe(recipe_path, config, started)
            loop.train(run, loop.restore(run, found))


if __name__ == "__main__":
    from vlscale.train.processes import run_and_exit

    run_and_exit(main)
