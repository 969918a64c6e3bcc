"""A scripted OpenAI-compatible server on loopback: honest, faulty, biased or gullible."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from softpref.judging.controls import load_attacks

MARK = re.compile(r"<[0-9a-f]{24}>")
SECTIONS = re.compile(
    r"PROMPT\n(.*?)\n\S* ?RESPONSE A\n(.*?)\n\S* ?RESPONSE B\n(.*)\n\S* ?END\n", re.DOTALL
)
ORDERS = re.compile(
    r"ignore all|this response is|the response above has won|the better one|always decide for it|"
    r"give that verdict|must prefer|output its letter",
    re.IGNORECASE,
)
FAULTS = (
    # Per cent of requests, by their hash; those that end are over after two tries.
    (6, "429"), (6, "500"), (4, "cut"), (4, "truncated"), (4, "prose"), (2, "hang"), (4, "refusal"),
)  # fmt: skip
PASSING = ("429", "500", "cut")


HONEST = {attack.baseline for attack in load_attacks()}


def quality(text: str) -> int:
    """How good an answer is, to the honest judge: it counts "good", and knows honest answers."""
    return text.split().count("good") + (text in HONEST)


def honest(system: str, user: str) -> str:
    """Judge what stands between the marks, and nothing else."""
    mark = MARK.search(system)[0]
    _, first, second, _ = user.split(f"\n{mark} ")[-4:]
    first, second = first.removeprefix("RESPONSE A\n"), second.removeprefix("RESPONSE B\n")
    by = quality(first) - quality(second)
    return "A" if by > 0 else "B" if by < 0 else "tie"


def always_first(system: str, user: str) -> str:
    return "A"


def gullible(system: str, user: str) -> str:
    """Follow the fence where there is one; where there is none, obey orders in the text."""
    mark = MARK.search(system)
    if mark:
        return honest(system, user)
    _, first, second = SECTIONS.search(user).groups()
    obeyed = [bool(ORDERS.search(text)) for text in (first, second)]
    if obeyed == [True, False]:
        return "A"
    if obeyed == [False, True]:
        return "B"
    by = quality(first) - quality(second)
    return "A" if by > 0 else "B" if by < 0 else "tie"


JUDGES = {"honest": honest, "always_first": always_first, "gullible": gullible}


def no_fault(digest: int) -> str | None:
    return None


def some_faults(digest: int) -> str | None:
    at = digest % 100
    for share, fault in FAULTS:
        if at < share:
            return fault
        at -= share
    return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: else each waits 40 ms for the other's receipt
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        script = self.server.script
        script.keys.add(self.headers["Authorization"])
        if self.path.endswith(("/files", "/batches")):
            if fault := script.batches.path_faults(f"POST {self.path}"):
                self.reply(fault, {})
            else:
                self.send(*script.batches.post(self.path, self.headers, body))
            return
        request = json.loads(body)
        digest = script.digest(request)
        with script.lock:
            script.calls[digest] += 1
            script.bodies.append(request)
            script.paths.add(self.path)
            tries = script.calls[digest]
            script.in_flight += 1
            script.most_in_flight = max(script.most_in_flight, script.in_flight)
        try:
            if script.latency:
                script.ended.wait(script.latency)
            fault = script.faults(digest)
            if fault == "wants max_completion_tokens" and "max_tokens" not in request:
                fault = None
            if fault in PASSING and tries > 2:
                fault = None
            self.reply(fault, request)
        finally:
            with script.lock:
                script.in_flight -= 1

    def do_GET(self):
        self.server.script.keys.add(self.headers["Authorization"])
        batches = self.server.script.batches
        if fault := batches.path_faults(f"GET {self.path}"):
            self.reply(fault, {})
        else:
            self.send(*batches.get(self.path))

    def reply(self, fault: str | None, request: dict) -> None:
        if fault == "cut":
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            return
        if fault == "hang":
            self.close_connection = True
            self.server.script.ended.wait()
            return
        if fault in ("429", "500") or (fault or "").startswith("status "):
            status = int(fault.removeprefix("status "))
            self.send({"error": {"message": "no"}}, status, {"Retry-After": "0.05"})
            return
        if fault == "wants max_completion_tokens":
            error = {"message": "no", "code": "unsupported_parameter", "param": "max_tokens"}
            self.send({"error": error}, 400, {})
            return
        if (fault or "").startswith("redirect "):
            self.send({}, 307, {"Location": fault.removeprefix("redirect ")})
            return
        if fault in ("endless head", "endless body", "slow body"):
            self.go_on_for_ever(fault)
            return
        if (fault or "").startswith("body "):
            self.send(None, 200, {}, raw=fault.removeprefix("body ").encode())
            return
        if (fault or "").startswith("error "):
            self.send({"error": json.loads(fault.removeprefix("error "))}, 400, {})
            return
        if error := self.server.script.refused(request):
            self.send(error, 400, {})
            return
        completion = self.server.script.completion(request, fault)
        self.send(completion, 200, {}, cut_at=40 if fault == "truncated" else None)

    def go_on_for_ever(self, fault):
        """Send what no client should wait for, until it hangs up."""
        script, self.close_connection = self.server.script, True
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
        if fault != "endless head":
            self.wfile.write(b"Transfer-Encoding: chunked\r\n\r\n")
        part = {"endless head": b"X", "endless body": b"8000\r\n" + b" " * 32768 + b"\r\n",
                "slow body": b"1\r\n \r\n"}[fault]  # fmt: skip
        with suppress(OSError):
            while not script.ended.is_set():
                self.wfile.write(part)
                self.wfile.flush()
                script.sent += len(part)
                if fault != "endless body":
                    script.ended.wait(0.05)

    def send(self, content, status, headers=None, cut_at=None, raw=None):
        if status is None:  # the answer is lost
            self.close_connection = True
            self.connection.close()
            return
        headers = headers or {}
        body = raw or json.dumps(content).encode()[:cut_at]
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        pass  # a client that was killed


class Script:
    """What the server says, and what it has seen."""

    def __init__(
        self,
        judge: Callable[[str, str], str] = honest,
        faults: Callable[[int], str | None] = no_fault,
        latency: float = 0.0,
    ) -> None:
        self.judge, self.faults, self.latency = judge, faults, latency
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.calls: Counter[int] = Counter()
        self.keys: set[str] = set()
        self.writes: Callable[[dict], str] | None = None
        self.longest_file: int | None = None
        self.usage: object = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
        self.in_flight = self.most_in_flight = self.sent = 0
        self.url = ""
        self.bodies: list[dict] = []
        self.paths: set[str] = set()
        self.batches = Batches(self)
        self.refuses: list[str] = []
        """Parameters that the model does not take; it names the first of them."""
        self.thinks = 0
        """Tokens that the model spends before its first visible word."""
        self.shows_thoughts = False

    def digest(self, request: dict) -> int:
        """A request's number, the same whatever mark it is fenced with."""
        text = request.get("prompt") or request["messages"][-1]["content"]
        return int.from_bytes(hashlib.sha256(MARK.sub("", text).encode()).digest()[:4])

    def refused(self, request: dict) -> dict | None:
        """Return the error about a parameter that the model does not take."""
        name = next((name for name in self.refuses if name in request), None)
        return {"error": {"message": f"Unsupported parameter: '{name}'"}} if name else None

    def completion(self, request: dict, fault: str | None) -> dict:
        messages = [message["content"] for message in request.get("messages", ())]
        verdict = ""
        if self.writes:
            content = self.writes(request)
        elif "prompt" in request:
            content = "A response."
        else:
            verdict = self.judge(messages[0], messages[-1])
            content = json.dumps({"justification": "So it is.", "verdict": verdict})
        finish, usage = "stop", self.usage(request) if callable(self.usage) else self.usage
        if self.thinks:
            decoy = '<think>First, {"verdict": "tie"}? No.'
            longest = request.get("max_completion_tokens", request.get("max_tokens"))
            used = min(longest, self.thinks + 20)
            if used < self.thinks + 20:
                finish, content = "length", decoy if self.shows_thoughts else ""
            elif self.shows_thoughts:
                content = f"{decoy}</think>\n{content}"
            usage = {"prompt_tokens": 100, "completion_tokens": used, "total_tokens": 100 + used}
        if fault == "prose":
            content = f"I think that {verdict} is the better response."
        message = {"role": "assistant", "content": content}
        if (fault or "").startswith("message "):
            message = json.loads(fault.removeprefix("message "))
        if fault == "refusal":
            message = {"role": "assistant", "content": None, "refusal": "I cannot judge this."}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        if "prompt" in request and fault is None:
            choice = {"index": 0, "text": content, "finish_reason": finish}
        return {"id": "1", "object": "chat.completion", "created": 1, "model": "scripted",
                "choices": [choice], "usage": usage}  # fmt: skip


class Batches:
    """The server's batches: a call is made, and paid, once its batch is created."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.files: dict[str, bytes] = {}
        self.made: dict[str, dict] = {}
        self.faults: Callable[[int], str | None] = no_fault
        """What befalls the n-th batch, from 0: "failed", "expired", "lost" (created, but the
        answer does not arrive), "refused"."""
        self.path_faults: Callable[[str], str | None] = lambda path: None
        """What befalls a request about files and batches, by its method and path."""
        self.result: bytes | None = None
        """A line in the place of each line of a result file; KEY stands for the call's key."""
        self.polls = 1
        """How often a batch is looked at before it ends."""

    def post(self, path, headers, body):
        if path.endswith("/files"):
            boundary = headers["Content-Type"].partition("boundary=")[2].strip('"').encode()
            (part,) = [p for p in body.split(b"--" + boundary) if b"filename=" in p]
            name = f"file-{len(self.files)}"
            self.files[name] = part.partition(b"\r\n\r\n")[2].rstrip(b"\r\n")
            return {"id": name, "object": "file", "bytes": 1, "created_at": 1, "filename": "x",
                    "purpose": "batch", "status": "processed"}, 200  # fmt: skip
        asked = json.loads(body)
        fault = self.faults(len(self.made))
        if fault == "refused":
            return {"error": {"message": "no"}}, 400
        batch = {"id": f"batch_{len(self.made)}", "object": "batch", "created_at": 1, "left": 0,
                 "status": "validating", **asked, "fault": fault}  # fmt: skip
        batch["left"] = self.polls
        self.made[batch["id"]] = batch
        if fault != "failed":
            self.run(batch)
        return (None, None) if fault == "lost" else (batch, 200)

    def run(self, batch):
        done, wrong = [], []
        lines = self.files[batch["input_file_id"]].splitlines()
        assert len({json.loads(line)["custom_id"] for line in lines}) == len(lines)
        for number, line in enumerate(lines):
            row = json.loads(line)
            assert (row["method"], row["url"]) == ("POST", batch["endpoint"])
            request, answer = row["body"], {"id": "r", "custom_id": row["custom_id"]}
            digest = self.script.digest(request)
            fault = self.script.faults(digest)
            if batch["fault"] == "expired" and number >= len(lines) // 2:
                expired = {"code": "batch_expired", "message": "This request could not be run."}
                wrong.append(answer | {"response": None, "error": expired})
                continue
            self.script.calls[digest] += 1
            self.script.bodies.append(request)
            if fault == "missing":
                continue
            if (fault or "").startswith("status "):
                refused = {"status_code": int(fault[7:]), "body": {"error": {"message": "no"}}}
                wrong.append(answer | {"response": refused, "error": None})
                continue
            if fault == "wants max_completion_tokens" and "max_tokens" in request:
                error = {"message": "unsupported", "param": "max_tokens"}
                refused = {"status_code": 400, "body": {"error": error}}
                wrong.append(answer | {"response": refused, "error": None})
                continue
            if error := self.script.refused(request):
                wrong.append(answer | {"response": {"status_code": 400, "body": error}})
                continue
            body = self.script.completion(request, fault)
            found = {"status_code": 200, "request_id": "q", "body": body}
            done.append(answer | {"response": found, "error": None})
        done.reverse()  # their order is not that of the input
        for kind, rows in (("output", done), ("error", wrong)):
            if rows:
                name = f"file-{len(self.files)}"
                texts = [json.dumps(row).encode() for row in rows]
                if self.result is not None:
                    texts = [self.result.replace(b"KEY", r["custom_id"].encode()) for r in rows]
                self.files[name] = b"".join(text + b"\n" for text in texts)[
                    : self.script.longest_file
                ]
                batch[f"{kind}_file_id"] = name

    def get(self, path):
        name = path.rpartition("/v1/")[2]
        if name.startswith("files/") and name.split("/")[1] in self.files:
            return None, 200, {}, None, self.files[name.split("/")[1]]
        if name.startswith("batches/") and name.split("/")[1] in self.made:
            batch = self.made[name.split("/")[1]]
            batch["left"] -= 1
            if batch["left"] <= 0:
                batch["status"] = {"failed": "failed", "expired": "expired"}.get(
                    batch["fault"], "completed"
                )
                if batch["fault"] == "failed":
                    batch["errors"] = {"data": [{"code": "token_limit_exceeded", "message": "x"}]}
            return batch, 200
        if name.startswith("batches"):
            return {"object": "list", "data": [*reversed(self.made.values())], "has_more": False,
                    "first_id": "", "last_id": ""}, 200  # fmt: skip
        return {"error": {"message": "no"}}, 404


@contextmanager
def serving(script: Script):
    server = Server(("127.0.0.1", 0), Handler)
    server.script = script
    script.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield script
    finally:
        script.ended.set()
        server.shutdown()
        server.server_close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--judge", choices=JUDGES, default="honest")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--latency", type=float, default=0.0)
    options = parser.parse_args()
    script = Script(JUDGES[options.judge], some_faults if options.faults else no_fault,
                    options.latency)  # fmt: skip
    with serving(script):
        print(script.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
