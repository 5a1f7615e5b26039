"""The policy and everything done with it: load, extend, train on packed rows, roll out groups, score, constrain."""

from __future__ import annotations

from rerankkit.lm.ask import ask
from rerankkit.lm.checkpoint import load_checkpoint, save_checkpoint
from rerankkit.lm.forward import TokenLogps, group_logps, packed_logps
from rerankkit.lm.load import pretrained_policy, scratch_policy
from rerankkit.lm.permutation import AnswerMask, answer_mask
from rerankkit.lm.policy import Policy
from rerankkit.lm.rollout import Sample, roll_out
from rerankkit.lm.score import score_candidates, score_continuations
from rerankkit.lm.sequences import TrainSequence, document_sequence, pack, trace_sequence
from rerankkit.lm.trie import SidTrie, beam_sids, build_trie

__all__ = [
    "AnswerMask",
    "Policy",
    "Sample",
    "SidTrie",
    "TokenLogps",
    "TrainSequence",
    "answer_mask",
    "ask",
    "beam_sids",
    "build_trie",
    "document_sequence",
    "group_logps",
    "load_checkpoint",
    "pack",
    "packed_logps",
    "pretrained_policy",
    "roll_out",
    "save_checkpoint",
    "score_candidates",
    "score_continuations",
    "scratch_policy",
    "trace_sequence",
]
