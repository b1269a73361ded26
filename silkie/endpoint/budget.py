"""Prices and the limit of a run: how much has been spent, and whether one more call may start."""

from __future__ import annotations

from dataclasses import dataclass, replace

from silkie.endpoint.errors import StopRun, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Price per million tokens, in any currency."""

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, usage: Usage) -> Usage:
        """`usage` with its cost filled in."""
        return replace(
            usage, cost=(usage.prompt_tokens * self.prompt + usage.completion_tokens * self.completion) / 1e6
        )


class Budget:
    """Limits on tokens and cost over everything a journal has paid for, earlier runs included.

    An item starts only while what was spent plus what the items in flight will probably cost (the mean so far, each)
    stays below the limit. The limit can be passed by no more than the items that were in flight, and only where those
    cost more than the mean."""

    def __init__(
        self,
        *,
        max_tokens: int | None = None,
        max_cost: float | None = None,
        spent: Usage | None = None,
        items: int = 0,
    ) -> None:
        self.max_tokens, self.max_cost = max_tokens, max_cost
        self.spent = spent or Usage()
        self.items = items
        self.in_flight = 0

    @property
    def limited(self) -> bool:
        return self.max_tokens is not None or self.max_cost is not None

    def start(self) -> None:
        """Account for an item that starts. Raises StopRun where the limit leaves no room for it."""
        reserved = self.in_flight / self.items if self.items else 0.0
        if self.max_tokens is not None and self.spent.tokens * (1 + reserved) >= self.max_tokens:
            raise StopRun(
                f"token budget: {self.spent.tokens:,} of {self.max_tokens:,} tokens spent, {self.in_flight} items in"
                " flight"
            )
        if self.max_cost is not None and self.spent.cost * (1 + reserved) >= self.max_cost:
            raise StopRun(
                f"cost budget: {self.spent.cost:.4f} of {self.max_cost:.4f} spent, {self.in_flight} items in flight"
            )
        self.in_flight += 1

    def finish(self, usage: Usage, *, usable: bool = True) -> None:
        """Account for an item that ended, with a usable answer or without. Raises StopRun where a budget is set and the
        endpoint does not say what a usable answer used."""
        self.in_flight -= 1
        self.items += 1
        self.spent += usage
        if self.limited and usable and usage.calls and not usage.tokens:
            raise StopRun(
                "a budget was set, but the endpoint reports no token usage, so it cannot be kept; run without a budget"
            )

    def abandon(self) -> None:
        """An item that started and will be done by a later run."""
        self.in_flight -= 1
