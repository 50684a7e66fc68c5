#!/usr/bin/env python3
"""Runs valar and its peers in turn on the same files and prints a table with ratios. README.md says what is measured."""

import argparse
import glob
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
WORKLOADS = ["w1_decode", "w2_prefill", "w3_shared", "w4_class"]
PEERS = ["llama.cpp", "vllm-bf16", "vllm-w8a8", "openvino-int8"]
FREE_LOAD = 2.0  # seconds of valar's life that may lie outside the clock


def arguments():
    folder = Path(os.environ.get("PEERS_DIR", Path.home() / ".cache/valar/peers"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, choices=WORKLOADS)
    parser.add_argument("--files", type=Path, default=folder / "workloads", help="folder with the workloads' .jsonl files")
    parser.add_argument("--limit", type=int, help="only the first rows")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--valar", type=Path, default=HERE.parents[2] / "target/release/valar")
    parser.add_argument("--models", type=Path, default=folder / "models", help="folder with one model in all its forms")
    parser.add_argument("--weights", default="Q4_1", help="type of valar's file: *.TYPE.gguf in that folder")
    parser.add_argument("--llama-weights", default="BF16", help="type of llama.cpp's file")
    parser.add_argument("--results", type=Path, help="append every run to this file, one JSON object a line")
    parser.add_argument("--peers-dir", type=Path, default=folder, help="where install.sh put the peers")
    return parser.parse_args()


def gguf(models, weights):
    """The model's file of that type."""
    found = list(models.glob(f"*.{weights}.gguf"))
    if len(found) != 1:
        raise SystemExit(f"{models}: {len(found)} files *.{weights}.gguf, not one")
    return found[0]


def command(program, workload, options):
    """How a program is started: the best setting known for each peer, one setting for valar."""
    folder, threads = options.peers_dir, ["--threads", options.threads]
    models = options.models
    vllm = [folder / "vllm/bin/python", HERE / "run_vllm.py"]
    openvino = [folder / "openvino/bin/python", HERE / "run_openvino.py"]
    match program:
        case "valar":
            return [options.valar, "bench", "--json", "--model", gguf(models, options.weights), *threads]
        case "llama.cpp":
            slots = 16 if workload == "w3_shared" else 64  # every slot computes the shared prefix once
            model = gguf(models, options.llama_weights)
            server = folder / "llama.cpp/bin/llama-server"
            llamacpp = [sys.executable, HERE / "run_llamacpp.py", "--server", server]
            return [*llamacpp, "--model", model, "--sequences", slots, *threads]
        case "vllm-bf16":
            sequences, tokens = (256, 2048) if workload == "w1_decode" else (128, 4096)
            size = ["--sequences", sequences, "--step-tokens", tokens]
            return [*vllm, "--model", models / "f32", *size, *threads]
        case "vllm-w8a8":
            size = ["--sequences", 256, "--step-tokens", 2048]
            return [*vllm, "--model", models / "w8a8", *size, *threads]
        case "openvino-int8":
            size = ["--sequences", 64, "--step-tokens", 2048, "--ahead", int(workload == "w3_shared")]
            return [*openvino, "--model", models / "openvino-int8", *size, *threads]


def environment(program, options):
    """vLLM's own advice: another allocator and Intel's OpenMP."""
    preload = glob.glob("/usr/lib/*/libtcmalloc_minimal.so.4") + glob.glob(f"{options.peers_dir}/vllm/lib/libiomp5.so")
    return os.environ | ({"LD_PRELOAD": ":".join(preload)} if program.startswith("vllm") else {})


def busy_seconds():
    """CPU seconds of all processes, and those of our children."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    everyone = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return everyone, children.ru_utime + children.ru_stime


def run(program, workload, source, options):
    """Runs a program once, checks its results, and returns what it took."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder, open(options.peers_dir / f"log.{program}", "w") as log:
        output = Path(folder) / "out.jsonl"
        words = [*command(program, workload, options), source]
        words += ["--output", output] if program == "valar" else [output]
        before, start = busy_seconds(), time.perf_counter()
        words = [str(word) for word in words]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=log, env=environment(program, options))
        wall, after = time.perf_counter() - start, busy_seconds()
        if done.returncode != 0:
            raise SystemExit(f"{program}, {workload}: exit code {done.returncode}, see {log.name}")
        report = json.loads(done.stdout.splitlines()[-1])
        n_prompt, n_generated = check(program, source, output)
    seconds = report["seconds"]["total"] if program == "valar" else report["seconds"]
    load = wall - seconds
    if program == "valar":
        rows = report["rows"]
        if rows["deduplicated"] or rows["resumed"]:
            raise SystemExit(f"valar, {workload}: rows that were not computed: {rows}")
        seconds += max(0, load - FREE_LOAD)
    everyone, own = (b - a for a, b in zip(before, after))
    others = max(0, everyone - own) / wall
    tokens = {"prompt_tokens": n_prompt, "generated_tokens": n_generated}
    return {"seconds": seconds, "load": load, "wall": wall, "others": others, **tokens}


def lines(path):
    with open(path, encoding="utf-8") as file:
        return list(file)


def check(program, source, output):
    """Every row must have one result with as many tokens as it asks for; returns all prompt and generated tokens."""
    asked, results = [json.loads(line) for line in lines(source)], [json.loads(line) for line in lines(output)]
    if [row["custom_id"] for row in asked] != [row["custom_id"] for row in results]:
        raise SystemExit(f"{program}, {source.name}: not one result for each row, in order")
    usages = [row["response"]["body"]["usage"] if program == "valar" else row for row in results]
    for row, usage in zip(asked, usages):
        if usage["completion_tokens"] != row["body"]["max_tokens"]:
            raise SystemExit(f"{program}, {row['custom_id']}: {usage['completion_tokens']} tokens generated")
    return sum(usage["prompt_tokens"] for usage in usages), sum(usage["completion_tokens"] for usage in usages)


def run_pair(i, peer, workload, source, options):
    """valar and a peer directly after each other; every other pair the other way round."""
    order = ["valar", peer] if i % 2 == 0 else [peer, "valar"]
    pair = {program: run(program, workload, source, options) for program in order}
    if abs(pair[peer]["prompt_tokens"] / pair["valar"]["prompt_tokens"] - 1) > 0.01:
        raise SystemExit(f"{workload}: {peer} and valar read different prompts: {pair}")
    if options.results:
        with open(options.results, "a") as file:
            print(json.dumps({"workload": workload, "limit": options.limit, **pair}), file=file)
    return pair


def spread(values, form):
    return f"{median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def table_row(workload, n_rows, peer, pairs):
    theirs, ours = [pair[peer] for pair in pairs], [pair["valar"] for pair in pairs]
    tokens = ours[0]["prompt_tokens"] + ours[0]["generated_tokens"]
    cells = [
        workload,
        str(n_rows),
        peer,
        spread([run["seconds"] for run in theirs], ".2f"),
        spread([run["seconds"] for run in ours], ".2f"),
        f"**{spread([a['seconds'] / b['seconds'] for a, b in zip(theirs, ours)], '.2f')}**",
        f"{median(run['load'] for run in theirs):.1f} / {median(run['load'] for run in ours):.1f}",
        f"{median(a['wall'] / b['wall'] for a, b in zip(theirs, ours)):.2f}",
        f"{tokens / median(run['seconds'] for run in ours):.0f}",
        f"{max(run['others'] for run in theirs):.2f} / {max(run['others'] for run in ours):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def cpu():
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0] if names else os.uname().machine


def main():
    options = arguments()
    print(f"{cpu()}, {options.threads} threads; medians of {options.pairs} pairs (lowest–highest)\n")
    print("| workload | rows | peer | peer s | valar s | peer / valar | load s | with load | valar tokens/s | others' cores |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(dir=options.peers_dir) as folder:
        for workload in options.workloads:
            rows = [json.loads(line) for line in lines(options.files / f"{workload}.jsonl")[: options.limit]]
            for row in rows:
                row["body"].pop("model", None)  # the same rows serve any model
            source = Path(folder) / f"{workload}.jsonl"
            source.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
            for peer in options.peers:
                pairs = [run_pair(i, peer, workload, source, options) for i in range(options.pairs)]
                print(table_row(workload, len(rows), peer, pairs), flush=True)


if __name__ == "__main__":
    main()
