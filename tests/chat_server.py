"""A server of chat completions on this machine: it answers what a function makes of the document in the prompt."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """`requests` are the bodies that came, `keys` their Authorization headers; `failures` are answered by HTTP 503."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.requests, self.keys, self.failures, self.answer = [], [], 0, answer
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply({"data": [{"id": "stand-in"}]} if self.path == "/v1/models" else None)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if server.failures:
                    server.failures -= 1
                    return self.reply(None, 503)
                server.requests.append(body)
                server.keys.append(self.headers["Authorization"])
                document = body["messages"][-1]["content"].removeprefix("Document: ").partition("\n\n")[0]
                choice = {"message": {"content": server.answer(document)}, "finish_reason": "stop"}
                return self.reply({"choices": [choice]})

            def reply(self, body, status=200):
                self.send_response(status if body else max(status, 404))
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
