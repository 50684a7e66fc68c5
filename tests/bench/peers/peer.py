"""What the peers' runners share: arguments, the clock, reading requests and writing results.

A runner loads its model, warms up, and calls `measure`. The clock runs from before the first byte of the input is read
until the results are on disk.
"""

import argparse
import json
import os
import time


def arguments():
    """A parser with what every runner takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("input", help="OpenAI Batch lines")
    parser.add_argument("output", help="where the results go, one JSON object per row")
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--sequences", type=int, required=True, help="rows in flight at once")
    return parser


def measure(options, complete):
    """Runs `complete` on the request bodies and prints the seconds by the clock.

    `complete` returns (text, prompt tokens, generated tokens) for each, in order.
    """
    start = time.perf_counter()
    with open(options.input, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    answers = complete([row["body"] for row in rows])
    with open(options.output, "w", encoding="utf-8") as file:
        for row, (text, n_prompt, n_generated) in zip(rows, answers, strict=True):
            answer = {"custom_id": row["custom_id"], "text": text, "prompt_tokens": n_prompt, "completion_tokens": n_generated}
            file.write(json.dumps(answer, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
