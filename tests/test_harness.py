"""lm-eval's numbers are those of plain logits behind the prefix, whatever the batch; text is that of `generate`."""

import copy
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

import pq_ao
from pq_ao.attention import UnpackedCacheWarning
from pq_ao.harness import PrefixQuantLM, evaluate_tasks

pytestmark = pytest.mark.usefixtures("one_thread")

PREFIX = (5, 0)
SMALL = {"num_sequences": 2, "sequence_length": 32, "search": "none", "progress": False}

# of different lengths, two with the same context, one without any
PAIRS = [
    ("The capital of France", " is Paris, on the river."),
    ("The capital of France", " is Rome"),
    ("It", " was"),
    ("", "Once upon a time"),
    ("A long question, with more words than the others, about the weather in the north of Europe:", " cold"),
]


@pytest.fixture(scope="module")
def models(make_tiny, tiny_tokenizer, english) -> dict:
    """One tiny model as loaded ("float"), calibrated ("calibrated") and quantized ("quantized")."""
    made = {"float": make_tiny("llama"), "calibrated": make_tiny("llama")}
    config = pq_ao.prefixquant_config()
    pq_ao.calibrate(made["calibrated"], tiny_tokenizer, config, data=english, prefix_ids=PREFIX, **SMALL)
    made["quantized"] = copy.deepcopy(made["calibrated"])
    quantize_(made["quantized"], config)
    return made


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=0) for args in arguments]


def adapter(model, tokenizer, batch_size: int = 1, **options) -> PrefixQuantLM:
    return PrefixQuantLM(model, tokenizer, batch_size=batch_size, progress=False, **options)


def ids_of(tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """All ids of a request, and how many of them are scored."""
    if not context:
        ids = [tokenizer.bos_token_id, *tokenizer(continuation, add_special_tokens=False).input_ids]
        return ids, len(ids) - 1
    ids = tokenizer(context + continuation).input_ids
    return ids, len(ids) - len(tokenizer(context).input_ids)


@torch.no_grad()
def by_hand(model, ids: list[int], scored: int, first: int = 0) -> float:
    """Log-likelihood of the last `scored` ids from plain logits, of which the first `first` belong to a prefix."""
    logits = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0]
    chosen = logits.float().log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    return float(chosen[len(ids) - 1 - scored :].sum())


@pytest.mark.parametrize("name", ["float", "calibrated", "quantized"])
def test_likelihood_is_the_sum_of_plain_log_probabilities(models, tiny_tokenizer, name):
    found = adapter(models[name], tiny_tokenizer).loglikelihood(requests("loglikelihood", PAIRS))
    expected = [by_hand(models[name], *ids_of(tiny_tokenizer, *pair)) for pair in PAIRS]
    assert [value for value, _ in found] == pytest.approx(expected, rel=1e-6)


def test_calibrated_model_is_scored_behind_its_prefix(models, tiny_tokenizer):
    """Its likelihoods are those of the model as it was loaded, with the prefix as real tokens in front."""
    found = adapter(models["calibrated"], tiny_tokenizer, 8).loglikelihood(requests("loglikelihood", PAIRS))
    for (value, _), pair in zip(found, PAIRS, strict=True):
        ids, scored = ids_of(tiny_tokenizer, *pair)
        assert value == pytest.approx(by_hand(models["float"], [*PREFIX, *ids], scored), rel=1e-4)
        assert abs(value - by_hand(models["float"], ids, scored)) > 1e-2


@pytest.mark.parametrize("name", ["calibrated", "quantized"])
def test_padding_on_the_right_changes_no_likelihood(models, tiny_tokenizer, name):
    asked = requests("loglikelihood", PAIRS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnpackedCacheWarning)
        alone, together = (adapter(models[name], tiny_tokenizer, size).loglikelihood(asked) for size in (1, 8))
    assert [greedy for _, greedy in alone] == [greedy for _, greedy in together]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], rel=1e-5)


def test_whole_text_follows_one_bos_that_is_not_scored(models, tiny_tokenizer):
    text = "The quick brown fox jumps over the lazy dog."
    bos, ids = tiny_tokenizer.bos_token_id, tiny_tokenizer(text, add_special_tokens=False).input_ids
    assert tiny_tokenizer(text).input_ids == [bos, *ids]  # else the test would show nothing
    lm = adapter(models["quantized"], tiny_tokenizer)
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    assert found == pytest.approx(by_hand(models["quantized"], [bos, *ids], len(ids)), rel=1e-6)
    assert lm.tok_encode(text) == [bos, *ids]  # other requests keep what the tokenizer adds


CONTEXTS = list(dict.fromkeys(context for context, _ in PAIRS if context))


def generated(model, tokenizer, context: str, new_tokens: int) -> str:
    """What greedy `generate` writes behind one context, unpadded."""
    inputs = tokenizer(context, return_tensors="pt")
    length = inputs.input_ids.shape[1]
    cache = pq_ao.PrefixStaticCache(model, batch_size=1, max_cache_len=length + new_tokens)
    out = model.generate(**inputs, past_key_values=cache, do_sample=False, max_new_tokens=new_tokens)
    return tokenizer.decode(out[0, length:], skip_special_tokens=True)


# integers may round otherwise in another batch, and then write another text: there, one context at a time
@pytest.mark.parametrize(("name", "batch_size"), [("calibrated", 8), ("quantized", 1)])
def test_batch_padded_on_the_left_writes_what_generate_writes(models, tiny_tokenizer, name, batch_size):
    model = models[name]
    expected = [generated(model, tiny_tokenizer, context, 12) for context in CONTEXTS]
    assert len(set(expected)) == len(CONTEXTS)
    asked = [(context, {"until": [], "max_gen_toks": 12}) for context in CONTEXTS]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnpackedCacheWarning)
        lm = adapter(model, tiny_tokenizer, batch_size)
        assert lm.generate_until(requests("generate_until", asked)) == expected


def test_generation_stops_at_a_stop_sequence(models, tiny_tokenizer):
    whole = generated(models["calibrated"], tiny_tokenizer, CONTEXTS[0], 12)
    stop = whole[len(whole) // 2 :][:2]
    asked = [(CONTEXTS[0], {"until": [stop], "max_gen_toks": 12})]
    (found,) = adapter(models["calibrated"], tiny_tokenizer).generate_until(requests("generate_until", asked))
    assert found == whole.split(stop)[0] != whole


def test_beams_get_a_cache_of_their_own_size(models, tiny_tokenizer):
    asked = [(context, {"until": [], "max_gen_toks": 4, "num_beams": 3}) for context in CONTEXTS[:2]]
    found = adapter(models["calibrated"], tiny_tokenizer, 2).generate_until(requests("generate_until", asked))
    inputs = tiny_tokenizer(CONTEXTS[0], return_tensors="pt")
    out = models["calibrated"].generate(**inputs, num_beams=3, do_sample=False, max_new_tokens=4)
    assert found[0] == tiny_tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_model_and_tokenizer_are_left_as_they_were(make_tiny, tiny_tokenizer, english):
    """lm-eval ties weights, which a rotation has untied, and adds a padding token."""
    model, tokenizer = make_tiny("llama", tied=True), copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = None
    pq_ao.calibrate(model, tokenizer, data=english, **SMALL)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = model(ids).logits
        adapter(model, tokenizer)
        assert torch.equal(model(ids).logits, before)
    assert tokenizer.pad_token is None


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_tiny, tiny_tokenizer) -> Path:
    """Folder of a tiny model and its tokenizer, as a user has one."""
    folder = tmp_path_factory.mktemp("model")
    make_tiny("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_model_given_by_name_is_calibrated_and_quantized_as_by_hand(saved, english, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(english), encoding="utf-8")
    arguments = (
        f"pretrained={saved},scheme=w4a8kv4,mode=dynamic,rotation=False,calibration={corpus},num_sequences=2,"
        "sequence_length=32,search=none,seed=3,progress=False"
    )
    lm = get_model("pq_ao").create_from_arg_string(arguments, {"device": "cpu", "batch_size": 4})
    assert type(lm) is PrefixQuantLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    config = pq_ao.prefixquant_config("w4a8kv4", mode="dynamic", rotation=False)
    record = pq_ao.calibrate(model, tokenizer, config, data=str(corpus), seed=3, **SMALL)
    quantize_(model, config)
    asked = requests("loglikelihood", PAIRS)
    assert lm.loglikelihood(asked) == adapter(model, tokenizer, 4).loglikelihood(asked)
    described = lm.get_model_info()["prefixquant"]
    assert described["act_bits"] == 8 and described["prefix_ids"] == list(record.prefix.prefix_ids)


def test_name_without_a_scheme_is_floating_point(saved, models, tiny_tokenizer):
    """lm-eval's own parser turns the word none into None."""
    for scheme in ("", ",scheme=none"):
        lm = get_model("pq_ao").create_from_arg_string(f"pretrained={saved},progress=False{scheme}", {"device": "cpu"})
        asked = requests("loglikelihood", PAIRS)
        assert lm.loglikelihood(asked) == adapter(models["float"], tiny_tokenizer).loglikelihood(asked)
        assert "prefixquant" not in lm.get_model_info()


def test_arguments_that_would_do_nothing_are_refused(models, tiny_tokenizer, saved):
    with pytest.raises(ValueError, match="calibration, mode: without effect for scheme='none'"):
        PrefixQuantLM(str(saved), mode="dynamic", calibration="embedded")
    with pytest.raises(ValueError, match="scheme='w4a4kv4': a live model is evaluated as it is"):
        PrefixQuantLM(models["float"], tiny_tokenizer, scheme="w4a4kv4")
    with pytest.raises(ValueError, match="scheme='w2' is unknown"):
        PrefixQuantLM(str(saved), scheme="w2")


ARC = [
    {
        "question": {"stem": stem, "choices": [{"text": text, "label": n} for n, text in enumerate(choices, 1)]},
        "answerKey": str(answer),
    }
    for stem, choices, answer in [
        ("Which is hot?", ["ice", "the sun", "fog in the morning", "dew", "air"], 2),
        ("What falls?", ["rain", "a mountain that is high", "light"], 1),
        ("What is it?", ["this", "that"], 2),
        ("Who?", ["she", "the old man and the sea", "they", "he"], 4),
    ]
]
WINOGRANDE = [
    {"sentence": "Ann beat Eve so _ got the prize.", "option1": "Ann", "option2": "Eve", "answer": "1"},
    {"sentence": "The cup fell off the _ and broke.", "option1": "tall table", "option2": "mat", "answer": "2"},
]


@pytest.fixture
def records(tmp_path) -> Path:
    """Folder with records of two tasks."""
    for name, lines in (("arc_easy", ARC), ("winogrande", WINOGRANDE)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return tmp_path


@pytest.fixture
def isolated(monkeypatch):
    """No process may start, and no connection may be made."""

    def refuse(*args, **kwargs):
        raise AssertionError("a process or a connection")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("os.fork", refuse)


def accuracies(model, tokenizer, records: list[dict]) -> tuple[list[bool], list[bool]]:
    """Of each ARC record, whether the likeliest choice is right: by its sum, and by its mean over characters."""
    plain, normalised = [], []
    for record in records:
        texts = [choice["text"] for choice in record["question"]["choices"]]
        context = f"Question: {record['question']['stem']}\nAnswer:"
        sums = [by_hand(model, *ids_of(tokenizer, context, f" {text}")) for text in texts]
        means = [value / len(text) for value, text in zip(sums, texts, strict=True)]
        right = int(record["answerKey"]) - 1
        plain.append(max(range(len(texts)), key=sums.__getitem__) == right)
        normalised.append(max(range(len(texts)), key=means.__getitem__) == right)
    return plain, normalised


@pytest.mark.usefixtures("isolated")
@pytest.mark.parametrize("name", ["float", "quantized"])
def test_rows_hold_accuracies_counted_by_hand(models, tiny_tokenizer, records, name):
    tasks = pq_ao.local_tasks(records, ["arc_easy_local", "winogrande_local"])
    rows = evaluate_tasks(models[name], tiny_tokenizer, tasks, batch_size=3, progress=False)
    plain, normalised = accuracies(models[name], tiny_tokenizer, ARC)
    row = rows[0]
    assert list(row) == ["task", "acc", "stderr", "acc_norm", "acc_norm_stderr", "records"]
    assert (row["task"], row["records"]) == ("arc_easy_local", 4)
    assert row["acc"] == statistics.fmean(plain) and row["acc_norm"] == statistics.fmean(normalised)
    assert row["stderr"] == pytest.approx(statistics.stdev(plain) / math.sqrt(4))
    assert row["acc_norm_stderr"] == pytest.approx(statistics.stdev(normalised) / math.sqrt(4))
    assert rows[1] | {"acc": None, "stderr": None} == dict.fromkeys(rows[1]) | {
        "task": "winogrande_local",
        "records": 2,
    }
    # tasks serve one model after another
    assert evaluate_tasks(models[name], tiny_tokenizer, tasks, batch_size=1, progress=False) == rows


def test_single_record_has_no_standard_error(models, tiny_tokenizer, records):
    tasks = pq_ao.local_tasks(records, ["arc_easy_local"])
    (row,) = evaluate_tasks(models["float"], tiny_tokenizer, tasks, limit=1, progress=False)
    assert row["records"] == 1 and row["acc"] in (0.0, 1.0)
    assert row["stderr"] is None and row["acc_norm_stderr"] is None


def test_bars_are_shown_when_asked_for(models, tiny_tokenizer, records, capsys):
    tasks = pq_ao.local_tasks(records, ["winogrande_local"])
    for progress in (True, False):
        evaluate_tasks(models["float"], tiny_tokenizer, tasks, progress=progress)
        assert ("Running loglikelihood requests" in capsys.readouterr().err) == progress


def test_what_cannot_be_evaluated_is_refused(models, tiny_tokenizer, records):
    tasks = pq_ao.local_tasks(records, ["arc_easy_local"])
    arguments = (models["float"], tiny_tokenizer)
    for wrong in ("piqa", ["arc_easy_local"], {"piqa": "piqa"}):
        with pytest.raises(TypeError, match=r"tasks: must be tasks .* pq_ao\.local_tasks\(folder\)"):
            evaluate_tasks(*arguments, wrong)
    with pytest.raises(ValueError, match="tasks: is empty"):
        evaluate_tasks(*arguments, {})
    with pytest.raises(ValueError, match="limit=0"):
        evaluate_tasks(*arguments, tasks, limit=0)
    with pytest.raises(TypeError, match="batch_size='auto'"):
        evaluate_tasks(*arguments, tasks, batch_size="auto")
    tasks["arc_easy_local"].override_metric("perplexity")
    with pytest.raises(ValueError, match="arc_easy_local: no metric 'acc'"):
        evaluate_tasks(*arguments, tasks)


@pytest.mark.usefixtures("isolated")
def test_trained_model_scores_as_under_lm_evals_own_adapter(data_folder):
    folder = data_folder / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tasks = pq_ao.local_tasks(data_folder)
    rows = evaluate_tasks(model, tokenizer, tasks, batch_size=8, limit=12, progress=False)
    theirs = evaluate(HFLM(model, tokenizer=tokenizer, batch_size=3), {"tasks": tasks}, limit=12, bootstrap_iters=1)
    for row in rows:
        expected = theirs["results"][row["task"]]
        assert row["acc"] == expected["acc,none"] and row["acc_norm"] == expected.get("acc_norm,none")
        assert row["stderr"] == pytest.approx(expected["acc_stderr,none"])
        assert row["records"] == 12


def test_without_lm_eval_the_error_says_how_to_get_it(monkeypatch):
    for name in [name for name in sys.modules if name == "lm_eval" or name.startswith("lm_eval.")]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("pq_ao.harness", "pq_ao.tasks.local_task"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(ImportError, match=rf"{name.removesuffix('.local_task')} needs .*pip install lm-eval accel"):
            importlib.import_module(name)
    import pq_ao.tasks.records  # noqa: F401  (the formats alone need nothing)


@pytest.mark.slow
def test_command_line_is_lm_evals_with_the_model_and_the_local_tasks(saved, records, tmp_path):
    command = [sys.executable, "-m", "pq_ao.harness", "--model", "pq_ao", "--tasks", "arc_easy_local"]
    settings = ["--metadata", f"data_folder={records}", "--device", "cpu", "--output_path", str(tmp_path / "out")]
    model = f"pretrained={saved},scheme=w4a4kv4,num_sequences=2,sequence_length=32,search=none,progress=False"
    done = subprocess.run(
        [*command, *settings, "--model_args", model],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())
    assert results["n-samples"]["arc_easy_local"] == {"original": 4, "effective": 4}
    assert results["config"]["prefixquant"]["weight_bits"] == 4
