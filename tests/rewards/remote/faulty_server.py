"""A reward server that goes wrong as its path says: `/<fault>/v1/score`. Run as a process; prints its port.

It knows nothing of the package, so that both ends of the protocol are written down twice.
"""

from __future__ import annotations

import collections
import email.utils
import http.server
import json
import pickle
import signal
import threading
import time

ATTEMPTS: collections.Counter[str] = collections.Counter()
LOCK = threading.Lock()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:  # noqa: N802
        fault, _, route = self.path.strip("/").partition("/")
        if route == "attempts":
            self.send(str(ATTEMPTS[fault]).encode())
        elif route == "health":
            rewards = {"good": {"requires": ["include"], "range": [0, 1]}}
            self.send(json.dumps({"version": 2 if fault == "old_health" else 1, "rewards": rewards}).encode())
        else:
            self.send(b"{}", 404)

    def do_POST(self) -> None:  # noqa: N802
        fault = self.path.strip("/").split("/")[0]
        with LOCK:
            ATTEMPTS[fault] += 1
            attempt = ATTEMPTS[fault]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            if fault.startswith("legacy_"):
                self.legacy(fault, pickle.loads(body))
            else:
                self.score(fault, attempt, json.loads(body))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def score(self, fault: str, attempt: int, question: dict) -> None:
        count = len(question["items"])
        tree = {
            "version": 1,
            "request_id": question["request_id"],
            "scores": {"good": [0.25 + i for i in range(count)]},
            "errors": {},
        }
        scores = tree["scores"]["good"]
        if fault == "silent":
            time.sleep(60)
        elif fault == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(1000):
                self.wfile.write(b" ")
                time.sleep(0.05)
        elif fault == "drip_until_closed":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            for byte in json.dumps(tree).encode() + b" " * 1000:
                self.wfile.write(bytes([byte]))
                time.sleep(0.02)
        elif fault == "error_500":
            self.send(b'{"version":1,"error":"out of luck"}', 500)
        elif fault.startswith("once_") and attempt == 1:
            self.send(b"no json at all", int(fault.removeprefix("once_")))
        elif fault == "busy_twice" and attempt <= 2:
            self.send(b'{"version":1,"error":"busy"}', 503, Retry_After="1")
        elif fault == "busy_until_a_date" and attempt == 1:
            self.send(b"", 429, Retry_After=email.utils.formatdate(time.time() + 2, usegmt=True))
        elif fault == "busy_for_an_hour":
            self.send(b'{"version":1,"error":"busy"}', 503, Retry_After="3600")
        elif fault.startswith("second_") and attempt == 2:
            self.send(b'{"version":1,"error":"a bad second request"}', int(fault.removeprefix("second_")))
        elif fault == "error_400":
            self.send(b'{"version":1,"error":"a bad request"}', 400)
        elif fault == "redirect":
            self.send(b"", 307, Location="/good/v1/score")
        elif fault == "closed":
            self.close_connection = True
        elif fault == "closed_once" and attempt == 1:
            self.close_connection = True
        elif fault == "truncated":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(json.dumps(tree).encode())
            self.close_connection = True
        elif fault == "endless":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            while True:
                self.wfile.write(b" " * 2**20)
        elif fault == "no_json":
            self.send(json.dumps(tree).encode()[:-3])
        elif fault == "deep":
            self.send(b"[" * 10**6)
        elif fault == "list":
            self.send(b"[1]")
        elif fault == "nan":
            self.send(json.dumps(tree | {"scores": {"good": [float("nan")] * count}}).encode())
        elif fault == "overflow":
            self.send(json.dumps(tree).replace("0.25", "1e999").encode())
        elif fault == "float32_overflow":
            self.send(json.dumps(tree | {"scores": {"good": [1e39] * count}}).encode())
        else:
            if fault == "short":
                scores.pop()
            elif fault == "long":
                scores.append(1.0)
            elif fault == "null":
                scores[1] = None
            elif fault == "boolean":
                scores[0] = True
            elif fault == "text":
                scores[0] = "0.5"
            elif fault == "other_reward":
                tree["scores"] = {"better": scores}
            elif fault == "other_request":
                tree["request_id"] = "somebody else's"
            elif fault == "other_version":
                tree["version"] = 2
            elif fault == "bad_position":
                tree["errors"] = {"good": {str(count): "beyond the end"}}
            elif fault == "item":
                # the third image of every request
                scores[2] = None
                tree["errors"] = {"good": {"2": "this one is no sign"}}
                tree["scores"]["good/extra"] = [7.0, 8.0, None] + [9.0] * (count - 3)
            self.send(json.dumps(tree).encode())

    def legacy(self, fault: str, question: dict) -> None:
        count = len(question["images"])
        assert all(image[:2] == b"\xff\xd8" for image in question["images"])
        scores = [0.5 + i for i in range(count)]
        if fault == "legacy_deqa":
            assert question.keys() == {"images"}
            tree = {"outputs": scores}
        elif fault == "legacy_geneval":
            assert question.keys() == {"images", "meta_datas", "only_strict"} and question["only_strict"] is False
            assert [entry["tag"] for entry in question["meta_datas"]] == ["counting"] * count
            groups = {"counting": [1.0] * count, "colors": [-10.0] * count}
            tree = {
                "scores": scores,
                "rewards": [1.0] * count,
                "strict_rewards": [0.0] * count,
                "group_rewards": groups,
                "group_strict_rewards": groups,
            }
        elif fault == "legacy_unifiedreward":
            tree = {"outputs": [len(prompt) for prompt in question["prompts"]]}
        elif fault == "legacy_short":
            tree = {"outputs": scores[1:]}
        elif fault == "legacy_nan":
            tree = {"outputs": [float("nan")] * count}
        elif fault == "legacy_500":
            return self.send(b"Traceback (most recent call last): KeyError: 'tag'", 500)
        elif fault == "legacy_huge":
            tree = {"outputs": scores, "more": "x" * 2**20}
        elif fault == "legacy_code":
            # what an array or any other object looks like: a name to import and to call
            return self.send(b"cbuiltins\nprint\n(S'run'\ntR.")
        else:
            tree = scores
        self.send(pickle.dumps(tree))


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGKILL))
    print(server.server_address[1], flush=True)
    server.serve_forever()
