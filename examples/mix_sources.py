"""Mix sources with weights: each source is loaded as groups, given the same columns, and drawn from in proportion.

python examples/mix_sources.py vlfeedback.jsonl:3 rlaif.parquet:1 [--test-size 0.05] [--out DIR]
"""

import argparse

from silkie.data import check_leak, load_preferences, mix, split_groups


def source(text: str) -> tuple[str, float]:
    """SOURCE:WEIGHT as (source, weight)."""
    name, _, weight = text.rpartition(":")
    try:
        return name, float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected SOURCE:WEIGHT, for example {text}:1") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=source, metavar="SOURCE:WEIGHT")
    parser.add_argument("--image-root")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-size", type=float, default=0.05, help="share of the groups that is held out")
    parser.add_argument("--out", help="write train and test there")
    args = parser.parse_args()

    loaded = [load_preferences(name, image_root=args.image_root, on_error="skip") for name, _ in args.sources]
    mixed = mix(loaded, weights=[weight for _, weight in args.sources], seed=args.seed)
    try:
        split = split_groups(mixed, args.test_size, seed=args.seed)
    except ValueError as error:
        parser.error(f"{error}; pass another --test-size")
    check_leak(split["train"], split["test"])  # raises where an image or a prompt is on both sides
    print(
        f"{len(mixed):,} groups from {len(loaded)} sources: {len(split['train']):,} to train on, {len(split['test']):,}"
        " held out"
    )
    if args.out:
        split.save_to_disk(args.out)


if __name__ == "__main__":
    main()
