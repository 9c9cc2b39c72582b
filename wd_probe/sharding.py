"""Parameters that several processes hold in parts: the DTensors of FSDP2, tensor parallelism."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_type
from .errors import InputError, Teller

#: How long a process waits for the others to build their probe, in seconds.
PATIENCE = 60.0
#: What is held whole, in memory of its own.
PLAIN = frozenset((Tensor, nn.Parameter))
_meetings: Counter[tuple[int, ...]] = Counter()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: of an ordinary tensor, all of it."""
    if type(tensor) in PLAIN:  # asked of every tensor at every step
        return tensor
    to_local = getattr(tensor, "to_local", None)
    return tensor.detach() if to_local is None else to_local().detach()


def refuse_flat(model: nn.Module) -> None:
    """Refuse what hides the parameters, or has none.

    Raises:
        InputError: it is no module; it, or a part of it, is wrapped by FSDP1.
    """
    check_type(model, "model", nn.Module, "a torch.nn.Module")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise InputError(
            "FullyShardedDataParallel packs the parameters into flat shards, which have no layers; "
            "use its successor torch.distributed.fsdp.fully_shard"
        )


class Shards:
    """Sums numbers over the processes that hold the parts of some parameters.

    Args:
        parameters: those that may be sharded; the same ones, in the same order, on every process.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        # by mesh and the dimensions of it that cut the tensor: each such tensor's row
        self._places: dict[tuple[Any, tuple[int, ...]], dict[Tensor, int]] = {}
        for p in parameters:
            if not hasattr(p, "to_local"):
                continue
            placements: Sequence[Any] = p.placements  # type: ignore[attr-defined]
            cut = tuple(k for k, place in enumerate(placements) if not place.is_replicate())
            if cut:
                rows = self._places.setdefault((p.device_mesh, cut), {})  # type: ignore[attr-defined]
                rows[p] = len(rows)

    def __bool__(self) -> bool:
        """Whether any parameter is sharded."""
        return bool(self._places)

    def sum(self, parameters: Sequence[Tensor], rows: Tensor) -> Callable[[], Tensor]:
        """Begin to add up each sharded parameter's row over the processes that hold its parts.

        Every process must come here equally often; none waits for another before the answer is
        asked for.

        Args:
            parameters: what the rows are of.
            rows: (len(parameters), numbers), of this process's parts.

        Returns:
            A function that gives the rows of whole parameters; it waits, and communicates nothing.
        """
        import torch.distributed as dist

        begun = []
        for (mesh, cut), places in self._places.items():
            mine = [k for k, p in enumerate(parameters) if p in places]
            at = [places[parameters[k]] for k in mine]
            same = rows.device.type == mesh.device_type
            device = rows.device if same else torch.device(mesh.device_type)
            # All of them at each call, so that no process can be out of step with the others.
            block = torch.zeros(len(places), rows.shape[1], dtype=rows.dtype, device=device)
            block[at] = rows[mine].to(device)
            groups = [mesh.get_group(dim) for dim in cut]
            for group in groups[:-1]:
                dist.all_reduce(block, group=group)
            begun.append((dist.all_reduce(block, group=groups[-1], async_op=True), block, mine, at))

        def wait() -> Tensor:
            while begun:
                work, block, mine, at = begun.pop()
                work.wait()
                rows[mine] = block[at].to(rows.device)
            return rows

        return wait

    def meet(self, tell: Teller) -> None:
        """Wait until every process that holds a part has come here too.

        Raises:
            InputError: some did not within `PATIENCE` seconds.
        """
        import torch.distributed as dist

        store = dist.distributed_c10d._get_default_store()
        for mesh in {mesh: None for mesh, _ in self._places}:
            ranks = tuple(mesh.mesh.flatten().tolist())
            _meetings[ranks] += 1
            prefix = f"wd_probe/{ranks}/{_meetings[ranks]}"
            store.set(f"{prefix}/{dist.get_rank()}", "here")
            begun, missing = time.monotonic(), list(ranks)
            while missing := [rank for rank in missing if not store.check([f"{prefix}/{rank}"])]:
                waited, named = time.monotonic() - begun, ", ".join(map(str, missing))
                if waited > PATIENCE:
                    raise InputError(
                        f"the parameters are spread over {len(ranks)} processes, and rank {named} "
                        f"built no probe within {PATIENCE:g} s; build it on every rank (its "
                        "results may be read on one alone)"
                    )
                if waited > PATIENCE / 6:
                    tell(f"the probe waits for rank {named} to build one too")
                time.sleep(0.02)
