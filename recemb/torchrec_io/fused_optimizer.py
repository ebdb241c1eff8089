"""The optimizers in the tables' backward, seen as one torchrec ``KeyedOptimizer``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.optim.fused import FusedOptimizer

from recemb.errors import ConfigError
from recemb.optim.adam import kind_of, make_state
from recemb.optim.attached import attached_to
from recemb.optim.attachment import Attachment

_Optimizers = Mapping[Tensor, torch.optim.Optimizer]


class CollectionOptimizer(FusedOptimizer):  # type: ignore[misc] # torchrec ships no types
    """What ``apply_optimizer_in_backward`` attached to the tables of one collection.

    A view, not a copy: ``state`` holds the attached optimizers' own tensors, and writing to a group of
    ``param_groups`` writes to the optimizers it stands for, so a learning-rate schedule around this object
    (torch's, or torchrec's ``WarmupOptimizer``) acts on the next backward. Parameters that were attached with
    equal class and settings form one group. The step itself is taken by the backward: :meth:`step` changes
    nothing.

    All state exists from the start, so that ``state_dict()`` can be loaded into before the first step, by
    ``CombinedOptimizer`` too. That one does not ask this object: it copies whatever broadcasts, such as
    row-wise Adagrad's sums [N, 1] into Adagrad's [N, D]. The exceptions are optimizers that no kernel fuses
    and that make their state as they first step (SGD with momentum, RMSprop, ...); :meth:`load_state_dict`
    makes theirs.

    Args:
        parameters: state-dict key -> parameter, each once; those without an attached optimizer are left out.
        shown: how the state of a key's parameter appears in ``state`` and ``state_dict()``, given one of its
            tensors of two dimensions: of a sharded parameter, as a sharded tensor over the same memory.

    Raises:
        ConfigError: no parameter has an attached optimizer, or one has several.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        shown: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        attached = {key: _attached(key, parameter) for key, parameter in parameters.items()}
        optimizers: dict[Tensor, torch.optim.Optimizer] = {
            parameters[key]: optimizer for key, optimizer in attached.items() if optimizer is not None
        }
        if not optimizers:
            raise ConfigError(
                "no optimizer is attached to the tables; first call "
                'apply_optimizer_in_backward(torch.optim.Adagrad, collection.parameters(), {"lr": 0.01})'
            )
        for parameter, optimizer in optimizers.items():
            # The others that are fused have theirs from the start.
            if isinstance(optimizer, torch.optim.Adam):
                make_state(optimizer, parameter)
        self._optimizers = optimizers
        params = {key: parameter for key, parameter in parameters.items() if parameter in optimizers}
        views: dict[Tensor, Callable[[Tensor], Tensor]] = {
            parameters[key]: view for key, view in (shown or {}).items() if key in params
        }
        super().__init__(params, _State(optimizers, views), _groups(optimizers))

    def step(self, closure: Callable[[], object] | None = None) -> None:
        """Change nothing: the backward has taken the step."""

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Drop gradients, of a dummy step or where no hook steps; a fused backward leaves none."""
        for parameter in self._optimizers:
            parameter.grad = None

    def init_state(self, sparse_grad_parameter_names: set[str] | None = None) -> None:
        """Change nothing: the state exists, and a dummy step would need a gradient of each table's size."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy a ``state_dict()`` into the attached optimizers' state.

        Args:
            state_dict: in torchrec's form, ``{"state": {key: {name: tensor}}}``, with ``"param_groups"`` too
                after ``save_param_groups(True)``.

        Raises:
            ConfigError: a parameter's state is missing, is another optimizer's, or has another shape, or some
                is of no parameter here; nothing has been loaded by then.
        """
        given = state_dict["state"]
        # A wrapper's own parameter among them.
        keys = {key: parameter for key, parameter in self.params.items() if parameter in self.state}
        unknown = sorted(given.keys() - keys.keys())
        if unknown:
            raise ConfigError(
                f"the optimizer state to load holds {unknown[0]}, which is no parameter of this optimizer: "
                "it is of another model"
            )
        unmade: dict[Tensor, dict[str, Any]] = {}
        for key, parameter in keys.items():
            own = self.state[parameter]
            if given.get(key) and not own and parameter in self._optimizers:
                unmade[parameter] = self._first_state(key, parameter)
                own = self.state.as_shown(parameter, unmade[parameter])
            _check_state(key, own, given.get(key))
        for parameter, state in unmade.items():
            self.state[parameter] = state
        super().load_state_dict(state_dict)

    @staticmethod
    def _first_state(key: str, parameter: nn.Parameter) -> dict[str, Any]:
        """What an optimizer that makes its state as it first steps would make."""
        attachment = Attachment.of(key, parameter)
        assert attachment is not None, "each of them has an optimizer"
        return attachment.state_of(parameter)


class _State(MutableMapping[Tensor, dict[str, Any]]):
    """Parameter -> its state, read from its optimizer each time: loading replaces an optimizer's dicts.

    A wrapper may keep something under a parameter of its own, as torchrec's ``WarmupOptimizer`` does.
    """

    def __init__(self, optimizers: _Optimizers, shown: Mapping[Tensor, Callable[[Tensor], Tensor]]) -> None:
        self._optimizers = optimizers
        self._shown = shown
        self._others: dict[Tensor, dict[str, Any]] = {}

    def __getitem__(self, key: Tensor) -> dict[str, Any]:
        if key not in self._optimizers:
            return self._others[key]
        return self.as_shown(key, self._optimizers[key].state[key])

    def as_shown(self, key: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """State of a parameter as it appears here."""
        if key not in self._shown:
            return state
        view = self._shown[key]
        return {
            name: view(value) if isinstance(value, Tensor) and value.dim() == 2 else value
            for name, value in state.items()
        }

    def __setitem__(self, key: Tensor, value: dict[str, Any]) -> None:
        if key in self._optimizers:
            self._optimizers[key].state[key] = value
        else:
            self._others[key] = value

    def __delitem__(self, key: Tensor) -> None:
        del (self._optimizers[key].state if key in self._optimizers else self._others)[key]

    def __iter__(self) -> Iterator[Tensor]:
        yield from self._optimizers
        yield from self._others

    def __len__(self) -> int:
        return len(self._optimizers) + len(self._others)


class _Group(MutableMapping[str, Any]):
    """One parameter group that stands for several optimizers' only groups: reads the first, writes to all."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers

    @property
    def _members(self) -> list[dict[str, Any]]:
        return [optimizer.param_groups[0] for optimizer in self._optimizers]

    def __getitem__(self, key: str) -> Any:
        if key == "params":
            return [parameter for member in self._members for parameter in member["params"]]
        value = self._members[0][key]
        if isinstance(value, Tensor):
            # torch's schedules write to it in place.
            self._share(key, value)
        return value

    def __setitem__(self, key: str, value: object) -> None:
        if key == "params":
            raise ConfigError("the parameters of an optimizer in the backward cannot be replaced")
        for member in self._members:
            member[key] = value

    def _share(self, key: str, value: Tensor) -> None:
        """Have every member hold this very tensor, and its defaults where they hold the member's own.

        Not one that has been given another value since.
        """
        for optimizer, member in zip(self._optimizers, self._members, strict=True):
            # Only where they differ in identity is a device asked.
            if member[key] is value or float(member[key]) != float(value):
                continue
            if optimizer.defaults.get(key) is member[key]:
                optimizer.defaults[key] = value
            member[key] = value

    def __delitem__(self, key: str) -> None:
        for member in self._members:
            del member[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members[0])

    def __len__(self) -> int:
        return len(self._members[0])


def _attached(key: str, parameter: nn.Parameter) -> torch.optim.Optimizer | None:
    optimizers = attached_to(parameter)
    if len(optimizers) > 1:
        raise ConfigError(
            f"{key} has {len(optimizers)} optimizers attached; call apply_optimizer_in_backward once for it"
        )
    return optimizers[0] if optimizers else None


def _groups(optimizers: _Optimizers) -> list[_Group]:
    found: list[tuple[tuple[object, ...], list[torch.optim.Optimizer]]] = []
    for optimizer in optimizers.values():
        current = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        # ``defaults`` are the settings as attached: two groups stay two while a schedule makes them equal.
        # Adam's step is taken in two ways, by where a parameter lies.
        key = (kind_of(optimizer), optimizer.defaults, current)
        members = next((members for other, members in found if other == key), None)
        if members is None:
            found.append((key, [optimizer]))
        else:
            members.append(optimizer)
    return [_Group(members) for _, members in found]


def _check_state(key: str, own: Mapping[str, Any], given: Mapping[str, Any] | None) -> None:
    if given is None:
        raise ConfigError(f"the optimizer state to load has nothing for {key}; it is of another model")
    if own.keys() != given.keys():
        raise ConfigError(
            f"{key}: the optimizer state to load holds {sorted(given)} and this optimizer keeps "
            f"{sorted(own)}; attach the optimizer that it was saved from"
        )
    for name, value in own.items():
        # Copying would broadcast: row-wise Adagrad's sums [N, 1] would pass for Adagrad's [N, D].
        if isinstance(value, Tensor) and value.shape != given[name].shape:
            raise ConfigError(
                f"{key}: {name} of the optimizer state to load has shape {tuple(given[name].shape)}, "
                f"not {tuple(value.shape)}; it is of another table or optimizer"
            )
