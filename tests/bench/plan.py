#!/usr/bin/env python3
"""Inputs for `valar bench plan`, and an independent count of what their prompts share.

usage: plan.py bbh BBH.jsonl COT_PROMPTS.jsonl     requests of BIG-Bench Hard: each task's few-shot prompt, then a question
       plan.py mooncake TRACE.jsonl                requests with the prefixes of a Mooncake trace, 16 tokens for a block of 512
       plan.py count PROMPTS.jsonl                 distinct nodes of the token trie of what `bench plan --prompts` wrote

Requests go to standard output. Sources: BIG-Bench Hard (Suzgun et al. 2022), Mooncake (Qin et al., FAST 2025).
"""

import json
import random
import sys

BLOCK_TOKENS, SCALED_TOKENS = 512, 16


def request(i, prompt, **params):
    body = {"prompt": prompt, "temperature": 0, **params}
    print(json.dumps({"custom_id": f"row-{i}", "method": "POST", "url": "/v1/completions", "body": body}))


def rows_of(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def bbh(questions, prompts):
    prefix = {row["task"]: row["fewshot_cot_prompt"] for row in rows_of(prompts)}
    rows = rows_of(questions)
    random.Random(7).shuffle(rows)  # an order that shares nothing by chance
    for i, row in enumerate(rows):
        request(i, f"{prefix[row['task']]}\n\nQ: {row['input']}\nA: Let's think step by step.\n", max_tokens=128)


def mooncake(trace):
    def block(name):
        # Equal blocks of the trace become equal tokens, different ones different tokens.
        return random.Random(name).choices(range(20, 48000), k=SCALED_TOKENS)

    for i, row in enumerate(rows_of(trace)):
        tokens = [token for name in row["hash_ids"] for token in block(name)]
        n_tokens = max(1, row["input_length"] * SCALED_TOKENS // BLOCK_TOKENS)
        n_output = max(1, row["output_length"] * SCALED_TOKENS // BLOCK_TOKENS)
        request(i, tokens[:n_tokens], max_tokens=n_output, ignore_eos=True)


def count(prompts):
    nodes, tokens = set(), 0
    for prompt in rows_of(prompts):
        # A node is its path: a hash of the one before and of its token.
        path = 0
        for token in prompt:
            path = hash((path, token))
            nodes.add(path)
        tokens += len(prompt)
    print(json.dumps({"prompt_tokens": tokens, "trie_nodes": len(nodes)}))


if __name__ == "__main__":
    commands = {"bbh": (bbh, 2), "mooncake": (mooncake, 1), "count": (count, 1)}
    command, n_files = commands.get(sys.argv[1] if len(sys.argv) > 1 else "", (None, 0))
    if command is None or len(sys.argv) != 2 + n_files:
        sys.exit(__doc__)
    command(*sys.argv[2:])
