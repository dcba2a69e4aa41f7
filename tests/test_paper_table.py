# SPDX-License-Identifier: Apache-2.0
"""benchmarks/paper_table.py: its numbers, that it goes on, and what it writes."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import paper_numbers, paper_table, paper_tasks, paper_texts
from nbl_modifier.evaluation import PerplexityResult, perplexity
from nbl_modifier.evaluation.perplexity import summarize
from nbl_modifier.evaluation.scores import ratio_score
from nbl_modifier.evaluation.texts import stdlib_texts
from nbl_modifier.records.methods import METHODS_FILE_NAME, MethodsTable
from tests.tiny_llama import DEMO_MODEL, demo_tokenizer, load

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.begin]

TASKS = ("arc_easy", "winogrande", "mmlu")
PAPER, BEST, DROP, SLICED = "NBL (paper)", "NBL (best)", "DROP", "SliceGPT"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of our own in the forms of the data sets, and text to calibrate on."""
    folder: Path = tmp_path_factory.mktemp("data")
    options = {"text": ["def", "class", "return"], "label": ["A", "B", "C"]}
    arc = [
        {"question": f"What comes before name {i}?", "choices": options, "answerKey": k}
        for i, k in enumerate("ABCA")
    ]
    for name in ("arc_easy", "arc_challenge"):
        write_lines(folder / f"{name}.jsonl", arc)
    stems = [{**doc, "question_stem": doc["question"]} for doc in arc]
    write_lines(folder / "openbookqa.jsonl", stems)
    boolq = [
        {"passage": "x = 1", "question": f"is x {i}", "answer": i == 1}
        for i in range(4)
    ]
    write_lines(folder / "boolq.jsonl", boolq)
    hellaswag = [
        {"query": f"for {i} in", "choices": ["range(3):", "if", "("], "gold": i % 3}
        for i in range(4)
    ]
    write_lines(folder / "hellaswag.jsonl", hellaswag)
    piqa = [
        {"goal": f"Add {i}.", "sol1": "x += 1", "sol2": "del x", "label": i % 2}
        for i in range(4)
    ]
    write_lines(folder / "piqa.jsonl", piqa)
    winogrande = [
        {
            "sentence": f"The list held the number {i} because _ was longer.",
            "option1": "the list",
            "option2": "the number",
            "answer": str(1 + i % 2),
        }
        for i in range(4)
    ]
    write_lines(folder / "winogrande.jsonl", winogrande)
    for name, count in (("mmlu", 2), ("mmlu_dev", 3)):
        rows = [
            {
                "question": f"{name} {subject} {i}?",
                "subject": subject,
                "choices": [f"{subject} {i} {letter}" for letter in "abcd"],
                "answer": i,
            }
            for subject in ("set_theory", "parsing")
            for i in range(count)
        ]
        write_lines(folder / f"{name}.jsonl", rows)
    texts = [{"text": text} for text in stdlib_texts("calibration")[:16]]
    (folder / "text.json").write_text(json.dumps(texts), encoding="utf-8")
    other = "\n".join(stdlib_texts("heldout")[:3])
    (folder / "other.txt").write_text(other, encoding="utf-8")
    return folder


def run(data: Path, output: Path, *arguments: str) -> int:
    """Run the script on the bundled model with few layers, windows and documents."""
    command = [
        *("paper_table.py", "--model", str(DEMO_MODEL), "--data", str(data)),
        *("--calibration", f"code={data / 'text.json'}"),
        *("--text", f"other={data / 'other.txt'}", "--output", str(output)),
        *("--samples", "8", "--seq-len", "64", "--heldout-windows", "4"),
        *("--tasks", *TASKS, "--tasks-limit", "3", "--mmlu-shots", "2"),
        *("--m", "1,2", "--batch-size", "4", *arguments),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        return int(paper_table.main())


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of three methods at one number of layers."""
    output: Path = tmp_path_factory.mktemp("results")
    arguments = ("--methods", PAPER, DROP, SLICED, "--keep-checkpoints")
    assert run(data, output, *arguments, "--m", "2") == 0
    return output


def test_the_best_at_fewer_layers_goes_on_from_the_best_at_more(
    data: Path, tmp_path: Path
) -> None:
    """And is what it would have been by itself, weight for weight."""
    arguments = ("--methods", BEST, "--parts", "perplexity", "--keep-checkpoints")
    assert run(data, tmp_path / "both", *arguments) == 0
    assert run(data, tmp_path / "alone", *arguments, "--m", "1") == 0
    weights = [
        load(tmp_path / run_ / "NBL-best-m1" / "checkpoint").state_dict()
        for run_ in ("both", "alone")
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def table_in(folder: Path) -> MethodsTable:
    return MethodsTable.load(folder / METHODS_FILE_NAME)


def test_every_model_has_every_number(finished: Path) -> None:
    table = table_in(finished)
    assert [(row.method, row.m) for row in table.rows] == [
        ("base", 0),
        *((method, 2) for method in (PAPER, DROP, SLICED)),
    ]
    for row in table.rows:
        assert set(row.texts) == {"code", "other"}
        assert tuple(row.tasks) == TASKS
        assert row.average is not None
    base, paper, drop, sliced = table.rows
    assert base.kv_cache == sliced.kv_cache == 1.0
    assert paper.kv_cache == drop.kv_cache == 14 / 16
    assert drop.num_parameters < paper.num_parameters < base.num_parameters
    assert sliced.num_parameters <= paper.num_parameters
    assert len(paper.layers) == len(drop.layers) == 2
    assert base.texts["code"].over_base == (1.0, 0.0)


def test_numbers_are_those_of_the_checkpoints(finished: Path) -> None:
    """Perplexity measured again, and the arithmetic of pairs done another way."""
    settings = json.loads((finished / "settings.json").read_text())
    command = json.loads((finished / "base" / "cell.json").read_text())["command"]
    assert "paper_table.py" in command
    assert settings["num_layers"] == 16
    results: dict[str, PerplexityResult] = {}
    for name in ("base", "NBL-paper-m2", "DROP-m2"):
        part = json.loads((finished / name / "perplexity-code.json").read_text())
        fields = part["result"]
        results[name] = summarize(fields["window_nlls"], fields["window_tokens"])
    _, paper, drop, _ = table_in(finished).rows
    ratio, error = results["DROP-m2"].relative_to(results["base"])
    assert drop.texts["code"].over_base == pytest.approx((ratio, error), rel=1e-9)
    assert paper.texts["code"].recovered is None
    recovered = drop.texts["code"].recovered
    assert recovered is not None
    perplexities = {name: each.perplexity for name, each in results.items()}
    lost = perplexities["NBL-paper-m2"] - perplexities["base"]
    kept = perplexities["NBL-paper-m2"] - perplexities["DROP-m2"]
    assert recovered[0] == pytest.approx(kept / lost)
    checkpoint = load(finished / "DROP-m2" / "checkpoint")
    windows = paper_texts.load_windows(
        ("code", _argument(finished, "--calibration").partition("=")[2]),
        [],
        demo_tokenizer(),
        samples=8,
        heldout_windows=4,
        seq_len=64,
        seed=0,
    )
    again = perplexity(checkpoint, windows.heldout["code"], 4)
    assert again.window_nlls == pytest.approx(results["DROP-m2"].window_nlls, rel=1e-5)


def _argument(folder: Path, option: str) -> str:
    command = json.loads((folder / "base" / "cell.json").read_text())["command"].split()
    return str(command[command.index(option) + 1])


def test_error_of_what_is_recovered_is_that_of_many_draws() -> None:
    """Against the spread over draws of windows, three correlated models."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> tuple[float, float]:
        shared = torch.randn(200, generator=generator, dtype=torch.float64)
        scores = []
        for mean in (3.0, 3.1, 3.4):
            own = torch.randn(200, generator=generator, dtype=torch.float64)
            nlls = 10 * (mean + 0.3 * shared + 0.05 * own)
            scores.append(
                ratio_score((-nlls).tolist(), [10] * 200, "perplexity", False)
            )
        base, score, paper = scores
        value = paper_numbers.recovered(score, base, paper)
        assert value is not None
        assert value[1] is not None
        return value[0], value[1]

    draws = [draw() for _ in range(400)]
    values = torch.tensor([value for value, _ in draws], dtype=torch.float64)
    errors = torch.tensor([error for _, error in draws], dtype=torch.float64)
    # of 400 draws the spread is known to 1 / sqrt(800), 3.5 %: four times that
    assert float(errors.mean() / values.std()) == pytest.approx(1.0, abs=0.14)
    exact = (math.exp(3.4) - math.exp(3.1)) / (math.exp(3.4) - math.exp(3.0))
    assert float(values.mean()) == pytest.approx(exact, abs=0.005)


def test_only_what_is_missing_is_done_again(finished: Path, data: Path) -> None:
    cells = (finished / "base", *finished.glob("*-m2"))
    parts = [path for cell in cells for path in cell.glob("*.json")]
    before = {path: path.stat().st_mtime_ns for path in parts}
    gone = finished / "DROP-m2" / "task-mmlu.json"
    content = json.loads(gone.read_text())["result"]
    gone.unlink()
    arguments = ("--methods", PAPER, DROP, SLICED, "--keep-checkpoints")
    assert run(data, finished, *arguments, "--m", "2") == 0
    assert json.loads(gone.read_text())["result"] == content
    changed = {p for p in parts if p.stat().st_mtime_ns != before[p]}
    assert changed == {gone}


def test_other_settings_need_another_folder(finished: Path, data: Path) -> None:
    with pytest.raises(ValueError, match="tasks_limit was 3 and is 2"):
        run(data, finished, "--tasks-limit", "2")


def test_a_model_that_fails_does_not_stop_the_others(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SliceGPT has no budget without an NBL; the base model is there all the same."""
    arguments = ("--methods", SLICED, "--parts", "facts", "--m", "1")
    assert run(data, tmp_path, *arguments) == 1
    assert "Run that first" in capsys.readouterr().err
    assert [row.method for row in table_in(tmp_path).rows] == ["base"]


def test_table_and_figures(
    finished: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, finished, "--render") == 0
    text = (finished / "table.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    for name in ("figure4.png", "figure6.png"):
        assert f"]({name})" in text
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert "figure2" not in text  # no speed was measured
    drop = next(row for row in table_in(finished).rows if row.method == DROP)
    average = drop.average
    assert average is not None
    assert f"{average[0]:.4f} ± {average[1]:.4f}" in text


def test_averages_are_of_the_tasks_that_are_there(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "table"
    shutil.copytree(finished, folder)
    for path in folder.glob(f"*/task-{TASKS[0]}.json"):
        path.unlink()
    next(folder.glob(f"DROP-m2/task-{TASKS[1]}.json")).unlink()
    assert run(data, folder, "--render") == 0
    table = table_in(folder)
    assert TASKS[0] not in table.measured_on
    for row in table.rows:
        if row.method == DROP:
            assert row.average is None
            continue
        left = [row.tasks[name][0] for name in TASKS[1:]]
        assert row.average is not None
        assert row.average[0] == pytest.approx(sum(left) / len(left))


def test_no_document_is_calibrated_on_and_measured(data: Path, tmp_path: Path) -> None:
    texts = [
        f"unique{i:02d} = {i}\n" * 40
        for i in range(30)
        for _ in range(2)  # each twice
    ]
    path = tmp_path / "text.json"
    path.write_text(json.dumps([{"text": text} for text in texts]))
    tokenizer = demo_tokenizer()
    windows = paper_texts.load_windows(
        ("text", str(path)),
        [],
        tokenizer,
        samples=20,
        heldout_windows=10,
        seq_len=128,
        seed=0,
    )

    def documents(rows: Any) -> set[str]:
        words = " ".join(tokenizer.batch_decode(rows["input_ids"][:])).split()
        return {word for word in words if word.startswith("unique")}

    calibrated = documents(windows.calibration)
    measured = documents(windows.heldout["text"])
    assert len(windows.calibration) == 20
    assert len(windows.heldout["text"]) == 10
    # a window may end within a name, which is then none of these
    names = {f"unique{i:02d}" for i in range(30)}
    assert calibrated & names
    assert measured & names
    assert not calibrated & measured & names


def test_too_little_text_is_refused(data: Path) -> None:
    with pytest.raises(ValueError, match="windows where 100000 are asked for"):
        paper_texts.load_windows(
            ("text", str(data / "text.json")),
            [],
            demo_tokenizer(),
            samples=100_000,
            heldout_windows=2,
            seq_len=64,
            seed=0,
        )


def prompts_of(data: Path, folder: Path, name: str, shots: int) -> Any:
    """Return lm-eval's requests of one task: context and continuation."""
    from nbl_modifier.evaluation import load_tasks

    tasks = paper_tasks.paper_tasks(data, folder, shots)
    (task,) = load_tasks([tasks[name]])
    (object_,) = task.objects
    object_.set_config(key="num_fewshot", value=0)
    object_.build_all_requests(rank=0, world_size=1)
    return [instance.args for instance in object_.instances]


def test_examples_are_of_the_subject(data: Path, tmp_path: Path) -> None:
    requests = prompts_of(data, tmp_path, "mmlu", 2)
    assert len(requests) == 4 * 4
    for context, continuation in requests:
        question = context.rpartition("\n\n")[2]
        subject = question.split()[1]
        assert continuation in (" A", " B", " C", " D")
        other = {"set_theory": "parsing", "parsing": "set_theory"}[subject]
        assert f"mmlu_dev {subject} 0?" in context
        assert f"mmlu_dev {subject} 1?" in context
        assert f"mmlu_dev {subject} 2?" not in context
        assert f"{other} 0" not in context
        assert context.count("Answer: ") == 2


def test_no_examples_need_no_file_of_them(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for path in data.glob("*.jsonl"):
        if path.name != "mmlu_dev.jsonl":
            (folder / path.name).write_bytes(path.read_bytes())
    requests = prompts_of(folder, tmp_path / "tasks", "mmlu", 0)
    assert all("Answer: " not in context for context, _ in requests)
    with pytest.raises(FileNotFoundError, match=r"lacks mmlu_dev\.jsonl"):
        paper_tasks.paper_tasks(folder, tmp_path / "tasks", 1)
    with pytest.raises(ValueError, match="3 examples of set_theory"):
        paper_tasks.paper_tasks(data, tmp_path / "tasks", 4)


def test_winogrande_scores_the_ending_after_each_beginning(
    data: Path, tmp_path: Path
) -> None:
    requests = prompts_of(data, tmp_path, "winogrande", 0)
    assert {continuation for _, continuation in requests} == {" was longer."}
    contexts = [context for context, _ in requests]
    assert contexts[0].endswith("because the list")
    assert contexts[1].endswith("because the number")


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (" Paris.\n\nThe answer", True),
        (" PARIS", True),
        (" Parisian", False),
        ("", False),
    ],
)
def test_an_answer_is_a_word_of_the_completion(completion: str, right: bool) -> None:
    assert paper_texts.is_right(completion, ("Paris",)) is right
