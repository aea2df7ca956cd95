"""New weights on their way into the model: each named parameter once, none forgotten."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from azr_async.errors import WeightsError


class Installation:
    """Overwrites parameters in place, by name; tied parameters may come under any of their names."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._missing: set[int] = set()

    def begin(self) -> None:
        """From now on every parameter counts as missing."""
        self._missing = {parameter.data_ptr() for parameter in self._parameters.values()}

    @torch.no_grad()
    def install(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Raises WeightsError when the model has no such parameter, or one of another shape."""
        for name, tensor in tensors:
            self._install(name, tensor)

    def finish(self, version: int) -> None:
        """Raises WeightsError when a parameter did not come."""
        names = [name for name, parameter in self._parameters.items() if parameter.data_ptr() in self._missing]
        if names:
            raise WeightsError(
                f"version {version} came without {len(names)} parameters, among them {names[0]}. "
                "Start every program of a run from the same model.path."
            )

    def _install(self, name: str, tensor: Tensor) -> None:
        parameter = self._parameters.get(name)
        if parameter is None or parameter.shape != tensor.shape:
            has = "no such parameter" if parameter is None else f"shape {tuple(parameter.shape)}"
            raise WeightsError(
                f"the learner sent {name} of shape {tuple(tensor.shape)}, but the engine's model has {has}. "
                "Start every program of a run from the same model.path."
            )
        parameter.copy_(tensor)
        self._missing.discard(parameter.data_ptr())
