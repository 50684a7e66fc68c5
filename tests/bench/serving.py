"""A server of our own for benchmarks, and texts for its prompts. Standard library only."""

import json
import random
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

WORDS = "river stone lamp winter copper garden letter engine harbour cloud orchard mirror saddle thunder paper bridge".split()


def words(seed, n):
    return " ".join(random.Random(seed).choices(WORDS, k=n))


class Server:
    """`valar serve` with a configuration, and what it must remember, in `folder`, which may hold several of other names."""

    def __init__(self, args, folder, config, name="valar", flags=()):
        path = Path(folder, f"{name}.toml")
        path.write_text(config)
        command = [args.valar, "serve", "-m", args.model, "--config", str(path), "--port", "0", "--data", f"{folder}/{name}", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if match := re.search(r"listening on (http://\S+)", line):
                self.url = match[1]
                return
            sys.stderr.write(line)
        raise SystemExit("the server did not start")

    def ask(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        return urllib.request.urlopen(request, timeout=600)

    def json(self, path, body=None):
        with self.ask(path, body) as answer:
            return json.load(answer)
