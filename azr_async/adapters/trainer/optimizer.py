"""AdamW as the learner uses it, and its state under names that a checkpoint can hold."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from azr_async.adapters.trainer.sharding import from_first, scattered
from azr_async.config import LearnerConfig
from azr_async.errors import TrainingError

MOMENTS: Final = ("exp_avg", "exp_avg_sq")
STATE: Final = ("step", *MOMENTS)


def adamw(model: nn.Module, learner: LearnerConfig) -> torch.optim.AdamW:
    """Loshchilov & Hutter 2019, arXiv:1711.05101; one group, so weight decay is the same for every weight."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=learner.learning_rate,
        betas=learner.betas,
        weight_decay=learner.weight_decay,
        fused=True,
    )


def warm_up(optimizer: torch.optim.Optimizer, learner: LearnerConfig, version: int) -> float:
    """Set the learning rate of the step that starts at `version`: a linear rise, then constant. Returns it."""
    share = min(1.0, (version + 1) / learner.warmup_steps) if learner.warmup_steps else 1.0
    for group in optimizer.param_groups:
        group["lr"] = learner.learning_rate * share
    return learner.learning_rate * share


def flat_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The state as `<weight>/<step, exp_avg or exp_avg_sq>`; empty before the first step."""
    return {
        f"{name}/{key}": optimizer.state[parameter][key]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for key in STATE
    }


def restore_state(optimizer: torch.optim.Optimizer, model: nn.Module, flat: Mapping[str, Tensor]) -> None:
    """Take up `flat_state` again; an empty one is that of a fresh optimizer.

    Collective when the weights are sharded: then it is rank 0's `flat` that counts.

    Raises:
        TrainingError: it is the state of another model.
    """
    parameters = dict(model.named_parameters())
    misfit = next((name for name, parameter in parameters.items() if not _fits(name, parameter, flat)), None)
    # What rank 0 finds, the others have to know before they join in.
    verdict = from_first(torch.tensor([bool(flat), misfit is not None]), model)
    if not verdict[0]:
        return
    if verdict[1]:
        raise TrainingError(
            f"the optimizer state of the checkpoint does not fit {misfit or 'the model'}. Resume with the model that "
            "wrote the checkpoint, or start a new run from its folder with --model."
        )
    for name, parameter in parameters.items():
        step = flat.get(f"{name}/step", torch.zeros(()))
        optimizer.state[parameter] = {
            "step": from_first(step.to(parameter.device, copy=True), model),
            **{key: scattered(flat.get(f"{name}/{key}"), parameter) for key in MOMENTS},
        }


def _fits(name: str, parameter: Tensor, flat: Mapping[str, Tensor]) -> bool:
    state = [flat.get(f"{name}/{key}") for key in STATE]
    return all(value is not None for value in state) and flat[f"{name}/exp_avg"].shape == parameter.shape
