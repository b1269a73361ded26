"""The options themselves: TRL's `DPOConfig` and what silkie adds to it."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field
from typing import Any, Literal

from trl import DPOConfig, KTOConfig

from silkie.batch.corruption import Corruption
from silkie.batch.encoding import ResponseEnd
from silkie.batch.measure import StringRows
from silkie.batch.packing import Layout
from silkie.batch.preparation import OnBadRow
from silkie.batch.text_tokens import SpecialTokens
from silkie.batch.workers import data_workers
from silkie.config.checks import check_losses, check_own_options, check_trl_options
from silkie.logprob import Impl
from silkie.losses import LOSSES
from silkie.losses.options import LossFields, LossOptions
from silkie.model.attention import Backend


@dataclass
class SilkieDPOConfig(LossFields, DPOConfig):
    """Options of `SilkieDPOTrainer`.

    Everything of `trl.DPOConfig` and `transformers.TrainingArguments` applies. Batch sizes are in preference groups:
    `per_device_train_batch_size=2` is two groups with all their responses and pairs. Defaults that differ from TRL's:
    `gradient_checkpointing="auto"` (as many layers as memory needs), `max_length=None` (a prompt is never cut, so an
    image cannot be truncated), `logging_nan_inf_filter=False` (a non-finite loss stops the run and names its rows), and
    full fine-tuning leaves the vision tower frozen (`freeze_vision=False` trains it, as TRL does).
    `examples/from_trl.md` lists every difference.
    """

    # TRL parses these from JSON strings
    _VALID_DICT_FIELDS = [*DPOConfig._VALID_DICT_FIELDS, "aspect_weights", "chat_template_kwargs"]  # noqa: RUF012

    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": f"One loss, or several with loss_weights: {', '.join(LOSSES)} (examples/losses.md)."},
    )
    layout: Literal["auto", Layout] = field(
        default="auto",
        metadata={
            "help": (
                "packed: prompt and all responses of a group in one row; rows: one row per response. auto: packed where"
                " it is exact."
            )
        },
    )
    attention_backend: Literal["auto", Backend] = field(
        default="auto",
        metadata={
            "help": (
                "Attention of the language model in the packed layout. auto: on a GPU varlen or flex where a trial at"
                " start-up finds it exact and faster, else sdpa, one group per row; on the CPU by segment."
            )
        },
    )
    gradient_checkpointing: Literal["auto", True, False, "true", "false"] = field(  # type: ignore[assignment]
        default="auto",
        metadata={
            "help": (
                "auto: as many layers as the largest micro-batch needs by the planner's estimate, found when training"
                " starts. True: every layer, as in TRL. False: none."
            ),
            # `--gradient_checkpointing` alone means True, as in TRL
            "nargs": "?",
            "const": True,
        },
    )
    use_fused_logprob: bool = field(
        default=True, metadata={"help": "Score tokens with silkie.logprob; False builds the logits (for comparison)."}
    )
    logprob_impl: Impl = field(default="auto", metadata={"help": "Implementation of the fused log-prob."})
    share_prefix: Literal["off", "auto", "image"] = field(
        default="off",
        metadata={
            "help": (
                "image: groups that ask about the same image (or share the beginning of a text) come into one step and"
                " run it once. auto: where that saves a twentieth of the tokens, and the model computes the same."
            )
        },
    )
    share_prefix_groups: int = field(
        default=8, metadata={"help": "share_prefix: at most so many groups are brought together."}
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
    response_end: ResponseEnd = field(
        default="template",
        metadata={
            "help": (
                "template: score what the chat template writes after an answer, as TRL does; end_of_turn: stop at the "
                "end-of-turn token."
            )
        },
    )
    special_tokens: SpecialTokens = field(
        default="refuse",
        metadata={
            "help": (
                "Text of the data that is a special token of the tokenizer (<|im_end|>, ...): refuse such rows (see "
                "on_bad_row), or parse it as that token, as TRL does."
            )
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": (
                "Variables of the chat template, such as enable_thinking; a row's column of this name wins over them."
            )
        },
    )
    freeze_vision: bool = field(
        default=True,
        metadata={
            "help": "Freeze the vision tower and its projector (full fine-tuning; an adapter trains what it is put on)."
        },
    )
    source_format: str | None = field(
        default=None,
        metadata={"help": "Format of the rows, a name from silkie.data.SOURCES. None: it is told by their columns."},
    )
    string_rows: StringRows = field(
        default="auto",
        metadata={
            "help": (
                "Rows whose prompt, chosen and rejected are strings. plain: text and end token, as in TRL; template: "
                "written with the chat template. auto: plain, unless they have images and no image tokens."
            )
        },
    )
    stream_window: int = field(
        default=1024,
        metadata={
            "help": (
                "A streaming train_dataset is read, regrouped and divided into batches in windows of so many rows;"
                " memory holds one."
            )
        },
    )
    on_bad_row: OnBadRow = field(
        default="raise", metadata={"help": "What to do with a broken row: stop before training, or drop and count it."}
    )
    on_changed_run: Literal["raise", "continue"] = field(
        default="raise",
        metadata={
            "help": (
                "A checkpoint of a run with other data, model, losses or optimizer options: stop and name what differs,"
                " or resume it all the same."
            )
        },
    )
    on_preempt: Literal["exit", "return"] = field(
        default="exit",
        metadata={
            "help": (
                "After SIGTERM, Ctrl-C or the stop file, once the checkpoint is saved: end the process with exit code"
                " 75, or return from train() with trainer.preempted set."
            )
        },
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
    vision_cache: str = field(
        default="auto",
        metadata={
            "help": (
                "Features of a frozen vision tower on disk, so that each image is encoded once. auto: in output_dir,"
                " where images are encoded more than once; off; or a directory, which runs can share."
            )
        },
    )
    vision_cache_gb: float = field(
        default=100.0,
        metadata={"help": "Most GiB of vision_cache on a machine; half of the free disk where that is less."},
    )
    log_token_stats: bool = field(
        default=False,
        metadata={"help": "Also log entropy, mean_token_accuracy and logits/*, as TRL does; costs a little time."},
    )
    dataloader_num_workers: int | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": (
                "Processes of each rank that decode and process images. None: as many as there are free cores (at"
                " most 8), by what this process may use and how many ranks share it, and none for a stream, which each"
                " of them would read whole; 0: the trainer itself."
            )
        },
    )
    dataset_num_proc: int | None = field(
        default=None,
        metadata={
            "help": "Processes that read and measure the data before training. None: by the cores and the groups."
        },
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
    log_answers: int | None = field(
        default=None,
        metadata={
            "help": (
                "At every evaluation, answer this many prompts of the evaluation data and log a table of image, prompt,"
                " base and trained answer (W&B, trackio, TensorBoard; also answers/ in output_dir). None: off."
            )
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave it off: a non-finite loss must stop the run, not be hidden in the log."}
    )

    corruption: Corruption = field(
        default="crop", metadata={"help": "mDPO: how the image of its second pass is corrupted."}
    )
    corruption_strength: float = field(default=1.0, metadata={"help": "mDPO: strength of the corruption, in (0, 1]."})
    aspect_weights: dict[str, float] | str | None = field(  # a command line gives JSON text
        default=None,
        metadata={
            "help": (
                "Aspect -> weight: re-weight aspects at training time; pairs that contradict the new mean get weight 0."
            )
        },
    )

    def __post_init__(self) -> None:
        self._rename_checkpointing()
        self.workers_by_machine = self.dataloader_num_workers is None
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = data_workers()
        super().__post_init__()
        check_own_options(self)
        check_trl_options(self)
        check_losses(self)

    def _rename_checkpointing(self) -> None:
        """`gradient_checkpointing` is TRL's name, `activation_checkpointing` the one that transformers wants from 5.23
        on; without this every run would warn about the old name there."""
        if isinstance(self.gradient_checkpointing, str):  # from a command line
            words: dict[str, Any] = {"true": True, "false": False}
            self.gradient_checkpointing = words.get(self.gradient_checkpointing, self.gradient_checkpointing)
        kwargs = getattr(self, "activation_checkpointing_kwargs", None) or {}
        if self.gradient_checkpointing == "auto" and "every_n_layers" in kwargs:
            self.gradient_checkpointing = True  # which layers is said already
        for new in ("activation_checkpointing", "activation_checkpointing_kwargs"):
            if new in self.__dataclass_fields__ and getattr(self, new) is None:
                setattr(self, new, getattr(self, new.replace("activation", "gradient")))

    @classmethod
    def from_trl(cls, args: DPOConfig | KTOConfig) -> SilkieDPOConfig:
        """A config with every option of TRL's, and silkie's own at their defaults."""
        config = object.__new__(cls)  # `__init__` would recompute what TRL's has already derived, such as the device
        own = {name: _default(f) for name, f in cls.__dataclass_fields__.items() if name not in vars(args)}
        # TRL trains the vision tower in full fine-tuning
        config.__dict__.update({**own, **vars(args), "freeze_vision": False, "logging_nan_inf_filter": False})
        config.log_token_stats = True
        config.workers_by_machine = False  # their number is TRL's
        if isinstance(config.loss_type, str):  # KTO's
            config.loss_type = [config.loss_type]
        check_own_options(config)
        check_trl_options(config)
        check_losses(config)
        return config

    @property
    def template_variables(self) -> dict[str, Any]:
        """`chat_template_kwargs`, read from JSON text where it was given as one."""
        assert not isinstance(self.chat_template_kwargs, str)
        return dict(self.chat_template_kwargs or {})

    @property
    def loss_options(self) -> LossOptions:
        """The options of the losses."""
        return LossOptions.from_config(self)


def _default(option: Field[Any]) -> Any:
    return option.default_factory() if option.default_factory is not MISSING else option.default
