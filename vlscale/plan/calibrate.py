"""From short measurements to a calibration of this machine."""

from __future__ import annotations

import torch

from vlscale.config import Recipe
from vlscale.models.registry import ModelConfig
from vlscale.plan.calibration import Calibration, Machine
from vlscale.plan.clock import Clock
from vlscale.plan.costs import Costs
from vlscale.plan.memory import Zero
from vlscale.plan.model import model_sizes
from vlscale.plan.operators import Operators
from vlscale.plan.sample import Sampler
from vlscale.plan.trial import Trial
from vlscale.plan.workload import Planner, Source, with_model

_TINY = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 64, "num_hidden_layers": 1}
"""A model of which a micro-step is nearly nothing but the calls."""
_ROUNDS = 5


class Calibrator:
    """Measures the operations of a recipe's model, as often as asked: what else runs on the machine comes and goes.

    Args:
        recipe: its objectives and optimiser.
        source: its model, and lengths.
        zero: precision and accumulation.
        device: where.
    """

    def __init__(self, recipe: Recipe, source: Source, zero: Zero, device: torch.device) -> None:
        self._recipe, self._source, self._zero, self._device = recipe, source, zero, device
        self._operators = Operators(source.config, zero.precision, device)
        self._tiny_s = float("inf")

    def measure(self) -> Calibration:
        """Measure everything once more, some ten seconds; return the least times so far."""
        operators, config = self._operators, self._source.config
        forward, inputs, weights = operators.products()
        accumulate, optimizer, tensor_s = operators.states(self._recipe, self._zero)
        found = Calibration(
            machine=Machine.here(self._device, self._zero.precision, config.attention_dropout > 0),
            products=forward,
            products_input=inputs,
            products_weight=weights,
            norm=operators.norm(),
            gelu=operators.gelu(),
            copy=operators.copy(),
            attention=operators.attention(),
            losses=operators.losses(),
            table=operators.table(),
            accumulate=accumulate,
            tensor_s=tensor_s,
            optimizer=optimizer,
            transport=operators.transport(self._recipe.objectives.wra),
            micro_step_s=0.0,
        )
        return found.model_copy(update={"micro_step_s": self._rest(found)})

    def _rest(self, found: Calibration) -> float:
        """What a micro-step of a tiny model takes beyond what the operations say."""
        recipe, source = self._recipe, self._source
        config: ModelConfig = with_model(source.config, **_TINY)
        planner = Planner(recipe, Source(source.lengths, source.assumed, config))
        sampler, work = Sampler(planner), planner.tasks[0]
        trial = Trial(recipe, config, sampler.objectives, self._zero, 1, self._device)
        batch = sampler.batch(work.task, 1).to(self._device)
        clock = Clock(self._device)
        took = clock.least({"step": lambda: trial.micro_step(batch)}, _ROUNDS, 0.01)["step"]
        self._tiny_s = min(self._tiny_s, took)
        costs = Costs(found, config, recipe)
        said = costs.micro_step(work.load(batch.tokens), recipe.activation_checkpointing, model_sizes(config)[0])
        return max(0.0, self._tiny_s - said.total)
