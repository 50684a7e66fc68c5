#!/usr/bin/env python3
"""What asap calls feel of a saturating batch, and what they cost it: starts `valar serve`, and in each of several rounds makes
the same calls to the idle server and then beside a batch, so that both see the same machine. Standard library only.

usage: asap.py [--valar target/release/valar] [--model NAME] [--rounds 5] [--calls 8] [--tokens 48] [--max-step-ms 250] [--roof]

TTFT is the time to the first token, TPOT the time for each further one. `--roof` also measures what memory allows a lone call
(`valar bench roof`, and the size of the model's file, which it downloads if it has to).
"""

import argparse
import json
import math
import re
import subprocess
import tempfile
import time
from pathlib import Path

from serving import Server, words


class Measured(Server):
    """A server that is watched, and called as by somebody who waits."""

    def metrics(self):
        with self.ask("/metrics") as answer:
            text = answer.read().decode()
        return {m[1]: float(m[2]) for m in re.finditer(r"^(valar_\w+)\{[^}]*\} (\S+)$", text, re.M)}

    def tokens(self):
        """Computed so far: of prompts, and drawn."""
        metrics = self.metrics()
        return metrics["valar_prefill_tokens_total"] + metrics["valar_generated_tokens_total"]

    def call(self, model, seed, n_prompt, n_tokens):
        """An asap call: time to its first token, those between the others, its tokens."""
        body = {"model": model, "prompt": words(seed, n_prompt), "max_tokens": n_tokens, "ignore_eos": True, "stream": True,
                "stream_options": {"include_usage": True}, "temperature": 0, "metadata": {"completion_window": "asap"}}
        start = time.perf_counter()
        first = last = usage = None
        with self.ask("/v1/completions", body) as answer:
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                usage = event.get("usage") or usage
                if event.get("choices"):
                    last = time.perf_counter()
                    first = first or last
        n_drawn, n_read = usage["completion_tokens"], usage["prompt_tokens"]
        return first - start, (last - first) / max(1, n_drawn - 1), n_drawn + n_read


def batch(server, model, seed, n_rows):
    rows = [{"custom_id": f"r{i}", "params": {"model": model, "prompt": words(seed * 100_003 + i, 90), "max_tokens": 64,
             "ignore_eos": True, "temperature": 0}} for i in range(n_rows)]
    return server.json("/v1/batches", {"endpoint": "/v1/completions", "requests": rows})["id"]


def wait_for(what, is_there):
    for _ in range(3000):
        if is_there():
            return
        time.sleep(0.1)
    raise SystemExit(f"no {what} in five minutes")


def at(values, part):
    values = sorted(values)
    return values[min(len(values) - 1, math.ceil(part * len(values)) - 1)]


def rate(server, seconds):
    """Tokens a second, of what runs."""
    start, before = time.perf_counter(), server.tokens()
    time.sleep(seconds)
    return (server.tokens() - before) / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--valar", default="target/release/valar")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    for name, default in [("rounds", 5), ("calls", 8), ("tokens", 48), ("prompt-words", 60), ("rows", 4000), ("max-step-ms", 250)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--alone-s", type=float, default=8.0)
    parser.add_argument("--roof", action="store_true")
    args = parser.parse_args()
    idle, busy, lost = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        server = Measured(args, folder, f"[server]\nmax_step_ms = {args.max_step_ms}\n")
        try:
            model = server.json("/v1/models")["data"][0]["id"]
            server.call(model, 1, args.prompt_words, 4)  # pages are touched once
            for n in range(args.rounds):
                seeds = range(1000 * n, 1000 * n + args.calls)
                start = time.perf_counter()
                idle += [server.call(model, 500 + seed, args.prompt_words, args.tokens) for seed in seeds]
                idle_s = time.perf_counter() - start
                job = batch(server, model, n, args.rows)
                wait_for("batch at work", lambda: server.metrics()["valar_waiting"] > 0)
                time.sleep(2)  # until its rows are in all stages
                alone = [rate(server, args.alone_s / 2)]
                start, before = time.perf_counter(), server.tokens()
                calls = [server.call(model, seed, args.prompt_words, args.tokens) for seed in seeds]
                seconds, of_all = time.perf_counter() - start, server.tokens() - before
                alone.append(rate(server, args.alone_s / 2))
                assert server.metrics()["valar_waiting"] > 0, "the batch ended meanwhile: use more --rows"
                busy += calls
                own = sum(tokens for _, _, tokens in calls)
                # What the batch would have had in that time, less what it had; and what it would have had in the time that the
                # same calls take of the idle server.
                speed = sum(alone) / 2
                lost.append((speed * seconds - (of_all - own), speed * idle_s))
                server.json(f"/v1/batches/{job}/cancel", {})
                wait_for("idle engine", lambda: server.metrics()["valar_running"] == 0)
        finally:
            server.process.terminate()
            server.process.wait()
    print(f"{len(idle)} calls each, of {args.prompt_words} words and {args.tokens} tokens, in {args.rounds} rounds; max_step_ms {args.max_step_ms}")
    print(f"{'':<22}{'idle':>10}{'batch':>10}{'ratio':>8}")
    for name, k in [("TTFT", 0), ("TPOT", 1)]:
        for part in [0.5, 0.99]:
            a, b = (at([call[k] for call in calls], part) * 1000 for calls in (idle, busy))
            print(f"{name} p{100 * part:<3.0f} ms{'':<12}{a:>10.1f}{b:>10.1f}{b / a:>8.2f}")
    ttft_idle, ttft_busy = (at([call[0] for call in calls], 0.99) * 1000 for calls in (idle, busy))
    bound = 1.5 * ttft_idle + args.max_step_ms
    print(f"TTFT p99 beside the batch is {ttft_busy:.1f} ms; 1.5 x idle and a step are {bound:.1f} ms: {'kept' if ttft_busy <= bound else 'NOT KEPT'}")
    share = sum(tokens for tokens, _ in lost) / sum(cost for _, cost in lost)
    print(f"lost to the batch, by what the same calls take of the idle server: {share:.2f} (rounds: {', '.join(f'{a / b:.2f}' for a, b in lost)})")
    if args.roof:
        roof(args, at([call[1] for call in idle], 0.5))


def roof(args, tpot_s):
    out = subprocess.run([args.valar, "bench", "roof"], check=True, capture_output=True, text=True).stdout
    memory = float(re.search(r"read memory\s+([\d.]+) GB/s", out)[1]) * 1e9
    path = subprocess.run([args.valar, "pull", args.model], check=True, capture_output=True, text=True).stdout.strip()
    n_bytes = Path(path).stat().st_size
    print(f"a lone call reads {n_bytes / tpot_s / 1e9:.1f} GB/s of weights, memory {memory / 1e9:.1f} GB/s: {n_bytes / tpot_s / memory:.2f}")


if __name__ == "__main__":
    main()
