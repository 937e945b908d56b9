"""Local tasks: the requests and scores of lm-eval's own tasks, odd records, and what is refused."""

import gzip
import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

import pq_ao
from pq_ao.tasks import ALL_TASKS, PAPER_TASKS, TASKS_FOLDER

# Two records of each task in the form of the local file, and in that of the data set that lm-eval loads.
PIQA = [
    {"idx": 0, "goal": "dresser", "sol1": "replace drawer ", "sol2": "finish, with  pin", "label": 1},
    {"goal": 'How do I "fix" it?', "sol1": "It's easy.", "sol2": "Don't.", "label": 0},
]
ARC_LOCAL = [
    {
        "id": "a",
        "question": {
            "stem": "Which is hot?",
            "choices": [
                {"text": text, "label": label} for label, text in enumerate(("ice", "sun", "fog", "dew", "air"), 1)
            ],
        },
        "answerKey": 2,
    },
    {
        "question": {"stem": "It's what?", "choices": [{"text": "a 'b'", "label": "A"}, {"text": "c", "label": "B"}]},
        "answerKey": "A",
    },
]
ARC = [
    {
        "question": "Which is hot?",
        "choices": {"text": "ice sun fog dew air".split(), "label": list("12345")},
        "answerKey": "2",
    },
    {"question": "It's what?", "choices": {"text": ["a 'b'", "c"], "label": ["A", "B"]}, "answerKey": "A"},
]
HELLASWAG_LOCAL = [
    {
        "query": "High jump: A boy runs. The boy",
        "endings": ["runs  off.", "sits.", "[step] jumps.", "flies."],
        "label": 2,
    },
    {"query": "Health: How to sleep. Lie down [here]. Then", "endings": ["wake.", "sleep."], "label": "1"},
]
HELLASWAG = [
    {
        "activity_label": "High jump",
        "ctx_a": "A boy runs.",
        "ctx_b": "the boy",
        "endings": ["runs  off.", "sits.", "[step] jumps.", "flies."],
        "label": "2",
    },
    {
        "activity_label": "Health",
        "ctx_a": "[header] How to sleep [title] Lie down [here].",
        "ctx_b": "then",
        "endings": ["wake.", "sleep."],
        "label": "1",
    },
]
WINOGRANDE = [
    {"sentence": "Ann beat Eve so _ got the prize.", "option1": "Ann", "option2": "Eve", "answer": "1"},
    {"sentence": "The cup fell off the _ , it broke.", "option1": "tall table", "option2": "mat", "answer": "2"},
]
LAMBADA_LOCAL = [
    {"context": 'Give me a minute.\n\n"I can do it on my own,', "continuation": "Shane"},
    {"context": "It is", "continuation": "here"},
]
LAMBADA = [{"text": f"{record['context']} {record['continuation']}"} for record in LAMBADA_LOCAL]

FORMATS = {
    "piqa_local": (PIQA, PIQA, "piqa/piqa.yaml"),
    "arc_easy_local": (ARC_LOCAL, ARC, "arc/arc_easy.yaml"),
    "arc_challenge_local": (ARC_LOCAL, ARC, "arc/arc_challenge.yaml"),
    "hellaswag_local": (HELLASWAG_LOCAL, HELLASWAG, "hellaswag/hellaswag.yaml"),
    "winogrande_local": (WINOGRANDE, WINOGRANDE, "winogrande/default.yaml"),
    "lambada_openai_local": (LAMBADA_LOCAL, LAMBADA, "lambada/lambada_openai.yaml"),
}


def write(folder: Path, name: str, records: list[dict]) -> Path:
    """Writes the records of task `name` where `local_tasks` looks for them."""
    path = folder / f"{name.removesuffix('_local')}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def local_task(folder: Path, name: str, records: list[dict]) -> ConfigurableTask:
    write(folder, name, records)
    return pq_ao.local_tasks(folder, [name])[name]


def published_task(yaml: str, records: list[dict]) -> ConfigurableTask:
    """lm-eval's own task over `records` in place of its data set."""
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / yaml)
    config.pop("tag", None)

    class Published(ConfigurableTask):
        def download(self, *args, **kwargs) -> None:
            data = Dataset.from_list(records)
            self.dataset = {"train": data, "validation": data, "test": data}

    return Published(config=config)


def requests(task: ConfigurableTask) -> list[tuple]:
    task.build_all_requests()
    return [instance.arguments for instance in task.instances]


@pytest.mark.parametrize("name", ALL_TASKS)
def test_requests_and_scores_are_those_of_the_task_of_lm_eval(tmp_path, name):
    records, original, yaml = FORMATS[name]
    ours, theirs = local_task(tmp_path, name, records), published_task(yaml, original)
    assert requests(ours) == requests(theirs)
    assert {k: f.__name__ for k, f in ours.aggregation().items()} == {
        k: f.__name__ for k, f in theirs.aggregation().items()
    }
    for index in range(len(records)):
        count = sum(instance.doc_id == index for instance in ours.instances)
        for best in range(count):
            # the best sum is long, so that the normalised accuracy may disagree
            likelihoods = [(-1.0 if choice == best else -1.5, choice == best) for choice in range(count)]
            scores = [task.process_results(list(task.eval_docs)[index], likelihoods) for task in (ours, theirs)]
            assert scores[0] == scores[1]


def test_labels_are_compared_not_counted(tmp_path):
    """Files write them as letters or numbers, as strings or not; a question may have any number of choices."""
    records = [
        {"question": {"stem": "s", "choices": [{"text": f"t{n}", "label": n} for n in (3, 1, 2)]}, "answerKey": "1"},
        {"question": {"stem": "s", "choices": [{"text": f"t{n}", "label": n} for n in "EDCBA"]}, "answerKey": "A"},
    ]
    task = local_task(tmp_path, "arc_challenge_local", records)
    docs = list(task.eval_docs)
    assert [task.doc_to_target(doc) for doc in docs] == [1, 4]
    assert [len(task.doc_to_choice(doc)) for doc in docs] == [3, 5]


def test_choices_follow_the_order_of_names_and_default_to_the_papers_five(tmp_path):
    for name, (records, _, _) in FORMATS.items():
        write(tmp_path, name, records)
    assert tuple(pq_ao.local_tasks(tmp_path)) == PAPER_TASKS
    assert tuple(pq_ao.local_tasks(str(tmp_path), ALL_TASKS[::-1])) == ALL_TASKS[::-1]
    assert tuple(pq_ao.local_tasks(tmp_path, "piqa_local")) == ("piqa_local",)


@pytest.mark.parametrize("place", ["piqa.jsonl", "piqa.jsonl.gz", "piqa/piqa_dev.jsonl", "piqa/any.jsonl.gz"])
def test_files_are_found_plain_or_compressed_and_lines_end_at_newlines_only(tmp_path, place):
    records = [PIQA[0] | {"goal": "a\u2028b\u0085c"}, PIQA[1]]
    text = "\ufeff" + "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if place.endswith(".gz") else text.encode())
    goals = pq_ao.local_tasks(tmp_path, ["piqa_local"])["piqa_local"].eval_docs["goal"]
    assert list(goals) == ["a\u2028b\u0085c", PIQA[1]["goal"]]


def _arc(**changes) -> dict:
    return ARC_LOCAL[0] | changes


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("piqa_local", {"goal": "g", "sol1": "a", "label": 0}, r"field 'sol2' is missing; there are \['goal'"),
        ("piqa_local", PIQA[0] | {"goal": 3}, "goal=3 is a int; must be a str"),
        ("piqa_local", PIQA[0] | {"label": 2}, "label=2: must be an index from 0 to 1"),
        ("piqa_local", PIQA[0] | {"label": -1}, "label=-1"),
        ("piqa_local", PIQA[0] | {"label": True}, "label=True"),
        ("arc_easy_local", _arc(question="which"), "question='which' is a str"),
        ("arc_easy_local", _arc(question={"stem": "s", "choices": [{"text": "t"}]}), "field 'label' is missing"),
        ("arc_easy_local", _arc(answerKey="B"), r"answerKey='B' is none of the labels \['1', '2'"),
        ("hellaswag_local", HELLASWAG[0], "field 'query' is missing"),
        ("hellaswag_local", HELLASWAG_LOCAL[0] | {"label": "4"}, "label='4': must be an index from 0 to 3"),
        ("hellaswag_local", HELLASWAG_LOCAL[0] | {"endings": ["a", None]}, r"endings\[\]=None"),
        ("winogrande_local", WINOGRANDE[0] | {"sentence": "no blank"}, "has no blank"),
        ("winogrande_local", WINOGRANDE[0] | {"answer": ""}, "answer='': must be '1' or '2'"),
        ("lambada_openai_local", {"text": "all in one"}, "field 'context' is missing"),
    ],
)
def test_record_that_does_not_fit_is_named_by_file_line_and_field(tmp_path, name, record, message):
    path = write(tmp_path, name, [FORMATS[name][0][0], record])
    with pytest.raises(ValueError, match=rf"{path.name}, line 2: .*{message}"):
        pq_ao.local_tasks(tmp_path, [name])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no records"),
        (b'{"goal": ', "line 1: Expecting value"),
        (b"[1]", "line 1: an object is needed, got a list"),
        (b"\xff\xfe", "not whole UTF-8"),
    ],
)
def test_file_that_is_no_jsonl_is_refused(tmp_path, data, message):
    (tmp_path / "piqa.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        pq_ao.local_tasks(tmp_path, ["piqa_local"])


def test_cut_gzip_is_refused(tmp_path):
    (tmp_path / "piqa.jsonl.gz").write_bytes(gzip.compress(json.dumps(PIQA[0]).encode())[:-12])
    with pytest.raises(ValueError, match="not whole UTF-8 text"):
        pq_ao.local_tasks(tmp_path, ["piqa_local"])


def test_missing_and_ambiguous_files_and_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no records of piqa; put there one of piqa\.jsonl,"):
        pq_ao.local_tasks(tmp_path)
    write(tmp_path, "piqa_local", PIQA)
    (tmp_path / "piqa").mkdir()
    write(tmp_path / "piqa", "piqa_local", PIQA)
    with pytest.raises(ValueError, match=r"several files for piqa: piqa\.jsonl, piqa/piqa\.jsonl"):
        pq_ao.local_tasks(tmp_path, ["piqa_local"])
    with pytest.raises(ValueError, match=r"names=\['piqa'\]: must be some of piqa_local,"):
        pq_ao.local_tasks(tmp_path, ["piqa"])
    with pytest.raises(ValueError, match=r"names=\[\]"):
        pq_ao.local_tasks(tmp_path, [])


def test_lm_eval_without_the_folder_says_how_to_name_it():
    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False)
    assert manager.all_tasks == sorted(ALL_TASKS)
    with pytest.raises(ValueError, match="'piqa_local': no data_folder is named.*--metadata data_folder"):
        manager.load(["piqa_local"])


def test_real_files_have_every_record(data_folder):
    counts = {name: len(task.eval_docs) for name, task in pq_ao.local_tasks(data_folder, ALL_TASKS).items()}
    assert tuple(counts.values()) == (919, 1188, 586, 5021, 633, 2576)
