#!/usr/bin/env python3
"""llama.cpp: its server with continuous batching, and one client thread per slot that keeps it full."""

import http.client
import json
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from threading import local

import peer

CONTEXT_PER_SLOT = 1024


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Client:
    """Posts to the server; every thread keeps its own connection."""

    def __init__(self, port):
        self.port = port
        self.threads = local()

    def request(self, method, path, body=None):
        if not hasattr(self.threads, "connection"):
            self.threads.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=3600)
        connection = self.threads.connection
        connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def ready(self):
        try:
            return self.request("GET", "/health")[0] == 200
        except OSError:
            del self.threads.connection
            return False

    def complete(self, body):
        status, answer = self.request("POST", "/v1/chat/completions", body)
        if status != 200:
            raise SystemExit(f"HTTP {status}: {answer}")
        usage = answer["usage"]
        return answer["choices"][0]["message"]["content"], usage["prompt_tokens"], usage["completion_tokens"]


def main():
    parser = peer.arguments()
    parser.add_argument("--server", required=True, help="the llama-server program")
    options = parser.parse_args()

    client, slots = Client(free_port()), options.sequences
    command = [options.server, "-m", options.model, "--host", "127.0.0.1", "--port", client.port, "--jinja", "--no-webui"]
    command += ["-t", options.threads, "-tb", options.threads, "-np", slots, "-c", slots * CONTEXT_PER_SLOT]
    command += ["-cb", "-fa", "on", "-b", 2048, "-ub", 512]
    with open(f"{options.output}.log", "w") as log:
        server = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)
    try:
        while not client.ready():
            if server.poll() is not None:
                raise SystemExit(f"llama-server ended: see {options.output}.log")
            time.sleep(0.02)
        client.complete({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "ignore_eos": True})
        with ThreadPoolExecutor(slots) as threads:
            peer.measure(options, lambda bodies: list(threads.map(client.complete, bodies)))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
