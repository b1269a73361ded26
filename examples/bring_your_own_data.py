"""Bring your own preference data: write silkie's JSON lines, or register a source for the files you already have.

python examples/bring_your_own_data.py [--out DIR]
"""

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw

from silkie.data import Group, Row, load_preferences, register_source, user_turn


@register_source(
    "my-ratings",
    detect=lambda record: {"photo", "question", "answers", "stars"} <= record.keys(),
    aspects=lambda record: ["Stars"],  # what the ratings are called
    pair_rows=False,  # a record is a whole group, not one pair
)
def my_ratings(row: Row) -> Group:
    """One record of your file -> one group. `row` checks the columns and names the row in every error."""
    answers = row.require("answers", list, "a list of texts")
    stars = row.require("stars", list, "one number per answer")
    return Group(
        images=[row.image("photo")],
        prompt=[user_turn(row.text("question"), n_images=1)],
        responses=[row.check_text(answer, f"answers[{index}]") for index, answer in enumerate(answers)],
        ratings=[{"Stars": value} for value in stars],
    )


def write_example(folder: Path) -> None:
    """Two files with the same content: one in silkie's own format, one in a format of yours."""
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    own, mine = [], []
    for index, colour in enumerate(("red", "green", "blue")):
        image = Image.new("RGB", (84, 84), "white")
        ImageDraw.Draw(image).ellipse((20, 20, 64, 64), fill=colour)
        image.save(folder / "photos" / f"{index}.png")
        answers = [f"A {colour} circle on white.", "A circle.", "A circle beside a black cat."]
        ratings = [
            dict(zip(("Helpfulness", "Visual Faithfulness"), values, strict=True))
            for values in ((5, 5), (3, 5), (2, 1))
        ]
        prompt = "What is in the image?"
        own.append(
            {
                "id": f"circle-{index}",
                "images": [f"photos/{index}.png"],
                "prompt": prompt,
                "responses": answers,
                "ratings": ratings,
            }
        )
        mine.append({"photo": f"photos/{index}.png", "question": prompt, "answers": answers, "stars": [5, 4, 1]})
    for name, records in (("groups.jsonl", own), ("my_ratings.jsonl", mine)):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/own_data"))
    args = parser.parse_args()
    write_example(args.out)
    for name in ("groups.jsonl", "my_ratings.jsonl"):
        dataset, report = load_preferences(args.out / name, return_report=True)
        print(report.summary())
        print(f"  first group: {dataset[0]['responses']}, pairs {dataset[0]['pairs']}")


if __name__ == "__main__":
    main()
