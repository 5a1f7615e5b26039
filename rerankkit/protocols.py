"""The four parts that a run is composed of. Implement one, register it, name it in a config: that is a plugin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rerankkit.types import Catalog, Outcome, RerankExample, Rollout, RunInfo, StepReport, Trace, TraceFailure

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rerankkit.lm import Policy


class Tokenizer(Protocol):
    """Turns items into semantic IDs. `fit` or `load` is called once a run, `encode` after it, never before.

    It must give an item the same SID every time it is asked, also after `save` and `load`. One that `Reconstructs` or
    `Tells` as well has more in its scorecard; neither is required.
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


class Reconstructs(Protocol):
    """A tokenizer that can say what codes stand for; called after `fit`, for the scorecard's reconstruction error."""

    def reconstruct(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        """[n, D] in the space of the embeddings, for codes [n, L] of any items."""


class Tells(Protocol):
    """A tokenizer with an account of its own: called after `encode`, shown in the scorecard under its own heading."""

    def facts(self) -> Mapping[str, float | int | str]:
        """Label -> value, in a reader's words: `{"items moved to another code": 12}`. Numbers must be finite."""


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
