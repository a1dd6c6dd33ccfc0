"""The web server of the tests' local Hub: requests, answers, routes, and the faults that can be planned."""

import json
import re
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

from hub_storage import Commit, Repository


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    content: bytes


class Refused(Exception):
    """An answer with an error, as the Hub words it: its code where it has one, and its message."""

    def __init__(self, status: int, message: str, code: str | None = None, url: str = "", **headers: str) -> None:
        headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = answer_json({"error": message, "url": url}, status, headers)


def answer_json(value, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    headers = {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
    return Answer(status, headers, json.dumps(value).encode())


@dataclass
class Fault:
    """What the next `times` requests that match get."""

    pattern: re.Pattern
    kind: str | Callable[[], object]
    times: int
    happened: int = 0  # so often


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes
    role: str | None = None  # read, write, or None without a token
    names: dict[str, str] = field(default_factory=dict)  # what the route took from the path
    repo: Repository | None = None
    commit: Commit | None = None

    def json(self) -> dict:
        return json.loads(self.body)


ROUTES: list[tuple[list[str], re.Pattern, Callable, bool]] = []


def route(methods: str, pattern: str, write: bool = False) -> Callable:
    """The method below answers these requests. Paths with `repo` (and `rev`) arrive with them found."""

    def register(function: Callable) -> Callable:
        ROUTES.append((methods.split(), re.compile(pattern + "$"), function, write))
        return function

    return register


class Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no error of ours."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def handler(hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def respond(self) -> None:
            body = self.read_body()
            planned = hub.receive(f"{self.command} {self.path}")
            fault = planned and planned.kind
            if fault == "stall":
                hub._stopped.wait()
            if fault in ("stall", "drop"):
                return self.hang_up()
            if callable(fault):
                fault()
            if fault in ("429", "503"):
                limits = {"RateLimit": '"api";r=0;t=1', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
                answer = answer_json({"error": "Not now"}, int(fault), limits if fault == "429" else {})
            else:
                url = urlsplit(self.path)
                query = {name: values[-1] for name, values in parse_qs(url.query).items()}
                answer = hub.answer(Request(self.command, url.path, query, self.headers, body))
            if fault == "lost":
                return self.hang_up()
            self.send_response(answer.status)
            for name, value in {**answer.headers, "X-Request-Id": f"Root=1-{len(hub.asked):08x}"}.items():
                self.send_header(name, " ".join(value.split()).encode("latin-1", "replace").decode("latin-1"))
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.content[: len(answer.content) // 2] if fault == "cut" else answer.content)
            if fault == "cut":
                self.hang_up()

        do_GET = do_HEAD = do_POST = do_PUT = respond

        def read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def hang_up(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *args) -> None:
            pass

    return Handler
