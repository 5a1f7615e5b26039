"""FSDP: every process keeps a slice of each weight, of its gradient and of the optimizer's state (torch's fully_shard).
DeepSpeed, which does as much in another way, comes in here too, and is in `zero`.

Weights are put together layer by layer for a forward pass and taken apart again. That makes every pass an exchange, so
while a policy is sharded all processes run as many passes as the one with the most. Sampling, where processes take
unlike numbers of steps, holds the weights whole; so does everything outside training.

Trap: fully_shard works through the hooks of a module that is called, while lm/ calls the decoder and the output layer
apart. `inside` calls work as a method of the whole model, so that the hooks see one forward pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from rerankkit import processes
from rerankkit.errors import UsageError
from rerankkit.lm.forward import packed_logps
from rerankkit.lm.policy import Policy
from rerankkit.lm.sequences import TrainSequence
from rerankkit.lm.zero import disengage, engage, zero_of, zero_settings

T = TypeVar("T")
R = TypeVar("R")


def is_sharded(policy: Policy) -> bool:
    """Whether every pass is an exchange among processes, each of which trains only a slice of something."""
    zero = zero_of(policy)
    return isinstance(next(policy.model.parameters()), DTensor) or (zero is not None and zero.engine is not None)


def adamw(policy: Policy, **settings: Any) -> torch.optim.AdamW:
    """AdamW for what is trained of a policy, with these `settings` of torch's; make it within `sharded`."""
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], **settings)
    engage(policy, optimizer)
    return optimizer


@contextmanager
def sharded(policy: Policy) -> Iterator[None]:
    """Shard the policy within, where accelerate's config asks for FSDP or DeepSpeed; afterwards everybody has it whole.

    Make the optimizer inside, with `adamw`. Raises UsageError for a policy that has adapters.
    """
    fsdp = processes.count() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    deepspeed = bool(zero_settings())
    if not fsdp and not deepspeed:
        yield
        return
    if not all(parameter.requires_grad for parameter in policy.model.parameters()):
        raise UsageError(
            f"policy.lora: adapters are not trained under {'FSDP' if fsdp else 'DeepSpeed'}, which would save little: "
            "choose multi-GPU."
        )
    with torch.no_grad():  # what lm/ finds out once about a model, it must find out before a pass is an exchange
        packed_logps(policy, [[TrainSequence((0, 1), (0.0, 1.0))]])
    device = policy.device
    if fsdp:
        _shard(policy, device)
    yield
    if is_sharded(policy):
        policy.model = whole_model(policy, device)
    disengage(policy)


def _shard(policy: Policy, device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model = policy.model
    mesh = init_device_mesh(device.type, (processes.count(),))
    units = set(model._no_split_modules or ())
    for module in [m for m in model.modules() if type(m).__name__ in units]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    type(model).run_inside = _run  # the class is fully_shard's own, made for this model
    register_fsdp_forward_method(model, "run_inside")


def inside(policy: Policy, work: Callable[[], tuple[Tensor, R]]) -> tuple[Tensor, R]:
    """The loss and the record that `work` returns, run as one forward pass of the model."""
    if not is_sharded(policy):
        return work()
    if (zero := zero_of(policy)) is not None:
        return zero.inside(work)
    records: list[R] = []

    def keeping() -> Tensor:
        loss, record = work()
        records.append(record)
        return loss

    return policy.model.run_inside(keeping), records[0]


@contextmanager
def whole_weights(policy: Policy) -> Iterator[Callable[[Callable[[], T]], T]]:
    """Hold the weights whole, to sample; gives a function that runs work so. Every process must enter and leave it."""
    if not is_sharded(policy):
        yield lambda work: work()
        return
    if (zero := zero_of(policy)) is not None:
        with zero.sampling():
            yield lambda work: work()
        return
    from torch.distributed.fsdp import FSDPModule

    units = [module for module in policy.model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    yield policy.model.run_inside
    for unit in units:
        unit.reshard()
        unit.set_reshard_after_forward(unit is not policy.model, recurse=False)


@contextmanager
def whole_state(policy: Policy, optimizer: torch.optim.Optimizer) -> Iterator[dict[str, Any]]:
    """The optimizer's state as without DeepSpeed, and within every weight as well; all processes must enter."""
    zero = zero_of(policy)
    if zero is None or zero.engine is None:
        yield optimizer.state_dict()
        return
    state = zero.state_dict()
    with zero.whole():
        yield state


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from all processes' slices, if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, cut as `other` is, if that one is sharded and of the same shape."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


def _run(model: Any, work: Callable[[], T]) -> T:
    return work()


def whole_model(policy: Policy, device: torch.device) -> Any:
    """An ordinary model with the weights of a sharded policy; every process must call it."""
    zero = zero_of(policy)
    with zero.whole() if zero is not None else nullcontext():
        return _whole(policy.model, device)


def _whole(model: Any, device: torch.device) -> Any:
    """An ordinary model with the weights of a sharded one."""
    auto: Any = transformers.AutoModelForCausalLM
    weights = {name: whole(tensor.detach()) for name, tensor in model.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        plain = auto.from_config(model.config, dtype=next(iter(weights.values())).dtype, attn_implementation="sdpa")
    plain.load_state_dict(weights)
    plain.generation_config = model.generation_config
    return plain.to(device).eval()
