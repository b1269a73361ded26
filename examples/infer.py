"""Ask a trained policy about an image.

    python examples/infer.py ADAPTER_OR_MODEL_DIR IMAGE "What is on the table?" [--base-model DIR_OR_NAME] [--compare]

`--compare` also prints the base model's answer: the same weights with the adapter switched off.
"""

import argparse

from silkie.data import open_image
from silkie.inference import generate, load_policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", help="directory (or hub name) of a LoRA adapter or of a full model")
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument("--base-model", help="where the adapter's base model is, if it has moved")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args()

    model, processor = load_policy(args.policy, base_model=args.base_model)
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": args.question}]}]
    question = ([prompt], [[open_image(args.image, where=args.image)]])
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    print("answer:", generate(model, processor, *question, **options)[0][0])
    if args.compare:
        if not hasattr(model, "disable_adapter"):
            parser.error(f"{args.policy} is not an adapter: there is nothing to switch off")
        with model.disable_adapter():
            print("base:  ", generate(model, processor, *question, **options)[0][0])


if __name__ == "__main__":
    main()
