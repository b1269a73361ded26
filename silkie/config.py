"""Every option of a run: TRL's `DPOConfig` and what silkie adds to it, typed and validated once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from trl import DPOConfig

from silkie.batch.corruption import CORRUPTIONS
from silkie.losses import build_objective
from silkie.losses.options import LossOptions, validate


@dataclass
class SilkieDPOConfig(DPOConfig):
    """Options of `SilkieDPOTrainer`.

    Everything of `trl.DPOConfig` and `transformers.TrainingArguments` applies; a batch counts preference groups, so
    `per_device_train_batch_size=2` is two groups with all their responses and pairs. Defaults that differ from TRL's:
    `max_length=None` (a prompt is never cut, so an image cannot be truncated), `logging_nan_inf_filter=False` (a
    non-finite loss stops the run and names its rows).
    """

    # TRL parses these from JSON strings
    _VALID_DICT_FIELDS = [*DPOConfig._VALID_DICT_FIELDS, "aspect_weights"]  # noqa: RUF012

    layout: Literal["auto", "packed", "rows"] = field(
        default="auto",
        metadata={
            "help": (
                "packed: prompt and all responses of a group in one row; rows: one row per response. auto: packed where"
                " it is exact."
            )
        },
    )
    attention_backend: Literal["auto", "sdpa", "eager", "segments", "flex", "varlen"] = field(
        default="auto",
        metadata={
            "help": (
                "Attention of the language model in the packed layout. auto: sdpa, one group per row; on the CPU by"
                " segment."
            )
        },
    )
    use_fused_logprob: bool = field(
        default=True, metadata={"help": "Score tokens with silkie.logprob; False builds the logits (for comparison)."}
    )
    logprob_impl: Literal["auto", "reference", "tiled", "triton"] = field(
        default="auto", metadata={"help": "Implementation of the fused log-prob."}
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": (
                "Token budget of a micro-batch, padding included; replaces per_device_train_batch_size. None: fixed"
                " number of groups."
            )
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Limit on prompt + response tokens. Response tails are cut, prompts never. None: no limit."},
    )
    max_response_length: int | None = field(
        default=None, metadata={"help": "Limit on response tokens; the tail is cut. None: no limit."}
    )
    response_end: Literal["template", "end_of_turn"] = field(
        default="template",
        metadata={
            "help": (
                "template: score what the chat template writes after an answer, as TRL does; end_of_turn: stop at the "
                "end-of-turn token."
            )
        },
    )
    freeze_vision: bool = field(
        default=True,
        metadata={
            "help": "Freeze the vision tower and its projector (full fine-tuning; an adapter trains what it is put on)."
        },
    )
    on_bad_row: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "What to do with a broken row: stop before training, or drop and count it."}
    )
    self_test: bool = field(
        default=True,
        metadata={
            "help": "At start-up, compare the first groups with the model's plain forward and stop where they differ."
        },
    )
    self_test_tolerance: float | None = field(
        default=None,
        metadata={
            "help": (
                "Largest difference of a token's log-prob in the self-test. None: 2e-3 in fp32, 0.25 in half precision."
            )
        },
    )
    reference_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where precompute_ref_log_probs keeps its numbers. None: reference_cache in output_dir."},
    )
    log_token_stats: bool = field(
        default=False,
        metadata={"help": "Also log entropy, mean_token_accuracy and logits/*, as TRL does; costs a little time."},
    )
    eval_benchmarks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Benchmarks to answer while training, as NAME=FOLDER (silkie.evaluation), or YAML definitions."
        },
    )
    eval_benchmark_steps: int = field(
        default=500, metadata={"help": "Optimizer steps between two rounds of eval_benchmarks."}
    )
    eval_benchmark_limit: int | None = field(
        default=None, metadata={"help": "Questions per benchmark while training. None: all."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Kept off: a non-finite loss must stop the run, not be smoothed over."}
    )

    # Losses (silkie.losses.options.LossOptions)
    simpo_gamma: float = field(default=0.5, metadata={"help": "SimPO's target margin."})
    bco_reward_shift: Literal["none", "running_mean"] = field(
        default="none",
        metadata={
            "help": (
                "running_mean subtracts the mean reward of past steps in bco_pair (the paper's form); none is TRL's."
            )
        },
    )
    margin: Literal["none", "offset", "weight"] = field(
        default="none", metadata={"help": "Use of a pair's rating gap: logit offset or pair weight."}
    )
    margin_scale: float = field(default=1.0, metadata={"help": "Scale of the rating gap."})
    mdpo_anchor: float = field(
        default=0.0, metadata={"help": "Reward that mdpo_anchor holds the chosen response above."}
    )
    ddpo_gamma: float | None = field(
        default=None, metadata={"help": "DDPO: weight of the tokens that differ between the two responses of a pair."}
    )
    ddpo_normalize: bool = field(default=True, metadata={"help": "DDPO: divide by the sum of token weights."})
    corruption: Literal["crop", "noise", "blur", "other_image"] = field(
        default="crop", metadata={"help": "mDPO: how the image of its second pass is corrupted."}
    )
    corruption_strength: float = field(default=1.0, metadata={"help": "mDPO: strength of the corruption, in (0, 1]."})
    aspect_weights: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "Aspect -> weight: mix the ratings anew at training time; pairs that contradict get weight 0."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, not {getattr(self, name)!r}.")
        for name in (
            "max_tokens_per_batch",
            "max_length",
            "max_response_length",
            "eval_benchmark_steps",
            "eval_benchmark_limit",
        ):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive or None, not {getattr(self, name)}.")
        if (self.corruption != "crop" or self.corruption_strength != 1.0) and "mdpo_image" not in self.loss_type:
            raise ValueError(f"`corruption` is read by the loss mdpo_image only; loss_type is {self.loss_type}.")
        if not 0 < self.corruption_strength <= 1:
            raise ValueError(f"`corruption_strength` must be in (0, 1], not {self.corruption_strength}.")
        if self.layout == "rows" and self.attention_backend not in ("auto", "sdpa"):
            raise ValueError(
                f"`attention_backend={self.attention_backend!r}` is read by layout='packed' only; in rows the model's"
                " own attention runs."
            )
        if self.padding_free:
            raise ValueError(
                "`padding_free` is TRL's; silkie's packed layout with attention_backend='varlen' or 'flex' is free of"
                " padding."
            )
        dealing = [
            name for name in ("dispatch_batches", "split_batches") if getattr(self.accelerator_config, name, False)
        ]
        if dealing:
            raise ValueError(
                f"`accelerator_config` asks for {dealing[0]}, but silkie's sampler makes whole batches for every rank:"
                " leave it off."
            )
        if self.torch_compile:
            raise ValueError(
                "`torch_compile` is not supported: the output head scores other tokens in every forward pass, which"
                " recompiles."
            )
        for name, only in _NOT_READ.items():
            if getattr(self, name) not in only:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` has no effect in silkie; leave it at {only[0]!r}."
                    f" {_INSTEAD[name]}"
                )
        if self.self_test_tolerance is not None and not 0 <= self.self_test_tolerance < float("inf"):
            raise ValueError(
                f"`self_test_tolerance` must be a finite number >= 0 or None, not {self.self_test_tolerance}."
            )
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError("`sync_ref_model` changes the reference during training; it cannot be precomputed.")
        validate(self.loss_type, self.loss_weights, self.loss_options)
        if (
            self.sync_ref_model
            and not build_objective(self.loss_type, self.loss_weights, self.loss_options).needs_reference
        ):
            raise ValueError(f"`sync_ref_model` moves a reference, and the losses {self.loss_type} read none.")

    @property
    def loss_options(self) -> LossOptions:
        """The options of the losses."""
        return LossOptions.from_config(self)


_CHOICES: dict[str, tuple[str, ...]] = {
    "layout": ("auto", "packed", "rows"),
    "attention_backend": ("auto", "sdpa", "eager", "segments", "flex", "varlen"),
    "logprob_impl": ("auto", "reference", "tiled", "triton"),
    "corruption": CORRUPTIONS,
    "response_end": ("template", "end_of_turn"),
    "on_bad_row": ("raise", "skip"),
}

# Options of TRL and transformers that nothing in silkie reads, with the values that ask for nothing.
_NOT_READ: dict[str, tuple[Any, ...]] = {
    "pad_to_multiple_of": ("auto", None),
    "truncation_mode": ("keep_start",),
    "train_sampling_strategy": ("random",),
    "dataloader_drop_last": (False,),
}
_INSTEAD = {
    "pad_to_multiple_of": "Rows are padded to the longest of a batch.",
    "truncation_mode": "Response tails are cut, prompts never.",
    "train_sampling_strategy": "With `max_tokens_per_batch` groups of like length share a batch.",
    "dataloader_drop_last": "Every group comes once an epoch.",
}
