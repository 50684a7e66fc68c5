#!/usr/bin/env python3
"""Writes the four workloads as OpenAI Batch files: the same bytes on every machine.

usage: generate.py FOLDER [--questions FILE ...] [--book FILE]
"""

import argparse
import json
import random
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
QUESTIONS = [REPOSITORY / "datasets/gsm8k/test.jsonl", REPOSITORY / "datasets/aqua/dev.jsonl"]
BOOK = REPOSITORY / "tests/golden/ppl_sherlock_20k.txt"


def words(text):
    return len(text.split())


def user(content):
    return [{"role": "user", "content": content}]


def between(questions, seed, low, high):
    """The questions of `low` to `high` words, shuffled."""
    fitting = [q for q in questions if low <= words(q["question"]) <= high]
    random.Random(seed).shuffle(fitting)
    return fitting


def decode(questions):
    """Short prompts, long answers."""
    return [user(q["question"]) for q in between(questions, "decode", 16, 85)[:256]]


def prefill(book):
    """Long prompts that share nothing, short answers: passages that begin anywhere in the book."""
    dice = random.Random("prefill")
    pieces = re.findall(r"\S+\s*", book)
    chats = []
    for start in dice.sample(range(len(pieces) - 520), 256):
        passage = "".join(pieces[start : start + dice.randint(230, 520)]).strip()
        chats.append(user(f"{passage}\n\nIn one sentence: what happens here?"))
    return chats


def shared(questions):
    """One long system message before every short question: worked examples, 531 tokens."""
    solved = [q for q in between(questions, "examples", 25, 50) if "####" in q.get("answer", "")]
    system = "Solve each problem step by step and end with the result after ####, as here."
    n_examples = 0
    while words(system) < 290:
        worked = re.sub(r"<<.*?>>", "", solved[n_examples]["answer"])
        system += f"\n\nProblem: {solved[n_examples]['question']}\nSolution: {worked}"
        n_examples += 1
    asked = [q["question"] for q in between(questions, "shared", 14, 42) if q not in solved[:n_examples]]
    return [[{"role": "system", "content": system}, *user(question)] for question in asked[:256]]


def classify(questions):
    """One token per row."""
    ask = "Is the person in this problem buying or selling something? Say only yes or no."
    return [user(f"{q['question']}\n\n{ask}") for q in between(questions, "classify", 8, 150)[:1024]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=Path, nargs="+", default=QUESTIONS, help="JSONL with question and answer")
    parser.add_argument("--book", type=Path, default=BOOK, help="plain text of 15,000 words or more")
    options = parser.parse_args()

    questions = [json.loads(line) for file in options.questions for line in open(file, encoding="utf-8")]
    workloads = {
        "w1_decode": (decode(questions), 128),
        "w2_prefill": (prefill(options.book.read_text("utf-8")), 16),
        "w3_shared": (shared(questions), 32),
        "w4_class": (classify(questions), 1),
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, (chats, max_tokens) in workloads.items():
        with open(options.folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for i, messages in enumerate(chats):
                body = {"model": "SmolLM2-135M-Instruct", "messages": messages, "max_tokens": max_tokens}
                body |= {"temperature": 0, "ignore_eos": True}
                line = {"custom_id": f"{name}-{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(f"{name}: {len(chats)} rows of {max_tokens} tokens")


if __name__ == "__main__":
    main()
