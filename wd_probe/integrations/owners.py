"""The model that an optimizer steps, found among everything that is alive."""

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim import Optimizer

from ..layering import Layer, Layers, blocks, clean_name, layers, named_parameters, unwrap

#: Two models of one layer each, as a GAN's may be, stay two.
_PAIR = 2


@dataclass(frozen=True, slots=True)
class Owner:
    """What owns an optimizer's parameters, and what they are called.

    Attributes:
        root: the smallest module that owns them all; those of one root are measured together.
        model: the outermost one that holds it, in which the names are looked up.
        title: the class of the root, or of those that own them together.
        parameters: those of the root, by the model's names.
        layers: of these, as timm groups them, else by block.
        stages: the same in fewer, larger parts.
    """

    root: nn.Module
    model: nn.Module
    title: str
    parameters: Mapping[str, Tensor]
    layers: Layers
    stages: Layers


class _Together(nn.Module):
    """Holds what no module of the script's holds together."""


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Those that an optimizer steps, in its order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def find_owner(optimizer: Optimizer) -> Owner:
    """The owner of an optimizer's parameters.

    No object is asked for anything but its type, since a lazy one would wake up.
    """
    alive = _Alive()
    wanted = {id(p) for p in parameters_of(optimizer)}
    root = alive.smallest(wanted)
    if root is None:
        return _owned_together(alive, optimizer)
    root = alive.with_those_beside(root)
    return _owner_in(root, alive.outermost(root))


class _Alive:
    """Every module and optimizer that there is."""

    def __init__(self) -> None:
        kinds: dict[type, str] = {}
        self.optimizers: list[Optimizer] = []
        self.modules: dict[int, nn.Module] = {}
        for item in gc.get_objects():
            kind = type(item)
            what = kinds.get(kind)
            if what is None:
                what = kinds[kind] = _kind_of(kind)
            if what == "module":
                self.modules[id(item)] = item
            elif what == "optimizer":
                self.optimizers.append(item)
        self.children = {number: _children(one) for number, one in self.modules.items()}
        self.parents: dict[int, list[nn.Module]] = {}
        for number, children in self.children.items():
            for child in children:
                self.parents.setdefault(id(child), []).append(self.modules[number])
        self._held: dict[int, frozenset[int]] = {}

    def held(self, module: nn.Module) -> frozenset[int]:
        """The numbers of a module's parameters, of its children's too."""
        number = id(module)
        if number not in self._held:
            self._held[number] = frozenset()  # of a module that holds itself
            own = (id(p) for p in _part(module, "_parameters") if p is not None)
            inside = (p for child in self.children.get(number, ()) for p in self.held(child))
            self._held[number] = frozenset((*own, *inside))
        return self._held[number]

    def smallest(self, wanted: set[int]) -> nn.Module | None:
        """The smallest module that owns these parameters, the outermost of those alike."""
        if not wanted:
            return None
        owning = [one for one in self.modules.values() if self.held(one) >= wanted]
        least = min((len(self.held(one)) for one in owning), default=0)
        alike = [one for one in owning if len(self.held(one)) == least]
        outside = [one for one in alike if not any(self._holds(other, one) for other in alike)]
        return min(outside or alike, key=self._order, default=None)

    def with_those_beside(self, root: nn.Module) -> nn.Module:
        """What owns the parameters of several optimizers: where they overlap, or have a leaf each.

        So do Muon and the AdamW beside it, and an optimizer for every tensor or layer.
        """
        within, leaves, around = self.held(self.outermost(root)), [], [root]
        for optimizer in self.optimizers:
            wanted = _numbers(optimizer)
            found = self.smallest(wanted) if wanted and wanted <= within else None
            if found is None:
                continue
            if not self.children.get(id(found)):
                leaves.append((found, len(wanted)))
            elif self.held(found) > self.held(root):
                around.append(found)
        several = {id(one) for one, _ in leaves}
        is_one_of_many = len(several) > _PAIR or all(count == 1 for _, count in leaves)
        if id(root) in several and len(several) > 1 and is_one_of_many:
            joined = self.smallest({p for one, _ in leaves for p in self.held(one)})
            around += [] if joined is None else [joined]
        return max(around, key=lambda one: len(self.held(one)))

    def outermost(self, root: nn.Module) -> nn.Module:
        """The module that holds it and is held by none."""
        tops, seen, ahead = [], {id(root)}, [root]
        while ahead:
            one = ahead.pop()
            parents = self.parents.get(id(one), ())
            if not parents:
                tops.append(one)
            for parent in parents:
                if id(parent) not in seen:
                    seen.add(id(parent))
                    ahead.append(parent)
        return min(tops, key=self._order, default=root)

    def _holds(self, outer: nn.Module, inner: nn.Module) -> bool:
        return outer is not inner and any(one is inner for one in self._inside(outer))

    def _inside(self, module: nn.Module) -> Iterator[nn.Module]:
        seen, ahead = {id(module)}, [module]
        while ahead:
            one = ahead.pop()
            yield one
            new = [c for c in self.children.get(id(one), ()) if id(c) not in seen]
            seen.update(map(id, new))
            ahead += new

    def _order(self, module: nn.Module) -> tuple[Any, ...]:
        """Traced copies last, and of others the plainest first."""
        size = sum(1 for _ in self._inside(module))
        kind = type(module)
        return isinstance(module, GraphModule), size, kind.__module__, kind.__qualname__


def _numbers(optimizer: Optimizer) -> set[int]:
    groups = _attribute(optimizer, "param_groups")  # of a shell around another there are none
    return {id(p) for group in groups or () for p in group["params"]}


_bases = type.__dict__["__mro__"].__get__


def _kind_of(kind: type) -> str:
    bases = _bases(kind)
    if nn.Module in bases:
        return "" if kind is _Together else "module"
    return "optimizer" if Optimizer in bases else ""


def _attribute(item: Any, name: str) -> Any:
    """An attribute of the object's own, without running any code of its class."""
    try:
        return object.__getattribute__(item, "__dict__").get(name)
    except AttributeError:
        return None


def _part(module: nn.Module, name: str) -> Iterable[Any]:
    found = _attribute(module, name)
    return found.values() if isinstance(found, dict) else ()


def _children(module: nn.Module) -> list[nn.Module]:
    return [one for one in _part(module, "_modules") if nn.Module in _bases(type(one))]


# --- names and layers -----------------------------------------------------------------------------


def _owner_in(root: nn.Module, model: nn.Module) -> Owner:
    own = {id(p) for p in root.parameters()}
    named = {name: p for name, p in named_parameters(model) if id(p) in own}
    title = type(unwrap(root)).__name__
    return Owner(root, model, title, named, *_layers_of(root, model, named))


def _owned_together(alive: _Alive, optimizer: Optimizer) -> Owner:
    """Where no module owns all: each that owns some, and the rest by its place in the optimizer."""
    together, taken = _Together(), set[int]()
    params = parameters_of(optimizer)
    for p in params:
        holder = alive.smallest({id(p)}) if id(p) not in taken else None
        if holder is not None:
            outermost = alive.outermost(holder)
            taken |= alive.held(outermost)
            together._modules[_free(type(outermost).__name__, together)] = outermost
    titles = list(together._modules)
    for number, group in enumerate(optimizer.param_groups):
        place = nn.Module()
        for k, p in enumerate(group["params"]):
            if id(p) not in taken:
                place._parameters[str(k)] = p
        if place._parameters:
            together._modules[_free(f"group{number}", together)] = place
    wanted = {id(p) for p in params}
    named = {name: p for name, p in named_parameters(together) if id(p) in wanted}
    title = " and ".join(titles) or f"{len(named)} tensors"
    by_block, by_stage = blocks(together), layers(together, coarse=True)
    return Owner(together, together, title, named, _only(by_block, named), _only(by_stage, named))


def _free(name: str, holder: nn.Module) -> str:
    names = (name, *(f"{name}{k}" for k in range(2, len(holder._modules) + 3)))
    return next(one for one in names if one not in holder._modules)


def _layers_of(
    root: nn.Module, model: nn.Module, named: Mapping[str, Tensor]
) -> tuple[Layers, Layers]:
    """As timm groups them, where the root is timm's or a shell around it; else by block."""
    inner = _innermost(root)
    if hasattr(inner, "group_matcher"):
        found = layers(inner)
        if found.definition == "timm":
            prefix = _prefix_of(inner, model)
            stages = layers(inner, coarse=True)
            return _under(found, prefix), _under(stages, prefix)
    prefix = _prefix_of(inner, model)
    return _only(blocks(model), named), _under(layers(inner, coarse=True), prefix)


def _innermost(root: nn.Module) -> nn.Module:
    """What a shell such as a LightningModule is around: the one child that owns everything."""
    inner = unwrap(root)
    while not hasattr(inner, "group_matcher"):
        everything = {id(p) for p in inner.parameters()}
        child = next(
            (c for c in inner.children() if {id(p) for p in c.parameters()} == everything), None
        )
        if child is None:
            break
        inner = unwrap(child)
    return inner


def _prefix_of(inner: nn.Module, model: nn.Module) -> str:
    name = next(name for name, module in model.named_modules() if module is inner)
    found = clean_name(f"{name}.weight" if name else "weight", model)
    return found.removesuffix("weight")


def _under(found: Layers, prefix: str) -> Layers:
    return Layers(
        (
            Layer(one.index, f"{prefix}{one.name}", tuple(f"{prefix}{n}" for n in one.parameters))
            for one in found
        ),
        found.definition,
    )


def _only(found: Layers, named: Iterable[str]) -> Layers:
    """The layers that hold some of these parameters, with those alone."""
    wanted = set(named)
    kept: Sequence[tuple[str, tuple[str, ...]]] = [
        (one.name, held)
        for one in found
        if (held := tuple(name for name in one.parameters if name in wanted))
    ]
    return Layers(
        (Layer(k, name, held) for k, (name, held) in enumerate(kept, start=1)), found.definition
    )


def with_more(found: Layers, model: nn.Module, names: Iterable[str]) -> Layers:
    """Layers with parameters that have joined: in the block that has some of them, else behind."""
    parts = [(one.name, one.parameters) for one in found]
    place = {name: k for k, one in enumerate(found) for name in one.parameters}
    for block in _only(blocks(model), names):
        new = tuple(name for name in block.parameters if name not in place)
        k = next((place[name] for name in block.parameters if name in place), None)
        if k is not None:
            parts[k] = (parts[k][0], (*parts[k][1], *new))
        elif new:
            parts.append((block.name, new))
    return Layers((Layer(k, *part) for k, part in enumerate(parts, start=1)), found.definition)


def is_sharded(optimizer: Optimizer) -> bool:
    """Whether other processes hold parts of what it steps."""
    return any(type(p) is not Tensor and hasattr(p, "to_local") for p in parameters_of(optimizer))
