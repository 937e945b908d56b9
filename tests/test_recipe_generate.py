"""recipes/generate.py: the text is the engine's, by template or plain, once or turn after turn."""

import io
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import pq_ao
from recipes import generate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def expected(checkpoint, tiny_tokenizer):
    """`expected(text, special, **options)`: the reply's text."""
    engine = pq_ao.GenerationEngine(AutoModelForCausalLM.from_pretrained(checkpoint), 1, 256, compile=False)

    def reply(text: str, special: bool, **options) -> str:
        ids = tiny_tokenizer(text, return_tensors="pt", add_special_tokens=special).input_ids
        out = engine.generate(ids, max_new_tokens=12, **options)[0, ids.shape[1] :]
        return tiny_tokenizer.decode(out, skip_special_tokens=True)

    return reply


def run(checkpoint, *flags: str) -> generate.Speaker:
    return generate.main([str(checkpoint), "--device", "cpu", "--new-tokens", "12", "--max-cache-len", "256", *flags])


def test_plain_text_goes_on(checkpoint, expected, capsys):
    speaker = run(checkpoint, "--no-chat", "--prompt", "To be, or not")
    printed = capsys.readouterr().out
    assert printed.startswith(f"To be, or not{expected('To be, or not', True)}\n")
    speed = r"prefill (\d+) tokens in [\d.]+ s, [\d.]+ tokens/s; decode (\d+) tokens in [\d.]+ s, [\d.]+ tokens/s"
    found = re.fullmatch(speed, printed.splitlines()[-1])
    assert (int(found[1]), int(found[2])) == (speaker.prompt_tokens, speaker.reply_tokens)
    assert speaker.reply_tokens == 11  # the first token comes out of prefill


def test_chat_with_a_system_message_turn_after_turn(checkpoint, expected, tiny_tokenizer, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nAgain\n"))
    run(checkpoint, "--system", "Be short.")
    turns = [{"role": "system", "content": "Be short."}]
    replies = []
    for question in ("Hello", "Again"):
        turns.append({"role": "user", "content": question})
        text = tiny_tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        replies.append(expected(text, False))
        turns.append({"role": "assistant", "content": replies[-1]})
    printed = capsys.readouterr().out
    assert printed.startswith(f"> {replies[0]}\n> > {replies[1]}\n> \n")


def test_sampling_is_seeded(checkpoint, expected, capsys):
    flags = "--no-chat --prompt To --sample --temperature 1.5 --top-k 50 --top-p 0.9".split()
    run(checkpoint, *flags, "--seed", "7")
    generator = torch.Generator().manual_seed(7)
    drawn = expected("To", True, do_sample=True, temperature=1.5, top_k=50, top_p=0.9, generator=generator)
    assert capsys.readouterr().out.startswith(f"To{drawn}\n") and drawn != expected("To", True)


def test_ctrl_c_stops_a_reply_and_keeps_the_rest(checkpoint, monkeypatch, capsys):
    stream = pq_ao.GenerationEngine.stream

    def interrupted(self, *arguments, **options):
        for number, token in enumerate(stream(self, *arguments, **options)):
            if number == 3:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(pq_ao.GenerationEngine, "stream", interrupted)
    speaker = run(checkpoint, "--prompt", "To be")
    assert speaker.reply_tokens == 2 and "[stopped]" in capsys.readouterr().out


def test_a_floating_point_model_speaks_too(make_tiny, tiny_tokenizer, tmp_path, capsys):
    make_tiny("qwen2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer; name that of the original model: --tokenizer"):
        run(tmp_path, "--prompt", "To")
    tiny_tokenizer.save_pretrained(tmp_path)
    assert run(tmp_path, "--prompt", "To").reply_tokens > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--temperature 0.5", "--temperature: without effect here; add --sample"),
        ("--sample --temperature 0", "--temperature: 0: give a number above 0"),
        ("--sample --top-p 2", "--top-p 2.0: is a probability; give at most 1"),
        ("--no-chat --system Hello", "--system: without effect for plain text"),
        ("--prompt Hello --max-cache-len 2", "room for 2, .* or a larger --max-cache-len"),
    ],
)
def test_refused(checkpoint, flags, words, capsys):
    with pytest.raises((SystemExit, ValueError)) as refused:
        generate.main([str(checkpoint), "--device", "cpu", *flags.split()])
    assert re.search(words, capsys.readouterr().err + str(refused.value))


def test_no_template_no_chat(checkpoint, tiny_tokenizer, tmp_path, capsys):
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="--chat: the tokenizer has no chat template; use --no-chat"):
        run(checkpoint, "--tokenizer", str(tmp_path), "--chat")
    run(checkpoint, "--tokenizer", str(tmp_path), "--prompt", "To be")
    assert capsys.readouterr().out.startswith("To be")
