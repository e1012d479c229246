"""A local HTTP server that speaks the OpenAI protocol, and fails as such servers do."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What a request is answered with: status, headers, body; or seconds to wait, and then nothing.
Reply = tuple[int, dict[str, str], str] | float


def completion(text: str | None, **usage: int) -> Reply:
    """A chat completion whose answer is `text`."""
    tokens = {"prompt_tokens": 100, "completion_tokens": 10} | usage
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "judge",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": tokens | {"total_tokens": sum(tokens.values())},
    }
    return 200, {}, json.dumps(body)


def failure(status: int, message: str = "no", **headers: str) -> Reply:
    """An error in the protocol's form."""
    return (
        status,
        {name.replace("_", "-"): value for name, value in headers.items()},
        json.dumps({"error": {"message": message}}),
    )


@dataclass
class JudgeServer:
    """What the server has seen.

    Attributes:
        requests: (path, headers, body, when it came) of each.
        most_at_once: requests that it worked on at a time, at most.
    """

    url: str = ""
    requests: list[tuple[str, dict[str, str], Any, float]] = field(default_factory=list)
    most_at_once: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def texts(self) -> list[str]:
        """What was asked."""
        return [body["messages"][0]["content"] for _, _, body, _ in self.requests]


@contextlib.contextmanager
def judge_server(answer: Callable[[str, int], Reply]) -> Iterator[JudgeServer]:
    """A server for a block.

    Args:
        answer: the reply to a text that is asked for the n-th time, from 1.
    """
    server = JudgeServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server._lock:
                server.requests.append((self.path, dict(self.headers), body, time.monotonic()))
                times = server.texts().count(body["messages"][0]["content"])
                server._now += 1
                server.most_at_once = max(server.most_at_once, server._now)
            reply = answer(body["messages"][0]["content"], times)
            time.sleep(0.01)
            with server._lock:
                server._now -= 1
            if isinstance(reply, float):
                time.sleep(reply)
                self.close_connection = True
                return
            status, headers, text = reply
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: Any) -> None:
            """Nothing on the terminal."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *arguments: Any) -> None:
            """Nothing on the terminal of clients that have gone."""

    http = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
