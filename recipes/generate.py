"""Chats with a model, or continues a text, streaming to the terminal.

    python -m recipes.generate out/SmolLM2-135M-Instruct-w4a4kv4
    python -m recipes.generate FOLDER --prompt "What is the capital of France?"
    python -m recipes.generate FOLDER --no-chat --prompt "The capital of France is" --sample --temperature 0.7

Takes checkpoints of `pq_ao.save`, folders or hub ids, and floating-point models to compare with. With `--prompt` it
replies once, else it asks for one turn after the other until the input ends (Ctrl-D); Ctrl-C stops a reply. Where the
tokenizer has a chat template, turns go through it. At the end stand the tokens a second of prefill and decode.
"""

import argparse
from collections.abc import Iterator, Sequence

from recipes.models import add_saved_options, load_saved
from recipes.speaker import MOST_CACHE, Speaker
from recipes.terminal import above_zero, count, run, whole


def chat(speaker: Speaker, arguments: argparse.Namespace) -> None:
    """Turn after turn; with --prompt only one."""
    turns = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    for question in questions(arguments):
        turns.append({"role": "user", "content": question})
        text = speaker.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        turns.append({"role": "assistant", "content": speaker.reply(text, add_special_tokens=False)})


def questions(arguments: argparse.Namespace) -> Iterator[str]:
    """What is asked: the prompt, or lines of the input until it ends."""
    if arguments.prompt is not None:
        yield arguments.prompt
        return
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line:
            yield line


def main(argv: Sequence[str] | None = None) -> Speaker:
    """Runs everything; returns what spoke."""
    arguments = parse(argv)
    _, model, tokenizer = load_saved(arguments)
    chats = bool(tokenizer.chat_template) if arguments.chat is None else arguments.chat
    if chats and not tokenizer.chat_template:
        raise ValueError("--chat: the tokenizer has no chat template; use --no-chat, which continues plain text.")
    if arguments.system is not None and not chats:
        raise ValueError("--system: without effect for plain text; leave it out, or use --chat.")
    speaker = Speaker(model, tokenizer, arguments)
    if chats:
        chat(speaker, arguments)
    else:
        for text in questions(arguments):
            if arguments.prompt is not None:
                print(text, end="")
            speaker.reply(text, add_special_tokens=True)
    print(f"\n{speaker.speed()}")
    return speaker


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Chat with a model, or continue a text.")
    add_saved_options(parser)
    add = parser.add_argument
    add("--prompt", metavar="TEXT", help="reply to this and end (default: ask, turn after turn)")
    add("--chat", action=argparse.BooleanOptionalAction, help="default: where the tokenizer has a chat template")
    add("--system", metavar="TEXT", help="the chat's system message (default: the template's own)")
    add("--new-tokens", type=count, default=256, metavar="N", help="of a reply, at most (default: %(default)s)")
    add("--max-cache-len", type=count, metavar="N", help=f"prompt and reply (default: the context, or {MOST_CACHE})")
    add("--sample", action="store_true", help="draw tokens, instead of taking the likeliest")
    add("--temperature", type=above_zero, metavar="X", help="of drawing (default: 1)")
    add("--top-k", type=count, metavar="N", help="draw from so many tokens (default: all)")
    add("--top-p", type=above_zero, metavar="X", help="draw from tokens of this probability (default: all)")
    add("--seed", type=whole, default=0, help="of drawing (default: %(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU, as CUDA graphs")
    arguments = parser.parse_args(argv)
    if arguments.top_p is not None and arguments.top_p > 1:
        parser.error(f"--top-p {arguments.top_p}: is a probability; give at most 1")
    idle = [name for name in ("temperature", "top_k", "top_p") if getattr(arguments, name) is not None]
    if idle and not arguments.sample:
        parser.error(f"--{idle[0].replace('_', '-')}: without effect here; add --sample, or leave it out")
    return arguments


if __name__ == "__main__":
    run(main)
