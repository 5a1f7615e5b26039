from __future__ import annotations

from hypothesis import HealthCheck, given, settings

from rerankkit import Parse, RerankExample, Rollout, RunInfo, load_plugins
from rerankkit.testing.rules import RULES, RewardTrial
from rerankkit.testing.strategies import examples, groups, rollouts

EASY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@EASY
@given(examples(min_candidates=2))
def test_examples_are_whole(example: RerankExample) -> None:
    assert len(example.candidates) == len(example.relevance) >= 2
    assert len({item.sid for item in example.candidates}) == len(example.candidates)


@EASY
@given(rollouts())
def test_rollouts_hold_a_complete_permutation_whatever_was_written(rollout: Rollout) -> None:
    assert sorted(rollout.ranking.order) == list(range(len(rollout.example.candidates)))
    assert rollout.ranking.parse is not Parse.FAILED or rollout.ranking.identity


def test_all_ways_of_parsing_are_drawn() -> None:
    seen = set()

    @settings(max_examples=200, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(rollouts())
    def draw(rollout: Rollout) -> None:
        seen.add(rollout.ranking.parse)

    draw()

    assert seen == set(Parse)


@EASY
@given(groups())
def test_shipped_rewards_keep_the_pure_rules_on_anything(group: list[Rollout]) -> None:
    assert len({rollout.example.example_id for rollout in group}) == 1
    for name in ("gr2", "ndcg", "format"):
        spec = load_plugins(only="gr2").part("reward", name, "here")
        trial = RewardTrial(spec.build(spec.config(), RunInfo()), rollouts=group)
        for rule in RULES["reward"][:4]:
            rule(trial)
