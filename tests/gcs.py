"""A bucket of Google Cloud Storage for tests: as much of its JSON API as gcsfs uses, in memory.

As there, an object appears whole when its upload is, every write has a new generation, a write may
ask that there be none yet, and lists are never out of date and come in pages. `Cloud.fault` makes
the server misbehave.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import http.server
import io
import itertools
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

PAGE = 7
"""Entries of a list's page, so that there are several."""


@dataclass
class Cloud:
    """The buckets: name -> path -> (content, resource). log: "METHOD path" of every request.

    fault: called with "METHOD path" when a request comes; it may return a status to answer with;
    "drop": the connection ends in the middle of the body; "deaf": all is done, and no answer given.
    """

    buckets: dict[str, dict[str, tuple[bytes, dict[str, Any]]]]
    log: list[str] = field(default_factory=list)
    fault: Callable[[str], int | str | None] = lambda request: None
    ahead: float = 0.0
    """Seconds that the cloud's clock is ahead of this machine's."""
    host: str = ""

    def __post_init__(self):
        self.lock, self.numbers = threading.Lock(), itertools.count(1)
        self.sessions: dict[str, tuple[str, str, bool, bytearray]] = {}

    def names(self, bucket: str = "b") -> list[str]:
        return sorted(self.buckets[bucket])

    def read(self, path: str, bucket: str = "b") -> bytes:
        return self.buckets[bucket][path][0]

    def put(self, bucket: str, name: str, content: bytes, only_new: bool = False) -> dict | int:
        """The object's resource, or the status that says why not."""
        with self.lock:
            if bucket not in self.buckets:
                return 404
            if only_new and name in self.buckets[bucket]:
                return 412
            now = datetime.datetime.fromtimestamp(time.time() + self.ahead, datetime.UTC)
            stamp = now.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            made = {
                "kind": "storage#object",
                "bucket": bucket,
                "name": name,
                "size": str(len(content)),
                "generation": str(next(self.numbers)),
                "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
                "updated": stamp,
                "timeCreated": stamp,
            }
            self.buckets[bucket][name] = content, made
            return made

    def list(self, bucket: str, prefix: str, delimiter: str, after: str, most: int) -> dict:
        with self.lock:
            objects = {n: o for n, (_, o) in self.buckets[bucket].items() if n.startswith(prefix)}
        entries: dict[str, dict | None] = {}
        for name, made in objects.items():
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                entries[prefix + rest.split(delimiter)[0] + delimiter] = None
            else:
                entries[name] = made
        page = sorted(name for name in entries if name > after)
        more, page = len(page) > most, page[:most]
        answer: dict[str, Any] = {"kind": "storage#objects"}
        answer["items"] = [entries[name] for name in page if entries[name] is not None]
        answer["prefixes"] = [name for name in page if entries[name] is None]
        return answer | ({"nextPageToken": page[-1]} if more else {})


@contextlib.contextmanager
def serve(*buckets: str) -> Iterator[Cloud]:
    """A cloud that answers at `cloud.host` (STORAGE_EMULATOR_HOST) while the block runs."""
    cloud = Cloud({name: {} for name in buckets or ("b",)})

    class Handler(_Handler):
        pass

    Handler.cloud = cloud
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    cloud.host = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield cloud
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    cloud: Cloud

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a killed client
            super().handle()

    def answer(self, status: int, content: bytes | dict = b"", **headers: str) -> None:
        if isinstance(content, dict):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def act(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query))
        size = int(self.headers.get("Content-Length") or 0)
        path = re.sub("^(/download)?/storage/v1/b/[^/]*/o/?", "", url.path)
        name = self.query.get("name") or urllib.parse.unquote(path)
        head = self.rfile.read(min(size, 4096))
        if self.query.get("uploadType") == "multipart":
            name = re.search(rb'"name": "([^"]*)"', head)[1].decode()
        request = f"{self.command} {name}"
        self.cloud.log.append(request)
        fault = self.cloud.fault(request)
        if fault == "drop":
            self.close_connection = True
            return
        body = head + self.rfile.read(size - len(head))
        if isinstance(fault, int):
            text = "no access for you" if fault == 403 else "try again"
            self.answer(fault, {"error": {"code": fault, "message": text}})
            return
        if fault == "deaf":
            self.wfile, self.close_connection = io.BytesIO(), True
        self.route(url.path, body)

    do_GET = do_POST = do_DELETE = act

    def route(self, path: str, body: bytes) -> None:
        parts = [urllib.parse.unquote(part) for part in path.strip("/").split("/")]
        if path.startswith("/session/"):
            self.session(parts[1], body)
        elif parts[0] == "upload":
            self.upload(parts[4], body)
        elif parts[:3] == ["download", "storage", "v1"]:
            self.download(parts[4], parts[6])
        elif len(parts) == 4 and parts[2] == "b":
            known = parts[3] in self.cloud.buckets
            self.answer(200 if known else 404, {"name": parts[3]})
        elif len(parts) == 5:
            self.listed(parts[3])
        elif "rewriteTo" in parts:
            self.rewrite(parts)
        elif self.command == "DELETE":
            with self.cloud.lock:
                found = self.cloud.buckets.get(parts[3], {}).pop(parts[5], None)
            self.answer(204 if found else 404)
        elif self.query.get("alt") == "media":
            self.download(parts[3], parts[5])
        else:
            found = self.cloud.buckets.get(parts[3], {}).get(parts[5])
            self.answer(200, found[1]) if found else self.answer(404)

    def listed(self, bucket: str) -> None:
        if bucket not in self.cloud.buckets:
            return self.answer(404)
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        most = min(PAGE, int(self.query.get("maxResults", PAGE)))
        found = self.cloud.list(bucket, prefix, delimiter, self.query.get("pageToken", ""), most)
        self.answer(200, found)

    def upload(self, bucket: str, body: bytes) -> None:
        only_new = self.query.get("ifGenerationMatch") == "0"
        if self.query["uploadType"] == "resumable":
            key = str(next(self.cloud.numbers))
            self.cloud.sessions[key] = bucket, json.loads(body)["name"], only_new, bytearray()
            self.answer(200, Location=f"{self.cloud.host}/session/{key}")
            return
        boundary = re.search('boundary="(.*)"', self.headers["Content-Type"])[1].encode()
        _, first, rest = body.split(b"--" + boundary, 2)
        content = rest.split(b"\n\n", 1)[1].removesuffix(b"\n--" + boundary + b"--")
        name = json.loads(first.split(b"\n\n", 1)[1])["name"]
        self.said(self.cloud.put(bucket, name, content, only_new))

    def session(self, key: str, body: bytes) -> None:
        if self.command == "DELETE":
            self.cloud.sessions.pop(key, None)
            return self.answer(499)
        bucket, name, only_new, content = self.cloud.sessions[key]
        first, last, size = map(int, re.findall(r"\d+", self.headers["Content-Range"]))
        content[first:] = body
        if last + 1 < size:
            return self.answer(308, Range=f"bytes=0-{last}")
        self.said(self.cloud.put(bucket, name, bytes(content), only_new))

    def said(self, made: dict | int) -> None:
        self.answer(made) if isinstance(made, int) else self.answer(200, made)

    def rewrite(self, parts: list[str]) -> None:
        found = self.cloud.buckets[parts[3]].get(parts[5])
        if found is None:
            return self.answer(404)
        made = self.cloud.put(parts[8], parts[10], found[0])
        self.answer(200, {"done": True, "resource": made})

    def download(self, bucket: str, name: str) -> None:
        found = self.cloud.buckets.get(bucket, {}).get(name)
        if found is None:
            return self.answer(404)
        content, made = found
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.answer(200, content, X_Goog_Hash=f"md5={made['md5Hash']}")
        if not content:
            return self.answer(416, {"error": {"code": 416, "message": "out of range"}})
        first, last = asked.groups()
        part = content[-int(last) :] if not first else content[int(first) : int(last or 1e18) + 1]
        self.answer(206, part)
