"""The four parts that a run is composed of. Implement one, register it, name it in a config: that is a plugin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rerankkit.types import Catalog, Outcome, RerankExample, Rollout, RunInfo, StepReport, Trace, TraceFailure

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rerankkit.lm import Policy


class Tokenizer(Protocol):
    """Turns items into semantic IDs. `fit` or `load` is called once a run, `encode` after it, never before.

    It must give an item the same SID every time it is asked, also after `save` and `load`.
    """

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes at each level, coarse to fine."""

    def fit(self, catalog: Catalog) -> None:
        """Learn the codebooks from the catalogue."""

    def encode(self, catalog: Catalog) -> NDArray[np.int64]:
        """Codes [N, L] for the N items of `catalog`; column l lies in `range(codebook_sizes[l])`.

        Items it was not fitted on come later, alone or among the others: they must change nobody's SID, and should
        take none that is taken.
        """

    def save(self, folder: Path) -> None:
        """Write whatever `load` needs into an existing, empty folder. No pickles."""

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote."""


class Teacher(Protocol):
    """Writes reasoning traces. Called once with every example that has no trace yet; answers in any order.

    It must answer every example exactly once, with a trace or a failure, and must not raise for a bad reply.
    """

    def write(self, examples: Sequence[RerankExample], info: RunInfo) -> Iterator[Trace | TraceFailure]:
        """Yield each answer as soon as it is there: what was yielded is safe if the run is killed."""


class RewardFn(Protocol):
    """Judges rollouts: a pure function of the records, called once a step with whole groups.

    It must not depend on row order, must not change its input, and says `Failed` rather than 0 when it cannot judge.
    """

    def __call__(self, rollouts: Sequence[Rollout]) -> Sequence[Outcome]:
        """One outcome for each rollout, in order."""


class PolicyOptimizer(Protocol):
    """Improves the policy in place by reinforcement. It owns its loop, and reports every step.

    Called once a run; with `info.work` it must continue from its own last checkpoint as if never stopped.
    """

    def optimize(
        self, policy: Policy, examples: Sequence[RerankExample], reward: RewardFn, info: RunInfo
    ) -> Iterator[StepReport]:
        """Yield one report a step; the policy is final when the iterator ends."""
