"""A stand-in for the Hugging Face hub over loopback: as much of its API as uploading a folder takes."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubServer(ThreadingHTTPServer):
    """Keeps what arrives in `repositories`; `refusals` answers paths with an error instead."""

    daemon_threads = True

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.kinds: dict[str, str] = {}
        """OWNER/NAME -> model, dataset or space."""
        self.visibility: dict[str, str | None] = {}
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        """Large files by their SHA-256."""
        self.refusals: dict[str, int] = {}
        """Start of a path -> HTTP status."""
        self.unknown: list[str] = []
        """Requests that this stand-in does not know."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        refused = next((status for start, status in self.server.refusals.items() if path.startswith(start)), None)
        if refused is not None:
            self._answer(refused, {"error": "refused by the stand-in"})
        elif self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            self._answer(200, {"files": [{"shouldIgnore": False, **f} for f in files]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._large(json.loads(body)["objects"])
        elif path == "/lfs/verify":
            asked = json.loads(body)
            known = len(self.server.objects.get(asked["oid"], b"")) == asked["size"]
            self._answer(200 if known else 404, {})
        elif path.endswith("/commit/main"):
            self._commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
        else:
            self._unknown()

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        self._answer(200, {})

    def do_GET(self) -> None:
        self._unknown()

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        there = name in self.server.kinds
        kind = self.server.kinds.setdefault(name, "model")
        if not there:
            self.server.visibility[name] = asked.get("visibility")
        place = {"model": "", "dataset": "datasets/", "space": "spaces/"}[kind]
        self._answer(409 if there else 200, {"url": f"{self.server.address}/{place}{name}"})

    def _large(self, objects: list[dict[str, Any]]) -> None:
        address = self.server.address
        actions = {"upload": {"href": f"{address}/lfs/upload"}, "verify": {"href": f"{address}/lfs/verify"}}
        self._answer(200, {"transfer": "basic", "objects": [{**o, "actions": actions} for o in objects]})

    def _commit(self, name: str, body: bytes) -> None:
        files = self.server.repositories.setdefault(name, {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        url = f"{self.server.address}/{name}/commit/0"
        self._answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": url, "hookOutput": ""})

    def _unknown(self) -> None:
        self.server.unknown.append(f"{self.command} {self.path}")
        self._answer(404, {"error": "not found"})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output clean."""
