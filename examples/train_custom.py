"""A training script of your own: load a model, group the preferences, train, save. Runs on the embedded demo model when
nothing is named.

python examples/train_custom.py [--model DIR_OR_NAME --data SOURCE --image-root DIR] [--out DIR]
"""

import argparse
import logging
from pathlib import Path

from peft import LoraConfig
from transformers import AutoModelForImageTextToText

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.data import load_preferences
from silkie.inference import load_processor


def demo_model_and_data(directory: Path) -> tuple[str, str, str]:
    """The embedded base model, and VLFeedback records of its own: 40 images, four sampled responses per prompt, rated
    by the oracle."""
    from silkie.demo.data import preference_items
    from silkie.demo.loop import feedback
    from silkie.demo.model import BASE_DIR
    from silkie.demo.results import Watch

    records = feedback(preference_items(5, images=40, card_images=0), directory, BASE_DIR, 0, Watch())
    return str(BASE_DIR), str(records), str(records.parent / "images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or hub name; default: the embedded demo model")
    parser.add_argument("--data", help="preference data; default: a few groups that the demo model samples")
    parser.add_argument("--image-root")
    parser.add_argument("--out", default="outputs/custom")
    parser.add_argument("--use-cpu", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)  # silkie says which layout and attention run, and why
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data go together; without both the demo's are used")
    if args.model is None:
        args.model, args.data, args.image_root = demo_model_and_data(Path(args.out) / "data")

    trainer = SilkieDPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(args.model, use_safetensors=True),
        processing_class=load_processor(args.model),
        train_dataset=load_preferences(args.data, image_root=args.image_root),
        # No target_modules: the language model's attention and MLP projections
        peft_config=LoraConfig(r=16, lora_alpha=32),
        args=SilkieDPOConfig(
            output_dir=args.out,
            per_device_train_batch_size=4,  # groups: an image, a prompt, its responses and all pairs over them
            learning_rate=1e-4,
            num_train_epochs=1,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, 0.5],
            bf16=False,
            use_cpu=args.use_cpu,
            logging_steps=5,
            report_to="none",
        ),
    )
    trainer.train()
    trainer.save_model(args.out)
    print(f"adapter, processor and model card are in {args.out}")


if __name__ == "__main__":
    main()
