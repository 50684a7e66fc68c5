#!/usr/bin/env python3
"""What keeping a trajectory's KV between turns is worth: replays an agent's loop (each turn is the whole conversation so far, its
answer, and a tool's result) against two servers side by side, of which one keeps nothing. Runs are interleaved pairs, so that both
see the same machine; several agents take turns, as on a server that has more than one caller. Standard library only.

usage: trajectory.py [--valar target/release/valar] [--model NAME] [--pairs 3] [--agents 2] [--turns 10] [--tokens 40]
"""

import argparse
import tempfile
import time

from serving import Server, words


def replay(server, model, args, run):
    """The agents' loops, turn by turn: the time it takes, their prompt tokens, those that were cached, and the answers."""
    loops = [[{"role": "system", "content": f"You are agent {agent} of run {run}. " + words(1000 * run + agent, args.system_words)}]
             for agent in range(args.agents)]
    answers, start = [], time.perf_counter()
    for turn in range(args.turns):
        for agent, messages in enumerate(loops):
            result = words(f"{run} {agent} {turn}", args.result_words)
            messages.append({"role": "user", "content": f"The tool said: {result}. What next?"})
            answer = server.json("/v1/chat/completions", {
                "model": model, "messages": messages, "max_tokens": args.tokens, "ignore_eos": True, "temperature": 0,
                "metadata": {"trajectory_id": f"run {run}, agent {agent}"}})
            answers.append(answer["choices"][0]["message"]["content"])
            messages.append({"role": "assistant", "content": answers[-1]})
    seconds = time.perf_counter() - start
    shown = [server.json(f"/v1/trajectories/run%20{run},%20agent%20{agent}") for agent in range(args.agents)]
    assert all(one["turns"] == args.turns for one in shown)
    return seconds, sum(one["input_tokens"] for one in shown), sum(one["cached_tokens"] for one in shown), answers


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--valar", default="target/release/valar")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--memory", default="1GiB")
    for name, default in [("pairs", 3), ("agents", 2), ("turns", 10), ("tokens", 40), ("system-words", 150), ("result-words", 80)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    ratios, shares = [], {}
    with tempfile.TemporaryDirectory() as folder:
        servers = {}
        try:
            for percent in (50, 0):
                config = f"[trajectories]\nkeep_percent = {percent}\n"
                servers[percent] = Server(args, folder, config, f"keep-{percent}", ["--memory", args.memory])
            model = servers[0].json("/v1/models")["data"][0]["id"]
            for server in servers.values():  # pages are touched once
                server.json("/v1/completions", {"model": model, "prompt": words(0, 200), "max_tokens": 4})
            print(f"{'pair':<6}{'kept s':>9}{'not s':>9}{'ratio':>8}")
            for run in range(args.pairs):
                order = (50, 0) if run % 2 == 0 else (0, 50)
                found = {percent: replay(servers[percent], model, args, run) for percent in order}
                assert found[50][3] == found[0][3], "the same answers"
                ratios.append(found[50][0] / found[0][0])
                for percent in order:
                    shares.setdefault(percent, []).append(found[percent][1:3])
                print(f"{run:<6}{found[50][0]:>9.2f}{found[0][0]:>9.2f}{ratios[-1]:>8.2f}", flush=True)
        finally:
            for server in servers.values():
                server.process.terminate()
                server.process.wait()
    share = {percent: sum(cached for _, cached in all) / sum(prompt for prompt, _ in all) for percent, all in shares.items()}
    ratio = sorted(ratios)[len(ratios) // 2]
    print(f"{args.agents} agents of {args.turns} turns: wall time with what is kept {ratio:.2f} of that without (median of {args.pairs} pairs)")
    print(f"share of prompt tokens that were cached: {share[50]:.2f} kept, {share[0]:.2f} not")


if __name__ == "__main__":
    main()
