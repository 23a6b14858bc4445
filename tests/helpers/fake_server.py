"""Stands in for vLLM: the same questions over HTTP, answered at once by a hash of the prompt. Standard library only.

Run: ``python fake_server.py PORT NAME[,NAME...] [--wait S] [--die-after N] [--say TEXT] [--exit CODE] [--child F]
[--log F] [--delay S] [--refuse STATUS] [--think] [--hang]``. The first name is the base,
the others are its adapters. ``--log`` takes each question as it comes, ``--refuse`` answers the first one with a
status and repeats its headers. ``--child`` starts a process that ignores SIGTERM, as a hanging engine would, and
writes both ids.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


TEXTS = ("#### 18", "The answer is 18.", "true", "false", "the correct answer is answer1", "answer2", "solution1", "C",
         "I have 1,234 apples. #### 7\n\nQuestion: what")  # fmt: skip
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(120)"


def number(tokens) -> int:
    return int.from_bytes(hashlib.sha256(repr(tokens).encode()).digest()[:4], "big")


def choice(body, tokens, index):
    if not body.get("echo"):
        if body.get("use_beam_search"):
            text = f"beam {index % body['n']} #### 7\n\nQuestion: what"
            return {"index": index, "text": text, "finish_reason": "stop"}
        drawn = (tokens, index) if not body.get("temperature") else (tokens, index, body["seed"])
        return {"index": index, "text": TEXTS[number(drawn) % len(TEXTS)], "finish_reason": "stop"}
    values = [None] + [-1 - number(tokens[: i + 1]) % 997 / 100 for i in range(1, len(tokens))] + [-1.0]
    tops = [None, *({"t": value} for value in values[1:])]
    return {"index": index, "text": "", "logprobs": {"token_logprobs": values, "top_logprobs": tops}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, document, status=200):
        payload = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status != 200:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def do_GET(self):
        base, *adapters = self.server.names
        models = [{"id": base, "root": base, "parent": None, "max_model_len": self.server.length}]
        models += [{"id": name, "parent": base} for name in adapters]
        self.send({"/v1/models": {"data": models}, "/version": {"version": "0.0.fake"}}.get(self.path, {}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked += 1
            if self.server.asked == self.server.die_after:
                print("MemoryError: the fake engine is out of memory", flush=True)
                os._exit(9)
            if self.server.options.log:
                with open(self.server.options.log, "a") as file:
                    file.write(json.dumps({k: v for k, v in body.items() if k != "model"}, sort_keys=True) + "\n")
            refuse, self.server.options.refuse = self.server.options.refuse, None
        if refuse:
            self.send({"error": dict(self.headers)}, refuse)
            return
        time.sleep(120 if self.server.options.hang else self.server.options.delay)
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        beams = body.get("n", 1)
        choices = [choice(body, p, i * beams + b) for i, p in enumerate(prompts) for b in range(beams)]
        if self.server.options.think:
            choices = [{**c, "text": f"<think>The answer is 77. #### 77</think>{c['text']}"} for c in choices]
        self.send({"choices": choices})


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("names")
    parser.add_argument("--wait", type=float, default=0.0)
    parser.add_argument("--die-after", type=int, default=0)
    parser.add_argument("--say", default="")
    parser.add_argument("--exit", type=int)
    parser.add_argument("--child")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--log")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--refuse", type=int)
    parser.add_argument("--think", action="store_true")
    parser.add_argument("--hang", action="store_true")
    options = parser.parse_args()
    if options.child:
        child = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
        child.stdout.readline()
        with open(options.child, "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
    print(options.say, flush=True)
    if options.exit is not None:
        os._exit(options.exit)
    time.sleep(options.wait)
    server = Server(("127.0.0.1", options.port), Handler)
    server.names, server.die_after = options.names.split(","), options.die_after
    server.length, server.options = options.length, options
    server.asked, server.lock = 0, threading.Lock()
    server.serve_forever()


if __name__ == "__main__":
    main()
