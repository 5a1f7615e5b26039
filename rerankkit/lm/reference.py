"""The policy as it was when reinforcement began: what a KL term measures the distance from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rerankkit.lm.policy import Policy
from rerankkit.lm.shard import inside, sharded


class Reference:
    """Frozen weights beside a policy that is being trained."""

    def __init__(self, policy: Policy, kept: Policy | None) -> None:
        """`kept` has the weights; None: they are the policy's own without its adapters."""
        self._policy = policy
        self._kept = kept

    def __call__(self, work: Callable[[Policy], Tensor]) -> Tensor:
        """What `work` makes of the reference, without gradient."""
        with torch.no_grad():
            if self._kept is None:
                with _adapters_off(self._policy):
                    return work(self._policy)
            kept = self._kept
            return inside(kept, lambda: (work(kept), None))[0]


@contextmanager
def reference_of(policy: Policy) -> Iterator[Reference]:
    """A reference with the policy's weights as they are now: enter it before training, and before a checkpoint is read.

    It costs the memory of another set of weights (no gradients, no optimizer state), sharded where the policy is. A
    policy with adapters costs nothing: without them it is what it was, as long as they were fresh.
    """
    if not all(parameter.requires_grad for parameter in policy.model.parameters()):
        yield Reference(policy, None)
        return
    kept = Policy(
        copy.deepcopy(policy.model).eval(),
        policy.text_tokenizer,
        style=policy.style,
        surface=policy.surface,
        codebook_sizes=policy.codebook_sizes,
        thinks=policy.thinks,
    )
    with sharded(kept):
        yield Reference(policy, kept)


@contextmanager
def _adapters_off(policy: Policy) -> Iterator[None]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [m for m in policy.model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
