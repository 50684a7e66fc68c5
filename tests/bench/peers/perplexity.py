#!/usr/bin/env python3
"""Perplexity of a text under one GGUF file, by llama.cpp and by valar on the same tokens.

usage: perplexity.py MODEL.gguf TEXT [--valar PROGRAM] [--device DEVICE] [--threads N]

As `llama-perplexity -c 512` counts: chunks of 512 tokens, each from an empty context, tokens 257 to 511 of each scored. If the
model's file asks for a begin token, each chunk's first token is replaced by it, on both sides.
"""

import argparse
import json
import math
import os
import subprocess
import tempfile
from pathlib import Path

CHUNK = 512
REPOSITORY = Path(__file__).resolve().parents[3]
PEERS = Path(os.environ.get("PEERS_DIR", Path.home() / ".cache/valar/peers"))


def llama(program, *words):
    """What a llama.cpp program says."""
    command = [str(word) for word in (PEERS / f"llama.cpp/bin/llama-{program}", *words)]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


def chunks(model, text):
    """The text's token ids as llama-perplexity cuts them."""

    def ids(*flags):
        said = llama("tokenize", "-m", model, "-f", text, "--ids", "--log-disable", *flags)
        return json.loads(said[said.rindex("[") :])

    tokens, bare = ids(), ids("--no-bos")
    begin = tokens[:1] if len(tokens) > len(bare) else []
    cut = [tokens[i : i + CHUNK] for i in range(0, len(tokens) - CHUNK + 1, CHUNK)]
    print(f"{len(tokens)} tokens, {len(cut)} chunks, each begins with {begin or 'its own token'}")
    return [begin + chunk[len(begin) :] for chunk in cut]


def valar(options, prompts):
    """The same by valar, whose rows give the log-probabilities of their own prompt."""
    with tempfile.TemporaryDirectory() as folder:
        rows, out = Path(folder) / "rows.jsonl", Path(folder) / "out.jsonl"
        with open(rows, "w") as file:
            for i, prompt in enumerate(prompts):
                body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0}
                line = {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body}
                print(json.dumps(line), file=file)
        command = [options.valar, "run", "--quiet", "--model", options.model, "--input", rows, "--output", out]
        command += ["--device", options.device, "--threads", options.threads]
        subprocess.run([str(word) for word in command], check=True)
        choices = [json.loads(line)["response"]["body"]["choices"][0] for line in open(out)]
    scores = [score for choice in choices for score in choice["logprobs"]["token_logprobs"][CHUNK // 2 + 1 :]]
    assert len(scores) == len(prompts) * (CHUNK // 2 - 1)
    return math.exp(-sum(scores) / len(scores))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--valar", default=REPOSITORY / "target/release/valar")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    prompts = chunks(options.model, options.text)
    print(f"valar      {valar(options, prompts):.4f}", flush=True)
    sizes = ["-c", CHUNK, "-b", CHUNK, "-ub", CHUNK, "-fa", "on", "-t", options.threads]
    said = llama("perplexity", "-m", options.model, "-f", options.text, *sizes)
    print(f"llama.cpp  {said[said.rindex('PPL = ') + 6 :].split()[0]}")


if __name__ == "__main__":
    main()
