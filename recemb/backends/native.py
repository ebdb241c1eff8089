"""The way from backends to the native kernels: one call for all tables, whatever their methods."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from recemb.bags import Bags, LookupTargets
from recemb.errors import ConfigError, NonFiniteError, OutOfMemoryError
from recemb.optim import FusedUpdate
from recemb.optim.adam import step_lazily
from recemb.optim.attached import attached_to, live_hooks
from recemb.optim.attachment import check_eps
from recemb.optim.state import settings_of, version_of
from recemb_kernels.check import check_address
from recemb_kernels.digit_tree.group import ChangedError
from recemb_kernels.lookup import Ahead, Bound, Given, Lookup, TableShape, available
from recemb_kernels.native import say_once
from recemb_kernels.storage import DTYPES, StoredAs
from recemb_kernels.triton_frame import ALIGNED
from recemb_kernels.update import Step

if TYPE_CHECKING:
    from recemb.backends.base import Backend

_B = TypeVar("_B", bound="Backend")
WholeLookup: TypeAlias = Callable[[Any, Bags], Tensor | None]
_ON_GPU = (torch.float32, torch.bfloat16, torch.float16)


def owner_of(table: _B) -> _B:
    """The table that holds the storage of ``table``: itself for most."""
    return table._owner[0] if table._owner else table  # type: ignore[return-value] # peers are of one method


@dataclass
class _Prepared:
    """What is worked out once of a list of tables. Refers to them weakly: their first one remembers it.

    Attributes:
        tables: the tables, to be sure that it is still them.
        owners: position of the table that owns each storage, or of one of its peers.
        shapes: per storage, its shape as a kernel's, or ``None`` when there is no kernel for it.
        fused: per storage, its optimizers' update.
        lookup: the call for all of them, or ``None`` when there is no kernel for one.
        available: per device where it has been tried, and per storage, whether its kernel can be had.
        found: what was found out last, in training and without gradients: a model may take turns at them.
    """

    tables: list[ReferenceType[Backend]]
    owners: list[int]
    shapes: list[TableShape | None]
    fused: list[FusedUpdate]
    lookup: Lookup | None
    available: dict[torch.device, list[bool]] = field(default_factory=dict)
    found: dict[bool, _Found] = field(default_factory=dict)

    def serves(self, at: int, device: torch.device, trains: bool) -> bool:
        """Whether the kernel of storage ``at`` can be had for a device.

        All are compiled side by side when one is first asked for, which tables that no kernel reads, as those
        in float64, do not.

        Args:
            at: which storage.
            device: where it lies.
            trains: whether one of all storages is to train in kernels.
        """
        if torch.compiler.is_compiling():  # It is met, and missed, when the compiled code runs.
            return True
        if device not in self.available:
            shapes = [shape for shape in self.shapes if shape is not None]
            found = iter(available(shapes, device, trains))
            self.available[device] = [shape is not None and next(found) for shape in self.shapes]
        return self.available[device][at]


@dataclass(slots=True)
class _Found:
    """What can be done with tables as long as these facts of their parameters and optimizers hold.

    Holds no parameter that no optimizer holds: a table may be lent its weights for one look-up.

    Attributes:
        facts: what it depends on.
        hooks: and the hooks of those optimizers, which torch takes out of these dicts when they are removed;
            they are looked up once, as new ones come with an optimizer.
        native: per storage, whether the kernels can serve it.
        bound: the look-up, or ``None`` where a kernel is missing.
        served: the last whole look-up of these tables: found in what, for which features, and itself.
    """

    facts: list[object]
    hooks: list[tuple[Mapping[int, Any], int]]
    native: list[bool]
    bound: Bound | None
    served: tuple[type, LookupTargets, WholeLookup] | None = None

    def holds(self, facts: list[object]) -> bool:
        """Whether nothing has changed but learning rates."""
        # First, as what has changed of the rates alone is taken over.
        if not all(own in hooks for hooks, own in self.hooks):
            return False
        return self.facts == facts or _rates_alone_differ(self.facts, facts)


@dataclass(slots=True)
class _Storage:
    """One storage in one call: its parameters, the step they take, and whether the kernels can serve it."""

    parameters: list[nn.Parameter]
    step: Step | None
    native: bool


def pooled_native(
    tables: Sequence[Backend],
    bags: Bags,
    micro_batch_rows: int | None = None,
    joins: tuple[int, ...] = (),
) -> Tensor | None:
    """Pool F features in one call, [B, sum of D], or ``None`` where plain torch has to do it.

    A storage that serves several features, or several tables, is passed once, so that it is updated once.
    Each parameter takes the step of its own in-backward optimizer, or gets its gradient when it has none.

    Args:
        tables: ``tables[f]`` for feature f, of any methods; of one method under torch.compile.
        bags: F features.
        micro_batch_rows: distinct rows that are computed at once, which bounds the workspace of the products
            of cores; the device's default when ``None``.
        joins: per feature the earlier one whose bags it holds the rest of, or -1; empty for none. On the CPU
            rows of both are added up in that one's columns, and averaged over the ids of both.

    Raises:
        NonFiniteError: in the backward of a fused update, before any weight changes.
        OutOfMemoryError: here or in the backward; likewise.
    """
    prepared = _prepare(tables, micro_batch_rows, joins)
    if torch.compiler.is_compiling():
        return _compiled(_storages(tables, prepared), prepared.lookup, bags)
    found, stored = _now(tables, prepared)
    if found.bound is None:
        return None
    ahead, bags.ahead = bags.ahead, None  # serves once, and holds the plan
    return found.bound(stored, _given(bags), ahead)


def whole_look_up(
    tables: Sequence[Backend], given: type, targets: LookupTargets, micro_batch_rows: int | None = None
) -> WholeLookup | None:
    """What takes tables by name, and bags, through a look-up like the last one's without a line of Python.

    It gives ``None`` where something has changed or is to be said. Refers to the tables weakly.

    Args:
        tables: as of :func:`pooled_native`, which has looked them up.
        given: the type of what has them by name.
        targets: of these tables, in that order.
        micro_batch_rows: as there.

    Returns:
        It, or ``None`` where there is none: no step in C++, or other tables by name.
    """
    prepared = _prepare(tables, micro_batch_rows)
    found = prepared.found.get(torch.is_grad_enabled())
    bound = None if found is None else found.bound
    if found is None or bound is None or bound.compiled is None or given not in (dict, nn.ModuleDict):
        return None
    if found.served is not None and found.served[:2] == (given, targets):
        return found.served[2]
    features = [(target.table, ref(table)) for target, table in zip(targets, tables, strict=True)]
    owners = [ref(owner_of(tables[at])) for at in prepared.owners]
    limits = ctypes.addressof(targets.limits), targets.limits
    whole: WholeLookup = bound.compiled.serve((given, Bags), features, owners, check_address(), limits)
    found.served = given, targets, whole
    return whole


def prepare_native(
    tables: Sequence[Backend],
    bags: Callable[[], Bags],
    micro_batch_rows: int | None = None,
    joins: tuple[int, ...] = (),
) -> Ahead | None:
    """Begin to sort and group the ids of a batch beside what runs now, when the kernels can serve all tables.

    Args:
        tables: as of :func:`pooled_native`, which finds it done when that is in ``bags.ahead``.
        bags: gives them, which what runs before it there may have to make first.
        micro_batch_rows: as there.
        joins: as there.
    """
    found, stored = _now(tables, _prepare(tables, micro_batch_rows, joins))
    return None if found.bound is None else found.bound.prepare(stored, lambda: _given(bags()))


def _given(bags: Bags) -> Given:
    weights = None if bags.weights is None else bags.weights.float()
    return bags.ids, bags.offsets, weights, bags.batch_size, bags.refused


def served_natively(tables: Sequence[Backend]) -> list[bool]:
    """Per feature, whether :meth:`pooled_native` could serve its table in this step."""
    native = {
        owner_of(tables[at]): native
        for prepared in [_prepare(tables)]
        for at, native in zip(prepared.owners, _now(tables, prepared)[0].native, strict=True)
    }
    return [native[owner_of(table)] for table in tables]


def _now(tables: Sequence[Backend], prepared: _Prepared) -> tuple[_Found, list[Tensor]]:
    """What can be done with the tables in this step, and their parameters.

    A step costs more to ask every parameter what can be done with it than to see that nothing has changed.
    """
    training = torch.is_grad_enabled()
    found = prepared.found.get(training)
    owned = [owner_of(tables[at])._parameters for at in prepared.owners]
    if found is not None and found.bound is not None and found.bound.compiled is not None:
        unchanged = found.bound.compiled.unchanged(owned)
        if unchanged is not None:
            return found, unchanged
    facts: list[object] = []
    stored: list[Tensor] = []
    for parameters in owned:
        rates: list[object] = []
        for name, parameter in parameters.items():
            if parameter is None:
                continue
            stored.append(parameter)
            facts += (
                name,
                parameter.dtype,
                parameter.shape,
                parameter.device,
                parameter.data_ptr() % ALIGNED,
                parameter.is_contiguous(),
                parameter.requires_grad,
            )
            for optimizer in attached_to(parameter):
                facts += (id(parameter), optimizer)
                facts += optimizer.param_groups
                rates.append(optimizer.param_groups[0].get("lr"))
        facts.append(_equal_ones(rates))
    if found is None or not found.holds(facts):
        storages, bound = _storages(tables, prepared), None
        native = [storage.native for storage in storages]
        if prepared.lookup is not None and all(native):
            each = [storage.parameters for storage in storages]
            bound = prepared.lookup.bind(each, [storage.step for storage in storages])
        # Settings are changed in place.
        facts = [settings_of(fact) if isinstance(fact, dict) else fact for fact in facts]
        hooks = [hook for parameter in stored for hook in live_hooks(parameter)]
        if bound is not None and bound.compiled is not None:
            bound.compiled.watch(owned, hooks, ALIGNED)
        found = prepared.found[training] = _Found(facts, hooks, native, bound)
    return found, stored


def _equal_ones(rates: list[object]) -> object:
    """Which of a storage's learning rates are equal: of each, the first one that is.

    Tensors, which a GPU may hold, are not compared: of several, how often each has been written to.
    """
    if any(isinstance(rate, Tensor) for rate in rates):
        alike = all(rate is rates[0] for rate in rates)
        return alike or [version_of(rate) if isinstance(rate, Tensor) else rate for rate in rates]
    return [rates.index(rate) for rate in rates]


def _rates_alone_differ(known: list[object], facts: list[object]) -> bool:
    """Whether only learning rates have changed, which a step reads anew; brings ``known`` up to date."""
    if len(known) != len(facts):
        return False
    changed: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for old, new in zip(known, facts, strict=True):
        if old is new or old == new:
            continue
        # An optimizer stands before its settings: another one's hold parameters, which do not compare.
        if not (isinstance(old, dict) and isinstance(new, dict)) or {**old, "lr": new.get("lr")} != new:
            return False
        changed.append((old, new))
    for old, new in changed:
        old["lr"] = new["lr"]
    return True


def _compiled(storages: Sequence[_Storage], lookup: Lookup | None, bags: Bags) -> Tensor | None:
    """The look-up as an op that torch.compile knows: for tables of one method."""
    if lookup is None or not all(storage.native for storage in storages):
        return None
    if len({table.op.name for table in lookup.tables}) > 1 or any(table.stored for table in lookup.tables):
        return None
    weights = None if bags.weights is None else bags.weights.float()
    parameters = [storage.parameters for storage in storages]
    return lookup.compiled(parameters, bags.ids, bags.offsets, weights, bags.batch_size)


def _storages(tables: Sequence[Backend], prepared: _Prepared) -> list[_Storage]:
    training = torch.is_grad_enabled()
    ask = training and not torch.compiler.is_compiling()
    device, found = tables[0].device, []
    owners = [owner_of(tables[at]) for at in prepared.owners]
    parameters = [owner.own_parameters() for owner in owners]
    trains = ask and any(map(_trains_natively, owners))
    uses = Counter(id(parameter) for named in parameters for parameter in named.values())
    pairs = zip(owners, parameters, prepared.shapes, prepared.fused, strict=True)
    for k, (owner, named, shape, fused) in enumerate(pairs):
        own = list(named.values())
        # Pruned or parametrized, a table holds others than its kernel reads.
        as_built = owner.layout == tuple((name, tuple(p.shape)) for name, p in named.items())
        native = shape is not None and as_built
        kinds = (shape.stored if shape else ()) or (StoredAs.FLOAT32,) * len(own)
        for parameter, kind in zip(own, kinds, strict=True):
            # A fused update writes to the parameters: contiguous copies would take it in their place.
            readable = _fits(parameter, kind) and parameter.is_contiguous()
            native = native and readable and parameter.device == device
        native = native and prepared.serves(k, device, trains)
        # One that several tables hold has one gradient, their sum, and takes one step with it.
        alone = all(uses[id(parameter)] == 1 for parameter in own)
        step = fused.of(own) if ask and native and alone else None
        if training and step is None and owner.native_when_fused:
            native = native and not any(parameter.requires_grad for parameter in own)
        if ask:
            _leave_to_torch(owner, range(len(own)) if step is None else step.left)
        found.append(_Storage(own, step, native))
    return found


def _trains_natively(owner: Backend) -> bool:
    """Whether a kernel is to give this storage's gradients, or to step on it."""
    own = [parameter for parameter in owner.own_parameters().values() if parameter.requires_grad]
    return any(map(attached_to, own)) if owner.native_when_fused else bool(own)


def _leave_to_torch(owner: Backend, left: Container[int]) -> None:
    """No kernel steps on these parameters of a storage: Adam is to move the rows that one would.

    Raises:
        ConfigError: torch would make NaN of them. No weight has changed.
    """
    for k, (name, parameter) in enumerate(owner.own_parameters().items()):
        if k not in left:
            continue
        if parameter.requires_grad:
            check_eps(f"table {owner.table.name!r}: {name}", parameter)
        for optimizer in attached_to(parameter):
            if name not in owner.stepped_whole:
                step_lazily(optimizer)


def _prepare(
    tables: Sequence[Backend], micro_batch_rows: int | None = None, joins: tuple[int, ...] = ()
) -> _Prepared:
    """What is fixed about these tables; remembered by the first of them."""
    key, memo = (micro_batch_rows, joins, *map(id, tables)), tables[0].memo
    compiling = torch.compiler.is_compiling()
    if not compiling:
        known: _Prepared | None = memo.get(key)
        # Another table may have taken the place of one that is gone.
        if known is not None and [seen() for seen in known.tables] == list(tables):
            return known
    owners = list(dict.fromkeys(owner_of(table) for table in tables))
    index = {owner: k for k, owner in enumerate(owners)}
    features = tuple(
        x
        for table in tables
        for x in (index[owner_of(table)], int(table.table.pooling == "mean"), table.key_base)
    )
    shapes = [owner.native_shape() for owner in owners]
    for owner, shape in zip(owners, shapes, strict=True):
        if shape is None and not compiling and (reason := owner.lacks_kernel()) is not None:
            say_once(owner.table.name, reason)
    whole = tuple(shape for shape in shapes if shape is not None)
    refusal = partial(_refusal, [table.table.name for table in tables])
    first = [next(k for k, table in enumerate(tables) if owner_of(table) is owner) for owner in owners]
    served = len(whole) == len(shapes)
    lookup = Lookup(whole, features, refusal, micro_batch_rows, joins) if served else None
    seen = [] if compiling else [ref(table) for table in tables]
    made = _Prepared(seen, first, shapes, [FusedUpdate() for _ in owners], lookup)
    if not compiling:
        memo[key] = made
    return made


def _fits(parameter: Tensor, kind: StoredAs) -> bool:
    """Whether the kernels of its device can read it."""
    if parameter.is_cpu:
        return parameter.dtype is DTYPES[kind]
    return parameter.is_cuda and parameter.dtype in _ON_GPU and parameter.data_ptr() % ALIGNED == 0


def _refusal(names: Sequence[str], error: Exception) -> NonFiniteError | OutOfMemoryError | ConfigError:
    shown = ", ".join(dict.fromkeys(names[:5])) + (", ..." if len(names) > 5 else "")
    if isinstance(error, MemoryError):
        return OutOfMemoryError(f"tables {shown}: {error}")
    if isinstance(error, ChangedError):
        return ConfigError(f"tables {shown}: {error}")
    return NonFiniteError(
        f"the gradient of the pooled rows of tables {shown} is NaN or infinite; none of their weights was "
        "changed. Lower the learning rate, or look for infinite inputs or losses in this batch"
    )
