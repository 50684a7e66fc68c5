#!/usr/bin/env python3
"""Runs lm-evaluation-harness against a server of valar and against transformers in f32, and compares them pair by pair.

usage: compare.py [--url URL] [--model NAME] [--limit ROWS] [--reference FOLDER]

The harness's own `local-completions` asks the server (POST /v1/completions with echo and logprobs), with the server's own
tokenizer (/tokenizer_info, /tokenize). The reference is a folder in Hugging Face's form, of the dequantised weights
(tests/bench/peers/convert.py makes it): each pair of context and continuation that the harness asked for is scored by
transformers in f32. Without --reference only the harness runs. Run it from the repository's root, with HF_HUB_OFFLINE=1. Needs
`pip install "lm-eval[api]==0.4.13"`, and for the reference `torch==2.13.0 transformers==5.19.0`.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def harness(options, folder):
    """The harness's own samples: one per question, with the log-likelihood of each option."""
    where = f"base_url={options.url}/v1/completions,model={options.model},tokenizer_backend=remote,num_concurrent=8,max_retries=1"
    command = [Path(sys.executable).with_name("lm_eval"), "run", "--model", "local-completions", "--model_args", where]
    command += ["--include_path", HERE, "--tasks", "aqua_options", "--log_samples", "--output_path", folder]
    command += ["--limit", str(options.limit)] if options.limit else []
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)
    (path,) = Path(folder).rglob("samples_*.jsonl")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def pairs(sample):
    """Context, continuation and the harness's log-likelihood for each option of a question."""
    for arguments, response in zip(sample["arguments"].values(), sample["resps"]):
        yield arguments["arg_0"], arguments["arg_1"], float(response[0][0])


class Reference:
    """Log-likelihoods by transformers in f32."""

    def __init__(self, folder):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def score(self, context, continuation):
        """Of the continuation's tokens, as the harness cuts them: those after the context's own."""
        encode = lambda text: self.tokenizer.encode(text, add_special_tokens=False)
        n_context, ids = len(encode(context)), encode(context + continuation)
        with self.torch.no_grad():
            logits = self.model(self.torch.tensor([ids])).logits[0].double()
        logprobs = self.torch.log_softmax(logits[:-1], -1)
        return sum(logprobs[i - 1, ids[i]].item() for i in range(n_context, len(ids))), len(ids) - n_context


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--reference", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = harness(options, folder)
    print(f"{len(samples)} questions: the harness's accuracy through valar {sum(s['acc'] for s in samples) / len(samples):.4f}")
    if not options.reference:
        return
    reference = Reference(options.reference)
    right, same, per_token = 0, 0, []
    for sample in samples:
        ours, theirs = [], []
        for context, continuation, logprob in pairs(sample):
            exact, n_tokens = reference.score(context, continuation)
            ours.append(logprob)
            theirs.append(exact)
            per_token.append(abs(logprob - exact) / n_tokens)
        choice = theirs.index(max(theirs))
        right += choice == int(sample["target"])
        same += ours.index(max(ours)) == choice
    per_token.sort()
    n = len(per_token)
    print(f"transformers in f32: {right / len(samples):.4f}; the same option is most likely in {same} of {len(samples)} questions")
    print(f"log-likelihood per token, absolute difference over {n} options: median {per_token[n // 2]:.4f}, "
          f"95 % {per_token[math.ceil(n * 0.95) - 1]:.4f}, most {per_token[-1]:.4f} nats")


if __name__ == "__main__":
    main()
