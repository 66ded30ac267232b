"""A router without a cluster: it serves the page with invented but consistent data.

    python3 tests/page/mock.py --scenario busy --port 8090

Only for work on the page and for its tests. Python's standard library is enough.
"""

import argparse
import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import invented

STATIC = Path(__file__).parents[2] / "router/src/page/static"
CSP = "default-src 'self'"
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
SCENARIOS = ("idle", "none", "busy", "keys", "many")
KEY = "a-key-of-the-mock"
WORDS = "the model writes a long answer over the KV cache of its full model and so it goes on ,".split()


class Router(ThreadingHTTPServer):
    """One scenario. `requests` holds the bodies of all completions, `drained` the addresses of drained nodes."""

    daemon_threads = True

    def __init__(self, scenario="busy", port=0, rate=200.0):
        super().__init__(("127.0.0.1", port), Handler)
        self.scenario = scenario
        self.rate = rate
        self.state = invented.Cluster(scenario)
        self.requests = []
        self.stopped = threading.Event()
        self.cut = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def start(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body, kind="application/json", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status, message):
        self.answer(status, {"error": {"message": message, "type": "invalid_request_error"}})

    def authorized(self):
        if self.server.scenario != "keys" or self.headers.get("authorization") == f"Bearer {KEY}":
            return True
        self.refuse(401, "a valid API key is needed")
        return False

    def do_GET(self):
        path = self.path.split("?")[0]
        if path in ("/page", "/"):
            self.answer(308, b"", location="/page/")
        elif path == "/page/state":
            if self.server.cut.is_set():
                self.close_connection = True
            elif self.authorized():
                self.answer(200, self.server.state.snapshot())
        elif path == "/v1/models":
            if self.authorized():
                self.answer(200, {"object": "list", "data": [{"id": m["name"]} for m in self.server.state.models()]})
        elif path.startswith("/page/"):
            self.file(path.removeprefix("/page/") or "index.html")
        else:
            self.refuse(404, f"nothing is at {path}")

    def file(self, name):
        path = (STATIC / name).resolve()
        if not path.is_relative_to(STATIC) or not path.is_file():
            return self.refuse(404, f"nothing is at /page/{name}")
        kind = TYPES.get(path.suffix, "text/plain; charset=utf-8")
        self.answer(200, path.read_bytes(), kind, content_security_policy=CSP, cache_control="no-cache")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
        if not self.authorized():
            return
        if self.path == "/page/drain":
            fault = self.server.state.drain(body.get("url"))
            self.refuse(404, fault) if fault else self.answer(202, {"draining": True})
        elif self.path in ("/v1/completions", "/v1/chat/completions"):
            self.server.requests.append(body)
            self.complete(body, chat="chat" in self.path)
        else:
            self.refuse(404, f"nothing is at {self.path}")

    def complete(self, body, chat):
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        if body["max_tokens"] > 100_000:
            return self.refuse(400, f"max_tokens: {body['max_tokens']} tokens, maximum is 4096")
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        try:
            self.stream(body, prompt, chat)
            self.wfile.write(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            self.server.stopped.set()
            self.close_connection = True

    def event(self, data):
        line = f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()
        return b"%x\r\n%s\r\n" % (len(line), line)

    def stream(self, body, prompt, chat):
        model, total, rate = body["model"], body["max_tokens"], self.server.rate
        full = self.server.state.full_model(model)
        draw = random.Random(f"{body.get('seed')} {model}")
        timings = invented.timings(len(prompt), total, rate)
        time.sleep(timings["ttft_seconds"])
        begin, sent, gap = time.monotonic(), 0, ""
        while sent < total:
            # In bursts, as a fast node's tokens arrive. Each token is still an event of its own.
            due = min(total, 1 + int((time.monotonic() - begin) * rate))
            burst = b""
            for index in range(sent, due):
                text = gap + draw.choice(WORDS) if index else "Well"
                if draw.random() < 0.02:
                    text = ".\n" if "lines" in prompt else "."
                gap = "" if text.endswith("\n") else " "
                made = {"stage": "decode", "model": model} if index else {"stage": "prefill", "model": full}
                choice = {"index": 0, "finish_reason": None}
                choice |= {"delta": {"content": text}} if chat else {"text": text}
                burst += self.event({"choices": [choice], "overfill": {"tokens": [made]}})
            self.wfile.write(burst)
            sent = due
            if "fail late" in prompt and sent > total // 2:
                self.wfile.write(self.event({"error": {"message": "decode-1: no node could take over the request"}}))
                return
            time.sleep(0.005)
        end = {"index": 0, "finish_reason": "length"} | ({"delta": {}} if chat else {"text": ""})
        usage = {"prompt_tokens": 12 + len(prompt) // 4, "completion_tokens": total, "prompt_tokens_details": {"cached_tokens": 16}}
        self.wfile.write(self.event({"choices": [end], "overfill": {"tokens": []}}))
        self.wfile.write(self.event({"choices": [], "usage": usage, "overfill": {"timings": timings}}))
        self.wfile.write(self.event("[DONE]"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenario", choices=SCENARIOS, default="busy")
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument("--rate", type=float, default=200.0, help="tokens per second of an answer")
    flags = parser.parse_args()
    router = Router(flags.scenario, flags.port, flags.rate)
    print(f"{router.url}/page/", flush=True)
    router.serve_forever()
