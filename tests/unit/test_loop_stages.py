"""`silkie loop` without its processes: the file, the stages, what is refused, and what resumes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from silkie.endpoint.adapters import AdapterNotLoaded, load_adapter
from silkie.run.rounds import loop as rounds
from silkie.run.rounds.processes import Stopped, held, run_stage
from silkie.run.rounds.settings import read_loop_file
from silkie.run.rounds.stages import Stages
from tests.support.policy_server import BASE, policy_server


def write(folder: Path, **changed: Any) -> Path:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(5)))
    loop = {
        "model": "org/model",
        "prompts": str(folder / "prompts.jsonl"),
        "output_dir": str(folder / "out"),
        "rounds": 2,
        "sample": {"k": 3, "temperatures": [0.7, 1.0], "max_answer_tokens": 9},
        "rate": {"base_url": "http://localhost:9/v1", "model": "judge"},
        "evaluate": [{"benchmark": "pope", "data": "pope/", "limit": 4}],
    }
    file = folder / "loop.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in {**loop, **changed}.items() if value is not None}))
    return file


def stages(folder: Path, **changed: Any) -> Stages:
    return Stages(read_loop_file(write(folder, **changed)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": None}, "`model`: missing; expected a model directory or hub name"),
        ({"round": 3}, "unknown field `round`"),
        ({"rounds": 0}, "`rounds`: expected a whole number of 1 or more, found 0"),
        ({"train": {"output_dir": "x"}}, "`train`: the loop sets `output_dir` itself"),
        ({"sample": {"base-url": "x"}}, "`sample`: the loop sets `base_url` itself"),
        ({"evaluate": [{"data": "x"}]}, "entry 1: missing `benchmark`"),
        ({"evaluate": [{"benchmark": "pope", "adapter": "x"}]}, "entry 1: the loop sets `adapter` itself"),
        ({"evaluate": [{"benchmark": "pope"}, {"benchmark": "a/pope.yaml"}]}, "names pope twice"),
        ({"evaluate": [{"benchmark": "mmhal", "judge": "gpt"}]}, "`judge` is a mapping of options"),
        ({"serve": {"base_url": "x", "url": "x"}}, "unknown field `url` of `serve`"),
    ],
)
def test_a_wrong_file_is_told_what_is_wrong(tmp_path, changed, message):
    with pytest.raises(ValueError) as caught:
        read_loop_file(write(tmp_path, **changed))
    assert message in str(caught.value) and "loop.yaml" in str(caught.value)


def test_rounds_take_the_next_prompts_and_start_again_from_the_top(tmp_path):
    made = stages(tmp_path, prompts_per_round=3)
    assert [[row["id"] for row in made.prompts_of(n)] for n in (1, 2)] == [["1", "2", "3"], ["4", "5", "1"]]
    assert len(stages(tmp_path).prompts_of(2)) == 5, "all of them in every round"
    assert len(stages(tmp_path, prompts_per_round=99).prompts_of(1)) == 5


def test_a_later_round_trains_on_from_the_one_before(tmp_path):
    made = stages(tmp_path, train={"learning_rate": 1e-5, "num_processes": 2})
    first, second = (yaml.safe_load(made.write_train(n).read_text()) for n in (1, 2))
    assert first["use_peft"] is True and "adapter_name_or_path" not in first
    assert second["adapter_name_or_path"] == str(tmp_path / "out" / "round-1" / "adapter") and "use_peft" not in second
    assert second["dataset_name"] == str(tmp_path / "out" / "round-2" / "dataset") and second["num_processes"] == 2
    assert [stage.key for stage in made.of_round(2)][-1] == "round-2/evaluate-pope"


def test_what_is_sampled_and_evaluated_is_the_policy_of_the_round(tmp_path):
    made = stages(tmp_path)
    of_base, *_, of_first = [*made.of_round(0), *made.of_round(1)]
    assert "--adapter" not in of_base.words()
    assert of_first.words()[-6:] == [
        "--adapter",
        str(tmp_path / "out/round-1/adapter"),
        "--data",
        "pope/",
        "--limit",
        "4",
    ]
    sample = next(made.of_round(2))
    sample.prepare()
    (member,) = yaml.safe_load((tmp_path / "out" / "round-2" / "pool.yaml").read_text())["members"]
    assert member["local"] == str(tmp_path / "out" / "round-1" / "adapter") and member["base_model"] == "org/model"
    assert member["temperatures"] == [0.7, 1.0] and member["max_tokens"] == 9
    assert sample.words()[-4:] == ["--seed", "2", "--k", "3"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sample": {"kk": 3}}, "section `sample`: unrecognized arguments: --kk 3"),
        ({"rate": {"model": "judge", "votes": 0}}, "section `rate`: argument --votes: expected a whole number"),
        ({"evaluate": [{"benchmark": "pope", "limit": "all"}]}, "section `evaluate`: argument --limit"),
        ({"train": {"learning_rat": 1}}, "section `train`: unknown option .*did you mean `learning_rate`"),
        ({"train": {"beta": -1.0, "use_cpu": True}}, "section `train`: `beta` must be > 0"),
    ],
)
def test_an_option_that_a_command_refuses_is_found_before_any_stage(tmp_path, monkeypatch, changed, message):
    monkeypatch.setattr(rounds, "run_stage", lambda words, lock: pytest.fail("a stage ran"))
    with pytest.raises(ValueError, match=message):
        rounds.run_loop(read_loop_file(write(tmp_path, **changed)))


@pytest.fixture
def ran(monkeypatch, tmp_path) -> list[list[str]]:
    """The commands that a loop starts, in the place of their processes; `status` of the last word fails or stops one."""
    started: list[list[str]] = []

    def stand_in(words: list[str], lock: int) -> int:
        started.append(words)
        if words[:2] == ["feedback", "build"]:
            Path(words[words.index("--out") + 1]).mkdir(parents=True)
        return 0

    monkeypatch.setattr(rounds, "run_stage", stand_in)
    monkeypatch.setattr(rounds, "check_commands", lambda loop, stages: None)
    monkeypatch.setattr(rounds, "write_overview", lambda *_: ("table", "page"))
    return started


def test_a_loop_resumes_with_the_stage_that_was_not_finished(tmp_path, monkeypatch, ran):
    loop, working = read_loop_file(write(tmp_path)), rounds.run_stage

    def failing(words: list[str], lock: int) -> int:
        return 3 if words[1] == "rate" else working(words, lock)

    monkeypatch.setattr(rounds, "run_stage", failing)
    with pytest.raises(rounds.StageFailed, match="`silkie feedback rate` ended with status 3") as caught:
        rounds.run_loop(loop)
    assert caught.value.status == 3 and [words[1] for words in ran] == ["run", "sample"]

    def stopped(words: list[str], lock: int) -> int:
        if words[0] == "train":
            raise Stopped("SIGTERM")
        return working(words, lock)

    monkeypatch.setattr(rounds, "run_stage", stopped)
    assert rounds.run_loop(loop) == 75
    monkeypatch.setattr(rounds, "run_stage", working)
    assert rounds.run_loop(loop) == 0
    names = [words[1] if words[0] != "train" else "train" for words in ran]
    of_a_round = ["sample", "rate", "build", "train", "run"]
    assert names == ["run", *of_a_round, *of_a_round], "nothing is done twice"
    ran.clear()
    assert rounds.run_loop(read_loop_file(write(tmp_path), rounds=3)) == 0
    assert all("round-3" in " ".join(words) for words in ran) and len(ran) == 5, "one more round follows"


def test_another_loop_in_the_same_directory_is_refused(tmp_path, ran):
    rounds.run_loop(read_loop_file(write(tmp_path)))
    with pytest.raises(rounds.OtherLoop, match=r"other settings \(seed: 0 then, 4 now\)"):
        rounds.run_loop(read_loop_file(write(tmp_path, seed=4)))
    rounds.run_loop(read_loop_file(write(tmp_path, rate={"base_url": "http://other:1/v1", "model": "judge"})))
    file = write(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "another"}\n')
    with pytest.raises(rounds.OtherLoop, match="prompts: .*sha256"):
        rounds.run_loop(read_loop_file(file))


def test_a_server_loads_an_adapter_once_and_says_why_not(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    with policy_server() as server:
        assert load_adapter(server.url, "mine", str(tmp_path / "adapter")) is True
        assert load_adapter(server.url, "mine", str(tmp_path / "adapter")) is False
        assert server.events == [("load", "mine")]
        with pytest.raises(AdapterNotLoaded, match="does not load /nowhere as other: 400 .*no adapter in /nowhere"):
            load_adapter(server.url, "other", "/nowhere")
        answers = server.post
        memory = {"error": {"message": "CUDA out of memory: 14 GiB already allocated"}}
        server.post = lambda path, body: (500, memory)  # "already" alone says nothing of the adapter
        with pytest.raises(AdapterNotLoaded, match="500 .*already allocated"):
            load_adapter(server.url, "other", "x")
        server.post = lambda path, body: (400, {"error": {"message": "'other' has already been loaded"}})
        assert load_adapter(server.url, "other", "x") is False
        server.post, server.get = answers, lambda path: (200, "<html>a web page</html>")
        with pytest.raises(AdapterNotLoaded, match="/v1 is no OpenAI-compatible interface"):
            load_adapter(server.url, "other", "x")
        del server.post, server.get
        server.loads_adapters = False
        with pytest.raises(AdapterNotLoaded, match="knows no /load_lora_adapter: 404 .*VLLM_ALLOW_RUNTIME_LORA"):
            load_adapter(server.url, "other", str(tmp_path / "adapter"))
    with pytest.raises(AdapterNotLoaded, match="cannot be reached"):
        load_adapter(server.url, "mine", "x")


def test_a_served_rounds_adapter_is_loaded_under_a_name_of_its_weights(tmp_path):
    with policy_server() as server:
        made = stages(tmp_path, serve={"base_url": server.url, "model": BASE})
        adapter = tmp_path / "out" / "round-1" / "adapter"
        adapter.mkdir(parents=True)
        names = []
        for weights in (b"one", b"two"):
            (adapter / "adapter_model.safetensors").write_bytes(weights)
            sample = next(made.of_round(2))
            sample.prepare()
            pool = yaml.safe_load((tmp_path / "out" / "round-2" / "pool.yaml").read_text())
            names.append(pool["members"][0]["model"])
        assert list(server.adapters) == names and names[0] != names[1]
        words = list(made.of_round(1))[-1].words()
        assert words[words.index("--model") + 1] == names[1] and "--adapter" not in words
        assert BASE in next(made.of_round(0)).words()


def test_a_loop_waits_for_the_stage_that_a_killed_one_left(tmp_path):
    """The stage inherits the lock, and keeps it when its loop is gone."""
    with held(tmp_path) as lock:
        stage = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5)"], pass_fds=(lock,))
    began = time.monotonic()
    with held(tmp_path):
        assert stage.poll() is not None or time.monotonic() - began > 0.5
    stage.wait()


def test_a_stage_is_a_process_whose_status_comes_back(tmp_path):
    with held(tmp_path) as lock:
        assert run_stage(["--version"], lock) == 0
        assert run_stage(["no-such-command"], lock) == 2
        assert "silkie no-such-command" in (tmp_path / "loop.lock").read_text()
