"""The command line: `python -m silkie.evaluation run | judge | score | compare`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from silkie.evaluation.answerers import AnswererError
from silkie.evaluation.benchmark import Benchmark
from silkie.evaluation.benchmarks import BENCHMARKS, get_benchmark
from silkie.evaluation.options import (
    NAMES,
    AnswerOptions,
    CompareOptions,
    JudgeOptions,
    RunOptions,
    ScoreOptions,
    layouts,
)
from silkie.evaluation.records import ResultError, read_records
from silkie.evaluation.text import comparison_text, score_text
from silkie.io.console import complain, say
from silkie.io.options import Command, command_parser, parse_command


def run_benchmark(options: RunOptions) -> int:
    from silkie.evaluation.run import answer_tasks, question_tasks

    benchmark = get_benchmark(options.benchmark)
    own = Path(options.benchmark).suffix in (".yaml", ".yml")
    data = options.data or (str(Path(options.benchmark).parent) if own else None)
    if data is None:
        raise ValueError(f"--data is missing: the folder of {benchmark.title}'s release.")
    if options.base_out and Path(options.base_out).resolve() == Path(options.out).resolve():
        raise ValueError("--out and --base-out are one file: the base answers need a different file.")
    if options.base_out and not options.adapter:
        raise ValueError("--base-out needs --adapter: without one there is nothing to switch off.")
    if options.adapter and options.base_url:
        raise ValueError("--adapter cannot be used with --base-url: the endpoint serves what it serves.")
    questions = benchmark.load_questions(data)[: options.limit]
    tasks = question_tasks(benchmark, questions, data)
    settings = {
        "benchmark": options.benchmark,
        "data": str(Path(data).resolve()),
        **options.settings(benchmark),
    }
    outputs = _answerers(options, benchmark, options.out, adapter=options.adapter, base_out=options.base_out)
    _check_writable(outputs)
    with closing_all(outputs.values()):
        answer_tasks(tasks, outputs, settings=settings, **options.loop())
    if options.export:
        rows = [record.data for record in read_records(options.out)]
        print(f"official layout: {benchmark.export_results(rows, options.export)}")
    if benchmark.judge_prompt is not None:
        following = f"silkie eval judge {options.benchmark} {options.out} --out ... --model ..."
        print(f"{options.out}: {len(tasks)} answers. Next: {following}")
        return 0
    for file in (options.out, options.base_out):
        if file:
            print(f"{file}\n{score_text(benchmark.score_results(file, benchmark.annotations(data)))}")
    return 0


def judge_answers(options: JudgeOptions) -> int:
    from silkie.evaluation.judging import judge_tasks
    from silkie.evaluation.run import answer_tasks

    benchmark = get_benchmark(options.benchmark)
    if Path(options.out).resolve() == Path(options.results).resolve():
        raise ValueError("--out is the file of answers itself: the judge's replies need a different file.")
    tasks = judge_tasks(benchmark, options.results, options.images)
    settings = {
        "benchmark": options.benchmark,
        "results": str(Path(options.results).resolve()),
        **options.settings(benchmark),
    }
    outputs = _answerers(options, benchmark, options.out)
    with closing_all(outputs.values()):
        answer_tasks(tasks, outputs, settings=settings, field="judge", **options.loop())
    print(score_text(benchmark.score_results(options.out)))
    return 0


def score_results(options: ScoreOptions) -> int:
    from silkie.evaluation.intervals import metric_intervals

    score = get_benchmark(options.benchmark).score(options.results, options.annotations, variant=options.variant)
    intervals = metric_intervals(score)
    if options.items:
        lines = [json.dumps(item.to_dict(), ensure_ascii=False) for item in score.items]
        Path(options.items).write_text("\n".join(lines) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps({**score.to_dict(), "intervals": intervals}, indent=1, ensure_ascii=False))
    else:
        print(score_text(score, intervals))
    return 0


def compare_results(options: CompareOptions) -> int:
    from silkie.evaluation.compare import compare_scores
    from silkie.evaluation.run import read_meta

    name = options.benchmark or _noted_benchmark(options.b) or _noted_benchmark(options.a)
    if name is None:
        raise ValueError(
            f"{options.b} does not say which benchmark it answers. Add --benchmark: {NAMES}, or a YAML definition."
        )
    benchmark = get_benchmark(name)
    noted = read_meta(options.b).get("data")
    annotations = options.annotations or benchmark.annotations(noted)
    a, b = (benchmark.score(file, annotations, variant=options.variant) for file in (options.a, options.b))
    comparison = compare_scores(a, b, only_common=options.only_common)
    if options.html:
        from silkie.report import write_comparison

        names = (options.a, options.b)
        page = write_comparison(comparison, options.html, image_root=options.images or noted, names=names)
        print(f"page: {page}", file=sys.stderr)
    if options.json:
        print(json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False))
    else:
        print(comparison_text(comparison, names=(options.a, options.b)))
    return 0


COMMANDS = (
    Command("run", "answer a benchmark's questions; run again to resume", RunOptions, run_benchmark),
    Command(
        "judge", "have a judge rate the answers of a results file; run again to resume", JudgeOptions, judge_answers
    ),
    Command("score", "the official numbers of a results file", ScoreOptions, score_results, epilog=layouts()),
    Command(
        "compare",
        "two results files on the same questions: differences B - A, intervals, flips",
        CompareOptions,
        compare_results,
    ),
)


def _noted_benchmark(results: str) -> str | None:
    """The benchmark that the results name themselves."""
    from silkie.evaluation.run import read_meta

    path = Path(results)
    if not path.exists():
        raise ResultError(path, None, "no such file.")
    if path.is_dir():
        folders = (benchmark for benchmark in BENCHMARKS.values() if benchmark.results_folder)
        return next((benchmark.name for benchmark in folders if any(path.glob(benchmark.results_folder))), None)
    if noted := read_meta(path).get("benchmark"):
        return noted
    return read_records(path)[0].data.get("benchmark") if path.suffix in (".jsonl", ".json") else None


def _answerers(
    options: AnswerOptions, benchmark: Benchmark, out: str, *, adapter: str | None = None, base_out: str | None = None
) -> dict[str | Path, Any]:
    """Results file -> who answers into it."""
    from silkie.evaluation.answerers import EndpointAnswerer, LocalAnswerer

    generation = options.generation(benchmark)
    if options.base_url:
        return {out: EndpointAnswerer(options.base_url, options.model, key_variable=options.key_variable, **generation)}
    say(f"loading {adapter or options.model} ...")
    from silkie.inference import load_policy

    model, processor = load_policy(
        adapter or options.model,
        base_model=options.model if adapter else None,
        dtype=options.dtype,
        device=options.device,
    )
    outputs: dict[str | Path, Any] = {out: LocalAnswerer(model, processor, **generation)}
    if base_out:
        outputs[base_out] = LocalAnswerer(model, processor, use_adapter=False, **generation)
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
    """`--benchmark NAME` and `--results PATH` moved to the places of the positional arguments. `compare` is left as it
    is: its --benchmark is an option."""
    if not argv or argv[0] not in ("run", "judge", "score"):
        return argv
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--benchmark")
    finder.add_argument("--results")
    named, rest = finder.parse_known_args(argv[1:])
    front = [value for value in (named.benchmark,) if value is not None]
    back = [value for value in (named.results,) if value is not None]
    return [argv[0], *front, *(back if front else []), *rest, *([] if front else back)]


ABOUT = "Benchmarks of vision-language models: run, judge, score, compare."


def make_parser(prog: str) -> argparse.ArgumentParser:
    return command_parser(prog, ABOUT, COMMANDS)


def main(argv: Sequence[str] | None = None, prog: str = "python -m silkie.evaluation") -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    command, options = parse_command(
        make_parser(prog),
        COMMANDS,
        _named_first(list(sys.argv[1:] if argv is None else argv)),
    )
    try:
        return command.run(options)
    except (AnswererError, ValueError, OSError) as error:
        return complain(error)


if __name__ == "__main__":
    raise SystemExit(main())
