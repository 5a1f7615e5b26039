"""The world that ships: a small simulated shop, its customers, and what an ideal ranker could know about them.

Every customer has a favourite brand and a usual line (everyday or luxe), and walks along routines: after
the shampoo comes the conditioner. Each habit holds most of the time, never always. Nothing but titles, categories,
brands and prices is visible, and each of them carries part of the signal: a ranker that reads them can beat one
that only counts co-occurrences, and `log_probability` says how far any ranker can get.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from rerankkit.types import Interaction, Item

ROUTINES: dict[str, tuple[str, ...]] = {
    "Hair": ("Shampoo", "Conditioner", "Mask", "Gel"),
    "Face": ("Cleanser", "Toner", "Serum", "Cream"),
    "Makeup": ("Primer", "Foundation", "Blush", "Fixer"),
    "Nails": ("Basecoat", "Polish", "Topcoat", "Remover"),
    "Bath": ("Wash", "Scrub", "Lotion", "Balm"),
}
BRANDS = ("Norda", "Velis", "Amaro", "Kestrel", "Oriel", "Tavi")
LINES = {"Everyday": 8.0, "Luxe": 24.0}
"""Line of products -> its typical price in dollars."""


@dataclass(frozen=True)
class Habits:
    """How reliably customers follow their habits: probabilities, each below 1."""

    routine: float = 0.85
    """The next purchase is the routine's next step."""
    brand: float = 0.8
    """It is of the customer's favourite brand."""
    line: float = 0.8
    """It is of the customer's usual line."""


@dataclass(frozen=True)
class World:
    """A catalogue and its customers' purchases, all drawn from one seed."""

    items: tuple[Item, ...]
    interactions: tuple[Interaction, ...]
    habits: Habits

    def log_probability(self, history: Sequence[Item], item: Item) -> float:
        """log P(item bought next | history) for an observer who knows the habits but not the customer.

        The customer's brand and line are inferred from the history by Bayes' rule; sorting candidates by this is the
        best that any ranker can do on average: the ceiling.
        """
        kinds = [kind for routine in ROUTINES.values() for kind in routine]
        following = _following(history[-1].categories[-1])
        wander = (1 - self.habits.routine) / (len(kinds) - 1)
        kind_p = self.habits.routine if item.categories[-1] == following else wander
        brand_p = _next_choice([i.brand for i in history], item.brand, BRANDS, self.habits.brand)
        line_p = _next_choice([_line(i) for i in history], _line(item), tuple(LINES), self.habits.line)
        return math.log(kind_p) + math.log(brand_p) + math.log(line_p)


def make_world(*, num_users: int, seed: int, habits: Habits | None = None, length: tuple[int, int] = (6, 10)) -> World:
    """Draw a catalogue of 240 items and `num_users` histories of `length` (fewest, most) purchases.

    Nobody buys an item twice. Each customer is drawn from an own stream of random numbers, so that customer 17 is
    the same person in a world of a hundred and in a world of a thousand.
    """
    habits = habits or Habits()
    items = _catalogue(random.Random(f"{seed} catalogue"))
    shelf = {(item.categories[-1], item.brand, _line(item)): item for item in items}
    interactions: list[Interaction] = []
    for user in range(num_users):
        dice = random.Random(f"{seed} user {user}")
        interactions.extend(_customer(f"user{user}", dice, shelf, habits, dice.randint(*length)))
    return World(items, tuple(interactions), habits)


def _catalogue(dice: random.Random) -> tuple[Item, ...]:
    items = []
    for routine, kinds in ROUTINES.items():
        for kind in kinds:
            for brand in BRANDS:
                for line, price in LINES.items():
                    items.append(
                        Item(
                            item_id="",
                            title=f"{brand} {line} {kind}",
                            categories=(routine, kind),
                            brand=brand,
                            price=round(price * dice.uniform(0.8, 1.25), 2),
                        )
                    )
    # Ids are dealt at random: an id that followed the shelf order would tell a model what it must not know.
    numbers = list(range(len(items)))
    dice.shuffle(numbers)
    return tuple(
        Item(f"item{number}", item.title, item.categories, brand=item.brand, price=item.price)
        for number, item in zip(numbers, items, strict=True)
    )


def _customer(
    user_id: str, dice: random.Random, shelf: dict[tuple[str, str, str], Item], habits: Habits, length: int
) -> list[Interaction]:
    kinds = [kind for routine in ROUTINES.values() for kind in routine]
    brand, line, kind = dice.choice(BRANDS), dice.choice(list(LINES)), dice.choice(kinds)
    bought: list[Interaction] = []
    seen: set[str] = set()
    while len(bought) < length:
        item = shelf[kind, _keep(dice, brand, BRANDS, habits.brand), _keep(dice, line, tuple(LINES), habits.line)]
        if item.item_id not in seen:
            seen.add(item.item_id)
            bought.append(Interaction(user_id, item.item_id, timestamp=float(len(bought))))
        kind = _keep(dice, _following(kind), kinds, habits.routine)
    return bought


def _keep(dice: random.Random, habit: str, choices: Sequence[str], probability: float) -> str:
    """The habitual choice with this probability, otherwise any of the others."""
    if dice.random() < probability:
        return habit
    return dice.choice([choice for choice in choices if choice != habit])


def _following(kind: str) -> str:
    """The routine's next step; after the last one, the first step of the next routine."""
    kinds = [k for routine in ROUTINES.values() for k in routine]
    return kinds[(kinds.index(kind) + 1) % len(kinds)]


def _line(item: Item) -> str:
    return next(line for line in LINES if f" {line} " in item.title)


def _next_choice(seen: Sequence[str], candidate: str, choices: Sequence[str], keep: float) -> float:
    """P(next = candidate | seen) when somebody's unknown favourite is chosen with probability `keep`."""
    other = (1 - keep) / (len(choices) - 1)

    def p(choice: str, favourite: str) -> float:
        return keep if choice == favourite else other

    posterior = [math.prod(p(choice, favourite) for choice in seen) for favourite in choices]
    total = sum(posterior)
    return sum(w / total * p(candidate, favourite) for w, favourite in zip(posterior, choices, strict=True))
