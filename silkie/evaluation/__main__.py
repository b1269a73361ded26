"""The command line: `python -m silkie.evaluation run | judge | score | compare`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from silkie.evaluation.answerers import AnswererError
from silkie.evaluation.records import ResultError, read_records
from silkie.evaluation.registry import BENCHMARKS, Benchmark, get_benchmark
from silkie.evaluation.text import comparison_text, score_text

NAMES = ", ".join(BENCHMARKS)

LAYOUTS = """results that are read:
  mme      folder of <subtask>.txt (or one of them): image TAB question TAB Yes|No TAB answer, two lines per image
  pope     JSONL or JSON list with `answer` and `label`; or without labels, beside or with --annotations their file;
           or a folder of such files, one each for random, popular, adversarial
  amber    JSON list of {id, response}; annotations.json, relation.json and safe_words.txt beside it or with
           --annotations FOLDER
  chair    JSONL with `answer` and `objects`
  mmhal    JSON list or JSONL with `rating` (0-6) or the judge's reply (`judge`, `gpt_evaluation`), or the official
           list of completions
  mmvet    the official grade file (id -> {"score": [...]}), or records with `score`; mm-vet.json beside it or with
           --annotations
  redteam  JSONL with `answer` and `expected` (refuse | answer)
  .yaml    JSONL with `answer` (yesno, exact) or `rating` / `judge` (judge), and `label` or an `id` of the questions

A line that cannot be scored ends the command with status 2 and `error: FILE:LINE: what is wrong`."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m silkie.evaluation",
        description="Benchmarks of vision-language models: run, judge, score, compare.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    which = f"{NAMES}; or the path of a YAML definition (also as --benchmark NAME)"

    run = commands.add_parser("run", help="answer a benchmark's questions; run again to resume")
    run.add_argument("benchmark", help=which)
    run.add_argument("--data", help="folder of the benchmark's release (for a YAML definition: default its own folder)")
    run.add_argument("--out", required=True, help="results file (JSONL)")
    run.add_argument("--adapter", help="LoRA adapter directory (--model is then its base model)")
    run.add_argument(
        "--base-out", help="also answer with the adapter switched off (same weights, one load), into this file"
    )
    run.add_argument(
        "--export", help="also write the answers in the benchmark's official layout to this file or folder"
    )
    run.add_argument("--limit", type=_at_least(1), help="only the first N questions")
    _answering_arguments(run)
    run.set_defaults(run=run_command)

    judge = commands.add_parser("judge", help="have a judge rate the answers of a results file; run again to resume")
    judge.add_argument("benchmark", help=which)
    judge.add_argument("results", help="results file of `run`")
    judge.add_argument("--out", required=True, help="results file with the judge's replies (JSONL)")
    judge.add_argument("--images", help="folder of the images (default: the data folder noted beside RESULTS)")
    _answering_arguments(judge)
    judge.set_defaults(run=judge_command)

    score = commands.add_parser(
        "score",
        help="the official numbers of a results file",
        epilog=LAYOUTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    score.add_argument("benchmark", help=which)
    score.add_argument(
        "results",
        help=(
            "results file, or folder of results files, in the benchmark's official layout or as `run` wrote it (also as"
            " --results PATH)"
        ),
    )
    score.add_argument(
        "--annotations",
        "--questions",
        help="questions or annotations of the benchmark (default: in the results, or searched beside them)",
    )
    score.add_argument("--json", action="store_true", help="print JSON")
    score.add_argument("--items", metavar="FILE", help="write every question with how it was read and scored (JSONL)")
    score.set_defaults(run=score_command)

    compare = commands.add_parser(
        "compare", help="two results files on the same questions: differences B - A, intervals, flips"
    )
    compare.add_argument("a", help="results of the reference (the base model)")
    compare.add_argument("b", help="results of the other (the trained model)")
    compare.add_argument(
        "--benchmark", help=f"{NAMES}; or the path of a YAML definition (default: the one noted in the results)"
    )
    compare.add_argument("--annotations", "--questions", help="as for score")
    compare.add_argument("--only-common", action="store_true", help="compare the questions that both have")
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.add_argument("--html", metavar="FILE", help="write a page with the flipped questions and their images")
    compare.add_argument("--images", help="folder of the images (default: the data folder noted beside B)")
    compare.set_defaults(run=compare_command)
    return parser


def _answering_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help="model directory or hub name; with --base-url the name that the endpoint knows it by",
    )
    parser.add_argument(
        "--base-url", help="answer through an OpenAI-compatible endpoint, for example http://localhost:8000/v1"
    )
    parser.add_argument(
        "--key-variable",
        help="environment variable with the endpoint's key (default: SILKIE_API_KEY, then OPENAI_API_KEY)",
    )
    parser.add_argument(
        "--batch-size",
        type=_at_least(1),
        default=8,
        help="questions at a time; calls in flight with --base-url (default 8)",
    )
    parser.add_argument(
        "--workers", type=_at_least(0), default=2, help="processes that decode images ahead (default 2)"
    )
    parser.add_argument("--max-new-tokens", type=_at_least(1), help="default: the benchmark's own")
    parser.add_argument("--temperature", type=_between(0.0, 100.0), default=0.0, help="0 decodes greedily (default 0)")
    parser.add_argument("--top-p", type=_between(1e-6, 1.0), default=1.0, help="only with a temperature (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--system", help="system prompt")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="dtype of the weights (default: the checkpoint's)",
    )
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--overwrite", action="store_true", help="start over instead of continuing OUT")
    parser.add_argument("--quiet", action="store_true", help="no progress line")


def _at_least(lowest: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if (value := int(text)) < lowest:
            raise argparse.ArgumentTypeError(f"expected at least {lowest}, found {value}")
        return value

    return whole_number


def _between(lowest: float, highest: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        if not lowest <= (value := float(text)) <= highest:
            raise argparse.ArgumentTypeError(f"expected a number from {lowest:g} to {highest:g}, found {text}")
        return value

    return number


def run_command(arguments: argparse.Namespace) -> int:
    from silkie.evaluation.run import answer_tasks, question_tasks

    benchmark = get_benchmark(arguments.benchmark)
    data = arguments.data or (
        str(Path(arguments.benchmark).parent) if Path(arguments.benchmark).suffix in (".yaml", ".yml") else None
    )
    if data is None:
        raise ValueError(f"--data is missing: the folder of {benchmark.title}'s release.")
    if arguments.base_out and Path(arguments.base_out).resolve() == Path(arguments.out).resolve():
        raise ValueError("--out and --base-out are one file: the base answers need a file of their own.")
    if arguments.base_out and not arguments.adapter:
        raise ValueError("--base-out needs --adapter: without one there is nothing to switch off.")
    if arguments.adapter and arguments.base_url:
        raise ValueError("--adapter cannot be used with --base-url: the endpoint serves what it serves.")
    questions = benchmark.load_questions(data)[: arguments.limit]
    tasks = question_tasks(benchmark, questions, data)
    settings = {"benchmark": arguments.benchmark, "data": str(Path(data).resolve()), **_settings(arguments, benchmark)}
    outputs = _answerers(arguments, benchmark)
    _check_writable(outputs)
    with closing_all(outputs.values()):
        answer_tasks(tasks, outputs, settings=settings, **_loop_arguments(arguments))
    if arguments.export:
        rows = [record.data for record in read_records(arguments.out)]
        print(f"official layout: {benchmark.export_results(rows, arguments.export)}")
    if benchmark.judge_prompt is not None:
        following = f"python -m silkie.evaluation judge {arguments.benchmark} {arguments.out} --out ... --model ..."
        print(f"{arguments.out}: {len(tasks)} answers. Next: {following}")
        return 0
    for file in (arguments.out, arguments.base_out):
        if file:
            print(f"{file}\n{score_text(benchmark.score_results(file, data if benchmark.name == 'amber' else None))}")
    return 0


def judge_command(arguments: argparse.Namespace) -> int:
    from silkie.evaluation.judging import judge_tasks
    from silkie.evaluation.run import answer_tasks

    benchmark = get_benchmark(arguments.benchmark)
    if Path(arguments.out).resolve() == Path(arguments.results).resolve():
        raise ValueError("--out is the file of answers itself: the judge's replies need a file of their own.")
    tasks = judge_tasks(benchmark, arguments.results, arguments.images)
    arguments.adapter = arguments.base_out = None
    settings = {
        "benchmark": arguments.benchmark,
        "results": str(Path(arguments.results).resolve()),
        **_settings(arguments, benchmark),
    }
    outputs = _answerers(arguments, benchmark)
    with closing_all(outputs.values()):
        answer_tasks(tasks, outputs, settings=settings, field="judge", **_loop_arguments(arguments))
    print(score_text(benchmark.score_results(arguments.out)))
    return 0


def score_command(arguments: argparse.Namespace) -> int:
    from silkie.evaluation.intervals import metric_intervals

    score = get_benchmark(arguments.benchmark).score_results(arguments.results, arguments.annotations)
    intervals = metric_intervals(score)
    if arguments.items:
        lines = [json.dumps(item.to_dict(), ensure_ascii=False) for item in score.items]
        Path(arguments.items).write_text("\n".join(lines) + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps({**score.to_dict(), "intervals": intervals}, indent=1, ensure_ascii=False))
    else:
        print(score_text(score, intervals))
    return 0


def compare_command(arguments: argparse.Namespace) -> int:
    from silkie.evaluation.compare import compare_scores
    from silkie.evaluation.run import read_meta

    name = arguments.benchmark or _noted_benchmark(arguments.b) or _noted_benchmark(arguments.a)
    if name is None:
        raise ValueError(
            f"{arguments.b} does not say which benchmark it answers. Add --benchmark: {NAMES}, or a YAML definition."
        )
    benchmark = get_benchmark(name)
    noted = read_meta(arguments.b).get("data")
    annotations = arguments.annotations or (noted if benchmark.name == "amber" else None)
    a, b = (benchmark.score_results(file, annotations) for file in (arguments.a, arguments.b))
    comparison = compare_scores(a, b, only_common=arguments.only_common)
    if arguments.html:
        from silkie.report import write_comparison

        names = (arguments.a, arguments.b)
        page = write_comparison(comparison, arguments.html, image_root=arguments.images or noted, names=names)
        print(f"page: {page}", file=sys.stderr)
    print(
        json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False)
        if arguments.json
        else comparison_text(comparison)
    )
    return 0


def _noted_benchmark(results: str) -> str | None:
    """The benchmark that the results name themselves."""
    from silkie.evaluation.run import read_meta

    path = Path(results)
    if not path.exists():
        raise ResultError(path, None, "no such file.")
    if path.is_dir():
        return "mme" if any(path.glob("*.txt")) else None
    if noted := read_meta(path).get("benchmark"):
        return noted
    return read_records(path)[0].data.get("benchmark") if path.suffix in (".jsonl", ".json") else None


def _settings(arguments: argparse.Namespace, benchmark: Benchmark) -> dict[str, Any]:
    """What determines the answers, besides the questions."""
    names = ("model", "base_url", "adapter", "temperature", "top_p", "system", "dtype")
    return {name: getattr(arguments, name) for name in names} | {
        "max_new_tokens": arguments.max_new_tokens or benchmark.max_new_tokens
    }


def _loop_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("batch_size", "workers", "seed", "overwrite")} | {
        "progress": not arguments.quiet
    }


def _answerers(arguments: argparse.Namespace, benchmark: Benchmark) -> dict[str | Path, Any]:
    from silkie.evaluation.answerers import EndpointAnswerer, LocalAnswerer

    generation = {
        "max_new_tokens": arguments.max_new_tokens or benchmark.max_new_tokens,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "system": arguments.system,
    }
    if arguments.base_url:
        return {
            arguments.out: EndpointAnswerer(
                arguments.base_url, arguments.model, key_variable=arguments.key_variable, **generation
            )
        }
    from silkie.inference import load_policy

    source = (
        {"path": arguments.adapter, "base_model": arguments.model} if arguments.adapter else {"path": arguments.model}
    )
    model, processor = load_policy(**source, dtype=arguments.dtype, device=arguments.device)
    outputs: dict[str | Path, Any] = {arguments.out: LocalAnswerer(model, processor, **generation)}
    if arguments.base_out:
        outputs[arguments.base_out] = LocalAnswerer(model, processor, use_adapter=False, **generation)
    return outputs


def closing_all(answerers: Iterable[Any]) -> ExitStack:
    """Closes every answerer on leaving, also after an error."""
    stack = ExitStack()
    for answerer in answerers:
        stack.callback(answerer.close)
    return stack


def _check_writable(outputs: dict[str | Path, Any]) -> None:
    for file in outputs:
        if Path(file).is_dir():
            raise ValueError(
                f"{file} is a folder; expected the name of a results file, such as {Path(file) / 'answers.jsonl'}."
            )


def _named_first(argv: list[str]) -> list[str]:
    """`--benchmark NAME` and `--results PATH` put where the positional arguments stand (`compare` has a --benchmark of
    its own)."""
    if not argv or argv[0] not in ("run", "judge", "score"):
        return argv
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--benchmark")
    finder.add_argument("--results")
    named, rest = finder.parse_known_args(argv[1:])
    front = [value for value in (named.benchmark,) if value is not None]
    back = [value for value in (named.results,) if value is not None]
    return [argv[0], *front, *(back if front else []), *rest, *([] if front else back)]


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    arguments = build_parser().parse_args(_named_first(list(sys.argv[1:] if argv is None else argv)))
    try:
        return arguments.run(arguments)
    except (AnswererError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
