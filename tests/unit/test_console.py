"""The console command: help without imports, dispatch, one-line errors, launching, completion."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from silkie import __main__ as console
from silkie.io import console as messages
from silkie.io.completion import script
from silkie.losses import LOSSES
from silkie.run import command, launch

ROOT = Path(__file__).parents[2]


def modules_after(*words: str) -> tuple[str, set[str]]:
    """Output of the command in a fresh process, and the packages that it imported."""
    code = (
        "import sys, silkie.__main__ as m\n"
        "try: m.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "import json; print('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, cwd=ROOT)
    text, _, names = result.stdout.rpartition("\n" if not result.stdout.endswith("\n") else "\n[")
    return text, set(json.loads("[" + names))


@pytest.mark.parametrize("words", [["--help"], ["data", "--help"], ["feedback", "rate", "--help"], ["eval", "--help"]])
def test_help_does_not_import_torch(words):
    text, modules = modules_after(*words)
    assert "usage: silkie" in text
    assert not {"torch", "transformers", "trl"} & modules
    if words == ["--help"]:
        assert not {"datasets", "pydantic", "numpy"} & modules
        assert all(f"  {name} " in text for name in console.PROGRAMS)


@pytest.mark.parametrize("words", [["--help"], ["data", "--help"], ["train", "--help-all"]])
def test_a_reader_who_stops_early_is_no_error(words):
    """`silkie ... | head`: the other end is closed before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        command = [sys.executable, "-u", "-m", "silkie", *words]
        result = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert result.returncode in (0, 1) and "error" not in result.stderr.lower() and "Traceback" not in result.stderr


def test_the_entry_point_is_the_command():
    assert 'silkie = "silkie.__main__:main"' in (ROOT / "pyproject.toml").read_text()


def test_a_misspelt_command_is_one_line(capsys):
    assert console.main(["trian"]) == 2
    assert capsys.readouterr().err == "error: no command `trian`: did you mean `train`?\n"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["plan", "qwen2-vl-2b", "--gpus", "many"], "error: argument --gpus: invalid int value: 'many'."),
        (["data", "inspect"], "error: the following arguments are required: "),
        (["eval", "run", "mme"], "error: the following arguments are required: --model, --out."),
        (["feedback", "sing"], "error: argument command: invalid choice: 'sing'"),
        (["report"], "error: the following arguments are required: run_dir."),
        (["check"], "error: the following arguments are required: model."),
    ],
)
def test_a_wrong_use_is_one_line_with_a_remedy(words, wanted, capsys):
    with pytest.raises(SystemExit) as ended:
        console.main(words)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("transformers ...")]
    assert ended.value.code == 2 and len(lines) == 1
    assert lines[0].startswith(wanted) and lines[0].endswith("--help lists the options.")


def test_debug_is_taken_off_except_where_it_is_transformers_option(monkeypatch):
    monkeypatch.setenv("SILKIE_DEBUG", "0")  # so that it is taken back where the command sets it
    monkeypatch.delenv("SILKIE_DEBUG")
    assert console._debug(["data", "inspect", "x"]) == ["data", "inspect", "x"] and "SILKIE_DEBUG" not in os.environ
    assert console._debug(["train", "--debug", "underflow_overflow"]) == ["train", "--debug", "underflow_overflow"]
    assert console._debug(["infer", "--debug", "policy"]) == ["infer", "policy"]
    assert os.environ["SILKIE_DEBUG"] == "1"


def raised_here():
    raise KeyError("a bug")


def of_a_library():
    json.loads("{")


def of_silkie():
    command._config(["--config", "nothing.yaml"])


def test_errors_of_users_are_one_line_and_bugs_keep_their_traceback(monkeypatch, capsys):
    monkeypatch.setenv("SILKIE_DEBUG", "0")  # so that it is taken back where the command sets it
    monkeypatch.delenv("SILKIE_DEBUG")
    assert messages.guarded(of_silkie) == 2
    assert capsys.readouterr().err == "error: --config nothing.yaml: no such file.\n"
    with pytest.raises(KeyError):
        messages.guarded(raised_here)
    assert messages.guarded(of_a_library) == 2  # arguments that cannot work

    def in_training():
        with messages.computing():
            of_a_library()

    with pytest.raises(ValueError):
        messages.guarded(in_training)
    capsys.readouterr()
    monkeypatch.setenv("SILKIE_DEBUG", "1")
    assert messages.guarded(of_silkie) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_that_all_ranks_meet_is_said_by_rank_0(monkeypatch, capsys):
    monkeypatch.setenv("SILKIE_DEBUG", "0")  # so that it is taken back where the command sets it
    monkeypatch.delenv("SILKIE_DEBUG")

    def wrong_options():
        with messages.alike():
            of_silkie()

    monkeypatch.setenv("RANK", "1")
    assert messages.guarded(wrong_options) == 2 and capsys.readouterr().err == ""
    assert messages.guarded(of_silkie) == 2 and "error: rank 1: --config" in capsys.readouterr().err


def test_a_full_gpu_has_a_remedy(capsys):
    class OutOfMemoryError(RuntimeError):
        """As torch's, which needs a GPU to be raised."""

    def fill():
        with messages.computing():
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    assert messages.guarded(fill) == 2
    assert "--max_tokens_per_batch" in capsys.readouterr().err


def test_help_is_in_groups_and_lists_all_losses():
    parser = command.make_parser()
    text, everything = " ".join(parser.format_help().split()), " ".join(parser.format_help(everything=True).split())
    assert text.index("data and run:") < text.index("losses:") < text.index("often used options of TRL")
    assert f"{', '.join(LOSSES)} (examples/losses.md)" in text
    assert "--max_tokens_per_batch" in text and "--hub_token" not in text and "--hub_token" in everything
    missing = [name for action in parser._actions if f"--{(name := action.dest)} " not in everything]
    assert [name for name in missing if name not in ("help", "help_all")] == []


def test_no_option_is_in_two_groups():
    names = [name for _, names in command.option_sections(everything=True) for name in names]
    assert len(names) == len(set(names))


def test_options_of_the_launcher_are_told_from_those_of_a_run(tmp_path):
    (tmp_path / "c.yaml").write_text("dataset_name: x\nnum_processes: 2\nmulti_gpu: true\nlearning_rate: 1.0e-5\n")
    asked = command.read_command(
        [f"--config={tmp_path / 'c.yaml'}", "--num-machines", "3", "--use_cpu", "--loss_type", "ipo"]
    )
    assert asked.launch == {"num_processes": 2, "multi_gpu": True, "num_machines": "3"} and asked.use_cpu
    assert launch.launch_words(asked.launch) == ["--num_processes", "2", "--multi_gpu", "--num_machines", "3"]
    assert command.read_command(["--dataset_name", "x"]).launch == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--max_token_per_batch", "5"],
            "unknown option `--max_token_per_batch`: did you mean `max_tokens_per_batch`?",
        ),
        (["--num_processes", "2", "3"], "unknown option `3`"),
        (["--config"], "--config wants a YAML file."),
    ],
)
def test_unknown_options_are_an_error_with_a_suggestion(words, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        command.read_command(["--dataset_name", "x", *words])


def test_accelerate_is_told_that_cpu_processes_are_one_run():
    words = launch._with_defaults(["--num_processes", "2"], use_cpu=True)
    assert "--multi_gpu" in words and "--mixed_precision=no" in words
    assert "--multi_gpu" not in launch._with_defaults(["--num_processes", "1"], use_cpu=True)
    assert launch._with_defaults(["--config_file", "f.yaml"], use_cpu=True) == ["--config_file", "f.yaml"]


def test_several_gpus_and_launcher_options_launch(monkeypatch):
    started = []
    monkeypatch.setattr(command, "launch", lambda words, argv, *, use_cpu: started.append(words) or 0)
    monkeypatch.setattr(command, "_train", lambda argv, prog: started.append("here") or 0)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for devices, words in ((False, []), (True, []), (True, ["--use_cpu"]), (False, ["--num_processes", "2"])):
        monkeypatch.setattr(command, "several_devices", lambda devices=devices: devices)
        assert command.start(["--dataset_name", "x", *words]) == 0
    assert started == ["here", [], "here", ["--num_processes", "2"]]
    monkeypatch.setenv("WORLD_SIZE", "2")  # a launcher started this process: it is one of the run's
    command.start(["--dataset_name", "x"])
    assert started[-1] == "here"


def test_options_of_a_launcher_without_one_are_refused(monkeypatch, capsys):
    monkeypatch.delenv(launch.LAUNCHED, raising=False)
    assert command.train(["--dataset_name", "x", "--num_processes", "2"]) == 2
    assert "Start with `silkie train`" in capsys.readouterr().err


PRESSED = [
    ("silkie da", "data"),
    ("silkie --vers", "--version"),
    ("silkie data insp", "data inspect"),
    ("silkie data inspect x.jsonl --image-r", "data inspect x.jsonl --image-root"),
    ("silkie eval run --data data --base-o", "eval run --data data --base-out"),
    ("silkie plan --layout pac", "plan --layout packed"),
    ("silkie check rec", "check recipe"),  # a file
    ("silkie plan --write rec", "plan --write recipe"),
    ("silkie completion fi", "completion fish"),
]
SHELL_WORDS = {"bash": ["--norc", "-i"], "zsh": ["-f", "-i"], "fish": ["--no-config", "-i"]}


@pytest.mark.parametrize("shell", SHELL_WORDS)
def test_completion_at_the_tab_key(shell, tmp_path):
    """In the shell itself, on a terminal: what the command gets when the key was pressed."""
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    parsers = {name: _parser(name) for name in ("data", "eval", "report", "plan")} | {"check": None}
    (tmp_path / "recipe").write_text("")
    (tmp_path / "completion").write_text(script(shell, parsers))
    echo = 'function silkie; echo "GOT:$argv:END"; end' if shell == "fish" else 'silkie() { echo "GOT:$*:END"; }'
    with _terminal([shell, *SHELL_WORDS[shell]], tmp_path) as ask:
        ask(f"source {tmp_path}/completion; {echo}; echo READY", "READY\r")
        got = [ask(f"{line}\t", ":END\r") for line, _ in PRESSED]
    assert [re.findall(r"GOT:(.*?) *:END\r", text)[-1] for text in got] == [wanted for _, wanted in PRESSED]


@contextlib.contextmanager
def _terminal(command: list[str], home: Path):
    """A program on a terminal of its own: a function that types a line, waits for an answer, and gives it."""
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(home)
        os.execvpe(command[0], command, {**os.environ, "TERM": "dumb", "HOME": str(home), "PS1": "> "})

    def read(until: str, seconds: float) -> str:
        text, end = "", time.monotonic() + seconds
        while until not in text and time.monotonic() < end:
            if select.select([fd], [], [], 0.2)[0]:
                text += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]", "", os.read(fd, 65536).decode(errors="replace"))
        return text

    def ask(line: str, until: str) -> str:
        os.write(fd, line.encode())
        if line.endswith("\t"):
            read("\0", 0.5)  # the shell completes
        os.write(fd, b"\n")
        return read(until, 20)

    try:
        read("\0", 1.0)  # its prompt
        yield ask
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(fd)


def test_a_dash_offers_options_and_no_dash_offers_files(tmp_path):
    (tmp_path / "completion.sh").write_text(script("bash", {"eval": _parser("eval"), "check": None}))

    def complete(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in words)
        code = f"source {tmp_path}/completion.sh; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _silkie"
        shell = subprocess.run(
            ["bash", "-c", code + '; echo "${COMPREPLY[@]}"'], capture_output=True, text=True, check=True
        )
        return shell.stdout.split()

    assert "--html" in complete("silkie", "eval", "compare", "--")
    assert complete("silkie", "eval", "compare", "") == [] == complete("silkie", "check", "--")
    assert set(complete("silkie", "eval", "")) >= {"run", "score", "compare"}


def _parser(name: str):
    import importlib

    return importlib.import_module(console.PROGRAMS[name].module).make_parser(f"silkie {name}")


def test_a_line_is_written_above_a_progress_bar(capsys):
    from tqdm import tqdm

    with tqdm(total=2, file=sys.stderr) as bar:
        bar.update(1)
        messages.say("loading a model ...")
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    assert "loading a model ..." in lines, "not behind the bar"
