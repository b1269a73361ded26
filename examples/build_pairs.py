"""Build the pairs another way: the same rated responses under every strategy, without loading them twice.

python examples/build_pairs.py SOURCE [--image-root DIR] [--best-model NAME]
"""

import argparse

from silkie.data import PairOptions, aspects_of, load_preferences, rebuild_pairs
from silkie.data.loading import count_pairs


def no_short_winners(group: dict) -> list[tuple[int, int]]:
    """A rule of your own: a function from a group to (chosen, rejected) or (chosen, rejected, weight)."""
    lengths = [len(response) for response in group["responses"]]
    return [(chosen, rejected) for chosen, rejected in group["pairs"] if lengths[chosen] >= 0.5 * lengths[rejected]]


def strategies(aspects: tuple[str, ...], best_model: str | None) -> dict:
    named = {
        "all, as in the paper": "all",
        "best against worst": "best_vs_worst",
        "best against the rest": "best_vs_rest",
        "one random pair": PairOptions(strategy="random", seed=1),
        "longest as best (baseline)": "longest",
        "a function": no_short_winners,
    }
    if aspects:  # the data is rated
        named["margin of at least 1, weighted by it"] = PairOptions(min_margin=1.0, weight_by_margin=True)
        named[f"{aspects[-1]} counts twice"] = PairOptions(aspects={**dict.fromkeys(aspects, 1), aspects[-1]: 2})
        named["ties kept"] = PairOptions(keep_ties=True)
    if best_model:
        named[f"{best_model} as best (baseline)"] = f"model:{best_model}"
    return named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--image-root")
    parser.add_argument("--best-model")
    args = parser.parse_args()
    groups = load_preferences(args.source, image_root=args.image_root, keep_unpaired=True)
    for name, pairs in strategies(aspects_of(groups.features), args.best_model).items():
        paired, dropped = rebuild_pairs(groups, pairs)
        print(
            f"{name:40} {len(paired):>8,} groups {count_pairs(paired):>9,} pairs, {len(dropped):,} groups without a"
            " pair"
        )


if __name__ == "__main__":
    main()
