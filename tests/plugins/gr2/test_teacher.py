"""The two sampling strategies, with a backend that answers by the book."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rerankkit.text.prompts import PromptStyle
from rerankkit.types import RunInfo, SidSurface, Trace, TraceFailure
from rerankkit_gr2.asks import Failure, Reply, Request, derived_seed, read_reply
from rerankkit_gr2.teacher import RejectionSampling, Targeted, acceptance_by_position

from .conftest import example

INFO = RunInfo(seed=7)
LAST = (0.0, 0.0, 1.0)


class Scripted:
    """Answers each request by a rule, last request first; remembers what it was asked."""

    def __init__(self, rule: Callable[[Request], Reply | Failure | None]) -> None:
        self.rule = rule
        self.asked: list[Request] = []

    def ask(self, requests: Sequence[Request], info: RunInfo) -> Iterator[tuple[int, Reply | Failure]]:
        self.asked += requests
        for i in reversed(range(len(requests))):
            reply = self.rule(requests[i])
            if reply is not None:
                yield i, reply


def test_rejection_keeps_the_first_reply_that_finds_the_target() -> None:
    third = derived_seed(7, "e1", 2)
    backend = Scripted(lambda r: Reply(f"try {r.seed}", (2, 0, 1) if r.seed == third else (0, 1, 2)))
    (trace,) = RejectionSampling(backend, samples=5).write([example(LAST)], INFO)
    assert isinstance(trace, Trace) and trace.order == (2, 0, 1) and trace.reasoning == f"try {third}"
    assert trace.provenance == {"strategy": "rejection", "attempt": "3", "target_position": "2"}
    assert len(backend.asked) == 3 and not any(request.reveal_target for request in backend.asked)


def test_rejection_gives_up_after_samples() -> None:
    replies = iter([Reply("x", (0, 1, 2)), Failure("timeout"), Reply("x", (1, 0, 2))])
    (failure,) = RejectionSampling(Scripted(lambda _: next(replies)), samples=3).write([example(LAST)], INFO)
    assert failure == TraceFailure("e1", "rejected: 2 of 3 replies put another candidate first; timeout", 3)


def test_targeted_tells_the_answer_and_puts_it_first() -> None:
    backend = Scripted(lambda _: Reply("because", (1, 2, 0)))
    (trace,) = Targeted(backend).write([example(LAST)], INFO)
    assert isinstance(trace, Trace) and trace.order == (2, 1, 0)
    assert backend.asked[0].reveal_target and "next purchase was" in backend.asked[0].messages[1]["content"]


def test_teachers_are_asked_at_full_length() -> None:
    backend = Scripted(lambda _: Failure("no"))
    list(Targeted(backend, style=PromptStyle(terse=True, knowledge=False)).write([example(LAST)], INFO))
    system = backend.asked[0].messages[0]["content"]
    assert "JSON" in system and "shampoo" not in system


def test_every_example_is_answered_exactly_once() -> None:
    examples = [example(LAST, "a"), example((0.0, 0.0), "b"), example((1.0, 0.0), "c"), example(LAST, "d")]

    def rule(request: Request) -> Reply | Failure | None:
        return {"a": Reply("x", (2, 0, 1)), "c": Failure("garbage"), "d": None}[request.example.example_id]

    for teacher in (RejectionSampling(Scripted(rule), samples=2), Targeted(Scripted(rule))):
        answers = {answer.example_id: answer for answer in teacher.write(examples, INFO)}
        assert sorted(answers) == ["a", "b", "c", "d"]
        assert [isinstance(answers[k], Trace) for k in "abcd"] == [True, False, False, False]
        reasons = [answer.reason for k in "bcd" if isinstance(answer := answers[k], TraceFailure)]
        assert "nothing to teach" in reasons[0] and "garbage" in reasons[1] and "no answer" in reasons[2]


def test_answers_do_not_depend_on_company() -> None:
    def rule(request: Request) -> Reply:
        return Reply(str(request.seed), (2, 0, 1) if request.seed % 3 == 0 else (0, 1, 2))

    examples = [example(LAST, f"e{i}") for i in range(20)]
    teacher = RejectionSampling(Scripted(rule), samples=4)
    together = {answer.example_id: answer for answer in teacher.write(examples, INFO)}
    alone = {answer.example_id: answer for one in examples[::-3] for answer in teacher.write([one], INFO)}
    assert all(together[k] == answer for k, answer in alone.items())
    assert {type(answer) for answer in together.values()} == {Trace, TraceFailure}


def test_acceptance_is_counted_by_target_position() -> None:
    examples = [example(LAST, "a"), example(LAST, "b"), example((1.0, 0.0), "c"), example((0.0, 0.0), "d")]
    answers = [Trace("a", "", (2, 0, 1)), TraceFailure("b", ""), Trace("c", "", (0, 1)), TraceFailure("d", "")]
    assert acceptance_by_position(examples, answers) == {0: (1, 1), 2: (1, 2)}


def test_replies_of_language_models_are_unwrapped() -> None:
    surface = SidSurface()
    request = Request(example(LAST), PromptStyle(), surface, 1.0, 0)
    sids = [surface.text((0, i)) for i in (2, 0, 1)]
    listed = ", ".join(f'"{sid}"' for sid in sids)
    body = f'{{"explanation": "Fits <|im_end|> {sids[0]}\\n1.",\n "recommendations": [{listed}]}}'
    reply = read_reply(
        f'<think>maybe {{"recommendations": []}}</think>Sure:\n```json\n{body}\n```', request, {"b": "x"}
    )
    assert reply == Reply(f"Fits (/im_end/) {sids[0]} 1.", (2, 0, 1), {"b": "x"})
    repaired = read_reply(f'{{"explanation": "x", "recommendations": ["{sids[0]}"]}}', request, {})
    assert repaired == Reply("x", (2, 0, 1), {"repaired": "2 missing"})
    for text in ("", "{", "I can't.", f'{{"recommendations": [{listed}]}}', body.replace("Fits", "so " * 500)):
        assert isinstance(read_reply(text, request, {}), Failure)
