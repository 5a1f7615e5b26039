"""The policy and everything done with it: load, extend, train on packed rows, roll out groups, score, constrain."""

from __future__ import annotations

from rerankkit.lm.adapters import adapted, only_sid_rows
from rerankkit.lm.ask import ask, prompt_of
from rerankkit.lm.checkpoint import load_checkpoint, resumable_steps, save_checkpoint
from rerankkit.lm.forward import TokenLogps, group_logps, packed_logps
from rerankkit.lm.groups import update_on_groups
from rerankkit.lm.load import pretrained_policy, scratch_policy
from rerankkit.lm.meter import Work, group_work, metered, needed_flops, sequence_work, spent_on
from rerankkit.lm.permutation import AnswerMask, answer_mask
from rerankkit.lm.policy import Policy
from rerankkit.lm.reference import Reference, reference_of
from rerankkit.lm.rollout import Sample, roll_out
from rerankkit.lm.score import score_candidates, score_continuations
from rerankkit.lm.sequences import TrainSequence, document_sequence, pack, trace_sequence
from rerankkit.lm.shard import adamw, sharded, whole_weights
from rerankkit.lm.snapshot import save_snapshot
from rerankkit.lm.together import judged_rollouts
from rerankkit.lm.trie import SidTrie, beam_sids, build_trie
from rerankkit.lm.update import accumulate, apply_gradients, passes
from rerankkit.processes import share

__all__ = [
    "AnswerMask",
    "Policy",
    "Reference",
    "Sample",
    "SidTrie",
    "TokenLogps",
    "TrainSequence",
    "Work",
    "accumulate",
    "adapted",
    "adamw",
    "answer_mask",
    "apply_gradients",
    "ask",
    "beam_sids",
    "build_trie",
    "document_sequence",
    "group_logps",
    "group_work",
    "judged_rollouts",
    "load_checkpoint",
    "metered",
    "needed_flops",
    "only_sid_rows",
    "pack",
    "packed_logps",
    "passes",
    "pretrained_policy",
    "prompt_of",
    "reference_of",
    "resumable_steps",
    "roll_out",
    "save_checkpoint",
    "save_snapshot",
    "score_candidates",
    "score_continuations",
    "scratch_policy",
    "sequence_work",
    "share",
    "sharded",
    "spent_on",
    "trace_sequence",
    "update_on_groups",
    "whole_weights",
]
