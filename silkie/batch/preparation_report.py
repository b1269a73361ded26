"""What the preparation of a dataset found: how many groups, pairs and tokens remain, and what was dropped for what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LISTED = 5  # rows listed per reason


@dataclass(slots=True, kw_only=True)
class PreparationReport:
    """Result of preparation.

    Attributes:
        groups, pairs, responses: numbers that remain.
        prompt_tokens, response_tokens: their sums.
        longest_prompt, longest_response: in tokens.
        cut_responses: responses truncated at the end to meet the length limits.
        equal_pairs: pairs whose responses have the same tokens after truncation; they contribute no gradient.
        open_headers: groups whose generation prompt ends in tokens that no answer follows (the open thinking block of a
            template that closes it where an answer has none); the responses start before these, as in TRL.
        header_pairs: pairs that share more of the generation prompt than their group does: both responses score those
            tokens, which TRL counts to the prompt of such a pair.
        desirable, undesirable: labelled responses, for losses that take no pairs.
        dropped: reason -> descriptions of the groups that were dropped for it.
    """

    groups: int = 0
    pairs: int = 0
    responses: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    longest_prompt: int = 0
    longest_response: int = 0
    cut_responses: int = 0
    equal_pairs: int = 0
    open_headers: int = 0
    header_pairs: int = 0
    desirable: int = 0
    undesirable: int = 0
    images: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def count(self, row: Mapping[str, Any]) -> None:
        """Adds a group that remains, from what `measure_row` found."""
        self.groups += 1
        self.pairs += row["n_pairs"]
        self.equal_pairs += row["n_equal"]
        self.images += row["n_images"]
        self.open_headers += row["open_header"]
        self.header_pairs += row["n_header"]
        self.desirable += row["n_desirable"]
        self.undesirable += row["n_undesirable"]
        self.responses += len(row["response_lengths"])
        self.prompt_tokens += row["prompt_length"]
        self.response_tokens += sum(row["response_lengths"])
        self.longest_prompt = max(self.longest_prompt, row["prompt_length"])
        self.longest_response = max(self.longest_response, *row["response_lengths"])
        self.cut_responses += row["cut"]

    def numbers(self) -> dict[str, int]:
        """Counts by readable name. Counts that are normally zero (cut or dropped) appear only if they are not."""
        always = (
            "groups",
            "pairs",
            "responses",
            "images",
            "prompt_tokens",
            "longest_prompt",
            "response_tokens",
            "longest_response",
        )
        counts = {name.replace("_", " "): getattr(self, name) for name in always}
        rare = {
            "responses cut at the tail": self.cut_responses,
            "pairs with equal responses": self.equal_pairs,
            "groups whose answers rewrite the generation prompt": self.open_headers,
            "pairs that score a part of the generation prompt": self.header_pairs,
            "desirable responses": self.desirable,
            "undesirable responses": self.undesirable,
        }
        dropped = {f"dropped groups: {reason}": len(rows) for reason, rows in self.dropped.items()}
        return counts | {name: number for name, number in rare.items() if number} | dropped

    def lines(self, name: str) -> list[str]:
        """Human-readable summary."""
        out = [
            f"{name}: {self.groups} groups, {self.responses} responses, {self.pairs} pairs, {self.images} images;"
            f" prompt tokens {self.prompt_tokens} (longest {self.longest_prompt}), response tokens"
            f" {self.response_tokens} (longest {self.longest_response})"
        ]
        if self.desirable or self.undesirable:
            out[0] += f"; {self.desirable} desirable and {self.undesirable} undesirable responses"
        if self.cut_responses:
            out.append(f"{name}: {self.cut_responses} responses were truncated at the end to meet the length limits")
        if self.equal_pairs:
            out.append(
                f"{name}: {self.equal_pairs} pairs have identical responses after truncation and contribute no"
                " gradient; raise the length limits"
            )
        if self.open_headers:
            out.append(
                f"{name}: in {self.open_headers} groups the chat template ends the prompt differently once an answer"
                " follows (an open thinking block that it closes, or tokens that merge); the responses start where the"
                " two part"
            )
        if self.header_pairs:
            out.append(
                f"{name}: {self.header_pairs} pairs share more of the generation prompt than all responses of their"
                " group do; both responses score these tokens, which cancel in the margin of a pair"
            )
        for reason, rows in self.dropped.items():
            more = f", and {len(rows) - _LISTED} more" if len(rows) > _LISTED else ""
            out.append(f"{name}: dropped {len(rows)} groups: {reason} ({'; '.join(rows[:_LISTED])}{more})")
        return out
