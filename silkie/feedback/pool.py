"""The pool of endpoints and local models that responses are drawn from, and which of them draws which one.

members:
  - {name: large, base_url: "http://localhost:8000/v1", model: org/large-vl, temperatures: [0.7, 1.0], key_variable:
      LARGE_KEY}
  - {name: mine, local: out/adapter, temperatures: [1.0], weight: 2}
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import Ge, Gt, MinLen
from pydantic import BeforeValidator, Field, Strict
from pydantic.dataclasses import dataclass

from silkie.io.checked import CHECKED, FieldError, check, parse_yaml
from silkie.io.files import MAX_SETTINGS_BYTES, read_file


class PoolError(ValueError):
    """A pool that cannot be used; the message names the member, the key and what was expected."""


def _as_list(value: Any) -> Any:
    """One temperature may stand without a list."""
    return value if isinstance(value, (list, tuple)) else [value]


Positive = Annotated[int, Strict(), Ge(1)]
Number = int | float  # kept as written: a fingerprint tells 2 from 2.0
NotNegative = Annotated[Number, Ge(0)]


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKED)
class Member:
    """One model of a pool: behind an endpoint (`base_url` and `model`) or in this process (`local`, a model or adapter
    directory).

    temperatures: the n-th draw of one item from this member uses the n-th of them, and round again.
    weight: how often it is chosen, relative to the others.
    base_model: where an adapter's base is, if not where the adapter says.
    price_*: per million tokens."""

    name: str = Field(description="text")
    base_url: str | None = Field(default=None, description="an address such as http://localhost:8000/v1")
    model: str | None = Field(default=None, description="the name the server knows")
    key_variable: str | None = Field(default=None, description="the name of an environment variable")
    local: str | None = Field(default=None, description="a model or adapter directory")
    base_model: str | None = Field(default=None, description="a model directory or hub name")
    temperatures: Annotated[tuple[Annotated[float, Ge(0)], ...], MinLen(1), BeforeValidator(_as_list)] = Field(
        default=(1.0,), description="one or more temperatures >= 0"
    )
    top_p: Number | None = Field(default=None, description="a number")
    max_tokens: Positive = Field(default=512, description="a whole number of 1 or more")
    weight: Annotated[Number, Gt(0)] = Field(default=1.0, description="a number above 0")
    concurrency: Positive | None = Field(default=None, description="a concurrency of 1 or more")
    batch_size: Positive = Field(default=8, description="a whole number of 1 or more")
    price_prompt: NotNegative = Field(default=0.0, description="a price of 0 or more")
    price_completion: NotNegative = Field(default=0.0, description="a price of 0 or more")

    def __post_init__(self) -> None:
        if (self.local is None) == (self.base_url is None):
            raise PoolError(f"pool member {self.name!r}: expected either `base_url` (and `model`) or `local`")
        if self.base_url is not None and not self.model:
            raise PoolError(f"pool member {self.name!r}: `base_url` needs `model`, the name the server knows")


@dataclass(frozen=True, slots=True, config=CHECKED)
class Pool:
    """The members, by distinct names."""

    members: tuple[Member, ...] = Field(description="a list of mappings with `name`")

    def __post_init__(self) -> None:
        names = [member.name for member in self.members]
        if not names or len(set(names)) != len(names):
            raise PoolError(f"expected one or more pool members with distinct names, found {names}")

    def fingerprint(self) -> str:
        """12 hex digits over everything that shapes the answers: not over where a server listens, concurrency, batch
        size or prices."""
        ignored = {"base_url", "concurrency", "batch_size", "price_prompt", "price_completion", "key_variable"}
        shaping = [
            {key: value for key, value in dataclasses.asdict(member).items() if key not in ignored}
            for member in self.members
        ]
        return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:12]


def load_pool(path: str | Path) -> Pool:
    """The pool of a YAML file. Raises PoolError. Paths of local members are taken from the working directory."""
    try:
        data = parse_yaml(read_file(path, limit=MAX_SETTINGS_BYTES).decode())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PoolError(f"cannot read the pool {path}: {error}") from error
    if not isinstance(data, Mapping):
        raise PoolError(f"{path}: expected a mapping with a list `members`")
    try:
        return check(Pool, data)
    except FieldError as error:
        raise PoolError(f"{path}: {error}") from None


@dataclasses.dataclass(frozen=True, slots=True)
class Sampler:
    """A member at one temperature."""

    member: Member
    temperature: float


def samplers(pool: Pool, item_id: str, seed: int) -> list[Sampler]:
    """The samplers of an item in the order in which its slots use them: every member once, in a seeded weighted order,
    at its first temperature; then every member that has a second temperature; and so on. So k draws come from k
    members where the pool has as many."""
    rng = random.Random(f"{seed}|{item_id}|members")
    # weighted sampling without replacement: sort by u^(1/weight) (Efraimidis and Spirakis 2006)
    order = sorted(pool.members, key=lambda member: -(rng.random() ** (1.0 / member.weight)))
    rounds = max(len(member.temperatures) for member in order)
    return [
        Sampler(member, member.temperatures[i])
        for i in range(rounds)
        for member in order
        if i < len(member.temperatures)
    ]


def sampler_of(pool: Pool, item_id: str, slot: int, attempt: int, k: int, seed: int) -> Sampler:
    """The sampler that draws response `slot` of an item; a repeated draw (`attempt` > 0) moves on to samplers that no
    slot has used."""
    order = samplers(pool, item_id, seed)
    return order[(slot + attempt * k) % len(order)]


def draw_seed(*parts: Any) -> int:
    """A seed below 2**31 that depends on nothing but `parts`."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:4], "big") >> 1


def normalised(text: str) -> str:
    """The form in which two responses are compared: words alone, without case, extra spaces and the final full stop."""
    return " ".join(text.casefold().split()).rstrip(" .!")


def accepted_slots(texts: Sequence[str | None]) -> list[bool]:
    """Which responses of an item are kept: those with a text that no earlier slot has."""
    seen: set[str] = set()
    kept = []
    for text in texts:
        key = None if text is None else normalised(text)
        kept.append(bool(key) and key not in seen)
        if key:
            seen.add(key)
    return kept
