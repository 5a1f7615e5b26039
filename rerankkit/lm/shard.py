"""FSDP: every process keeps a slice of each weight, of its gradient and of the optimizer's state (torch's fully_shard).

Weights are put together layer by layer for a forward pass and taken apart again. That makes every pass an exchange, so
while a policy is sharded all processes run as many passes as the one with the most. Sampling, where processes take
unlike numbers of steps, holds the weights whole; so does everything outside training.

Trap: fully_shard works through the hooks of a module that is called, while lm/ calls the decoder and the output layer
apart. `inside` calls work as a method of the whole model, so that the hooks see one forward pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

T = TypeVar("T")


def is_sharded(policy: Policy) -> bool:
    """Whether this process holds only a slice of the policy's weights."""
    return isinstance(next(policy.model.parameters()), DTensor)


@contextmanager
def sharded(policy: Policy) -> Iterator[None]:
    """Shard the policy within, where accelerate's config asks for FSDP; afterwards every process has it whole.

    Make the optimizer inside, from the sharded weights. Raises UsageError for a policy that has adapters.
    """
    if processes.count() == 1 or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        yield
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model, device = policy.model, policy.device
    if not all(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(
            "policy.lora: adapters are not trained under FSDP, which would save little: choose multi-GPU without FSDP."
        )
    with torch.no_grad():  # what lm/ finds out once about a model, it must find out before a pass is an exchange
        packed_logps(policy, [[TrainSequence((0, 1), (0.0, 1.0))]])
    mesh = init_device_mesh(device.type, (processes.count(),))
    units = set(model._no_split_modules or ())
    for module in [m for m in model.modules() if type(m).__name__ in units]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    type(model).run_inside = _run  # the class is fully_shard's own, made for this model
    register_fsdp_forward_method(model, "run_inside")
    yield
    policy.model = _whole(model, device)


def inside(policy: Policy, work: Callable[[], T], result: Callable[[T], Tensor]) -> T:
    """What `work` returns, run as one forward pass of the model; `result` picks the tensor that has the gradient."""
    if not is_sharded(policy):
        return work()
    found: list[T] = []

    def keeping() -> Tensor:
        found.append(work())
        return result(found[0])

    policy.model.run_inside(keeping)
    return found[0]


@contextmanager
def whole_weights(policy: Policy) -> Iterator[Callable[[Callable[[], T]], T]]:
    """Hold the weights whole, to sample; gives a function that runs work so. Every process must enter and leave it."""
    if not is_sharded(policy):
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


def _whole(model: Any, device: torch.device) -> Any:
    """An ordinary model with the weights of a sharded one."""
    auto: Any = transformers.AutoModelForCausalLM
    weights = {name: whole(tensor.detach()) for name, tensor in model.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        plain = auto.from_config(model.config, dtype=next(iter(weights.values())).dtype, attn_implementation="sdpa")
    plain.load_state_dict(weights)
    plain.generation_config = model.generation_config
    return plain.to(device).eval()
