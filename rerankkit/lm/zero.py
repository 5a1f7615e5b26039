"""DeepSpeed: ZeRO's stages 1 to 3, for who has a config that asks for it (Rajbhandari et al. 2020, 1910.02054).

Stage 1 shares out the optimizer's state among the processes, 2 the gradients as well, 3 the weights as well. The loops
stay ours: they fill in a batch pass by pass, and the engine reduces, clips and steps. As under FSDP every pass is an
exchange, so that all processes run as many. Of DeepSpeed's settings the block `zero_optimization` counts; precision,
schedule, clipping and batch are the run's own.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rerankkit import processes
from rerankkit.errors import UsageError
from rerankkit.lm.policy import Policy

T = TypeVar("T")
R = TypeVar("R")
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each weight."""


def require_deepspeed() -> None:
    """Raise UsageError where a config asks for DeepSpeed and it is not there."""
    if find_spec("deepspeed") is None:
        raise UsageError(
            "accelerate's config asks for DeepSpeed, which is not installed: pip install deepspeed; or choose FSDP, "
            "which needs nothing more, or multi-GPU."
        )


def zero_settings() -> dict[str, Any]:
    """`zero_optimization` of the config that accelerate's launcher hands on; empty without, and for stage 0."""
    if processes.count() == 1 or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return {}
    from accelerate.utils import DeepSpeedPlugin

    settings: dict[str, Any] = DeepSpeedPlugin().deepspeed_config.get("zero_optimization", {})
    return {key: value for key, value in settings.items() if value != "auto"} if settings.get("stage") else {}


@dataclass(eq=False)
class Zero:
    """A policy and its optimizer, in DeepSpeed's hands from the first pass on; until then both are ordinary."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    settings: dict[str, Any]
    engine: Any = None
    _parameters: list[nn.Parameter] = field(default_factory=list)
    _sizes: list[int] = field(default_factory=list)

    @property
    def shards_weights(self) -> bool:
        """Whether a process now holds only its slice of each weight."""
        return self.engine is not None and self.settings["stage"] == 3

    def start(self, one_pass: Callable[[], tuple[Tensor, object]]) -> None:
        """Hand both over, with what a checkpoint put into them. `one_pass` gives any loss, and a record."""
        if self.engine is not None:
            return
        deepspeed: Any = import_module("deepspeed")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        groups = self.optimizer.param_groups
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self._sizes = [len(group["params"]) for group in groups]
        saved = self.optimizer.state_dict()["state"]
        self.optimizer.state.clear()
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "steps_per_print": sys.maxsize,
            "zero_optimization": self.settings,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        root = _Root(self.policy.model)
        for parameter in self.policy.model.get_output_embeddings().parameters():
            deepspeed.zero.register_external_parameter(root, parameter)  # `Policy.logits` works around the hooks
        with redirect_stdout(sys.stderr):  # stdout is for results
            self.engine, *_ = deepspeed.initialize(model=root, optimizer=self.optimizer, config=config)
        if saved:
            self._restore(saved, one_pass)

    def _restore(self, saved: dict[int, dict[str, Any]], one_pass: Callable[[], tuple[Tensor, object]]) -> None:
        """Put AdamW's moments into the shares, which are not there before a step: so take one that changes nothing."""
        put: Any = import_module("deepspeed.utils").safe_set_full_optimizer_state
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.boundary(True)
        self.backward(0 * self.inside(one_pass)[0])
        self.step(1.0)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for index, parameter in enumerate(self._parameters):
            for name in MOMENTS:
                put(parameter, saved[index][name].to(parameter.device), name)
        for state in self.optimizer.state.values():
            state["step"].fill_(float(saved[0]["step"]))

    def state_dict(self) -> dict[str, Any]:
        """What AdamW's own would be without DeepSpeed; every process must call it."""
        get: Any = import_module("deepspeed.utils").safe_get_full_optimizer_state
        step = next(iter(self.optimizer.state.values()))["step"]
        state = {
            index: {"step": step.clone(), **{name: get(p, name).clone() for name in MOMENTS}}
            for index, p in enumerate(self._parameters)
        }
        groups, index = [], 0
        for group, size in zip(self.optimizer.param_groups, self._sizes, strict=True):
            groups.append({**group, "params": list(range(index, index + size))})
            index += size
        return {"state": state, "param_groups": groups}

    def boundary(self, last: bool) -> None:
        """Before each pass: whether it is the last before a step."""
        self.engine.set_gradient_accumulation_boundary(last)

    def inside(self, work: Callable[[], tuple[Tensor, R]]) -> tuple[Tensor, R]:
        """The loss and the record that `work` returns, run as one forward pass of the model."""
        records: list[R] = []

        def keeping() -> Tensor:
            loss, record = work()
            records.append(record)
            return loss

        return self.engine(keeping), records[0]

    def backward(self, loss: Tensor) -> None:
        """Add to the gradient, which is the mean of the processes' gradients."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, max_grad_norm: float) -> float:
        """Clip, step, and clear the gradient; its length before clipping. One that is not finite is no step."""
        self.engine.optimizer.clip_grad = max_grad_norm
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Every weight whole within, in every process, to look at."""
        deepspeed: Any = import_module("deepspeed")
        parameters = list(self.policy.model.parameters()) if self.shards_weights else []
        with deepspeed.zero.GatheredParameters(parameters) if parameters else nullcontext():
            yield

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Every weight whole within, and the model an ordinary one, so that processes may run as they like."""
        if not self.shards_weights:
            yield
            return
        offload = self.engine.optimizer.parameter_offload
        with self.whole():
            for hooks in (offload.forward_hooks, offload.backward_hooks):
                for hook in hooks:
                    hook.remove()
                hooks.clear()
            for parameter in self.policy.model.parameters():
                parameter.ds_active_sub_modules.clear()
            yield
            offload._register_deepspeed_module(offload.module)


class _Root(nn.Module):
    """What DeepSpeed takes for the model: a forward pass is whatever is done with the model inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], T]) -> T:
        return work()


_ZEROS: WeakKeyDictionary[Policy, Zero] = WeakKeyDictionary()


def engage(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Have DeepSpeed train the policy, if accelerate's config asks for it."""
    if settings := zero_settings():
        _ZEROS[policy] = Zero(policy, optimizer, settings)


def zero_of(policy: Policy) -> Zero | None:
    """Who trains the policy, if DeepSpeed does."""
    return _ZEROS.get(policy)


def disengage(policy: Policy) -> None:
    """Let go of a policy, whose weights must have been taken out."""
    zero = _ZEROS.pop(policy, None)
    if zero is not None and zero.engine is not None:
        zero.engine.destroy()
