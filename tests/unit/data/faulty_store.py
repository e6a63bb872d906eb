"""An S3 server on the loopback device behind a proxy that makes it fail, the same way in every run."""

import http.client
import socket
import threading
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HOST, BUCKET = "127.0.0.1", "images"
KINDS = ("status 500", "status 503", "no answer", "half an answer", "slow answer")


class Proxy(ThreadingHTTPServer):
    """Forwards to the server at `port`; the first `faults` tries of a request fail, in kinds that follow from its name.

    broken: every request fails. counts: how often each kind was dealt out.
    """

    daemon_threads = True

    def __init__(self, port: int):
        super().__init__((HOST, 0), Handler)
        self.port, self.faults, self.broken = port, 0, False
        self.counts: Counter[str] = Counter()
        self.seen: Counter[tuple] = Counter()
        self.lock = threading.Lock()

    def fault(self, request: tuple[str, ...]) -> str | None:
        """Say how this try of a request fails, None: not at all."""
        with self.lock:
            turn = self.seen[request]
            self.seen[request] += 1
            if not self.broken and turn >= self.faults:
                return None
            kind = (
                KINDS[0] if self.broken else KINDS[(zlib.crc32(repr(request).encode()) + turn) % len(KINDS)]
            )
            self.counts[kind] += 1
            return kind

    def uri(self, path: str) -> str:
        """Return the URI of a folder of the bucket as users write it."""
        return (
            f"s3://{BUCKET}/{path}?endpoint_override={HOST}:{self.server_port}&scheme=http&region=us-east-1"
        )


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        body = self._body()
        kind = self.server.fault((self.command, self.path, self.headers.get("Range", "")))
        if kind == "no answer":
            return self._hang_up()
        if kind in ("status 500", "status 503"):
            return self._answer(int(kind.split()[1]), {"Content-Length": "0"}, b"")
        upstream = http.client.HTTPConnection(HOST, self.server.port, timeout=20)
        dropped = ("connection", "transfer-encoding", "expect")
        headers = {k: v for k, v in self.headers.items() if k.lower() not in dropped}
        upstream.request(self.command, self.path, body=body or None, headers=headers)
        answer = upstream.getresponse()
        kept = {k: v for k, v in answer.getheaders() if k.lower() not in ("connection", "date", "server")}
        self._answer(answer.status, kept, answer.read(), kind)
        upstream.close()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _body(self) -> bytes:
        """Return what the client sends, also in chunks (RFC 9112, 7.1)."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, kind: str | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        if kind == "half an answer":
            return self._hang_up()
        if kind == "slow answer":
            time.sleep(0.3)
        self.wfile.write(body[len(body) // 2 :])

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def faulty_store(folder: Path) -> Iterator[Proxy]:
    """Serve the files of `folder` as `set/NAME` in the bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address=HOST, port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    for path, content in [("", b""), *((f"/set/{p.name}", p.read_bytes()) for p in folder.iterdir())]:
        kind = {"Content-Type": "application/octet-stream"}
        url = f"http://{HOST}:{port}/{BUCKET}{path}"
        urllib.request.urlopen(urllib.request.Request(url, data=content, method="PUT", headers=kind)).close()
    proxy = Proxy(port)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.stop()
