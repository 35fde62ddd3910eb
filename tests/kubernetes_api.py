"""A small Kubernetes API server on loopback, for tests: the real paths, objects and errors, over real HTTP or TLS.

It holds any object under its own path. What it does as the real one: resourceVersion and 409, merge patch, label and
field selectors, limit/continue, watch, discovery, Status objects, bearer tokens. What a test can order: rules that
refuse, delay or cut requests (`refuse`), and a stop and start on the same port.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable

TLS = Path(__file__).parent / "data" / "tls"
TOKEN = "a-token-of-the-tests"
KINDS = {
    "configmaps": "ConfigMap",
    "daemonsets": "DaemonSet",
    "endpoints": "Endpoints",
    "endpointslices": "EndpointSlice",
    "felixconfigurations": "FelixConfiguration",
    "globalnetworkpolicies": "GlobalNetworkPolicy",
    "hostendpoints": "HostEndpoint",
    "ippools": "IPPool",
    "installations": "Installation",
    "namespaces": "Namespace",
    "networkpolicies": "NetworkPolicy",
    "nodes": "Node",
    "pods": "Pod",
    "services": "Service",
}
COLLECTION = re.compile(r"(/api/v1|/apis/[^/]+/[^/]+)(?:/namespaces/([^/]+))?/([a-z]+)(?:/([^/]+))?")
REASONS = {
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    410: "Expired",
    500: "InternalError",
}

Object = dict[str, Any]


@dataclass
class Rule:
    """What befalls requests whose "METHOD /path" matches: *status* instead of an answer (0: the connection is cut)."""

    pattern: str
    status: int = 0
    times: int = -1
    wait: threading.Event | None = None
    before: Callable[[], object] | None = None
    hits: int = 0


@dataclass
class Store:
    """All objects by (api, namespace, plural, name); api is ``/api/v1`` or ``/apis/GROUP/VERSION``."""

    objects: dict[tuple[str, str, str, str], Object] = field(default_factory=dict)
    version: int = 100
    history: list[tuple[int, str, tuple[str, str, str, str], Object]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def put(self, key: tuple[str, str, str, str], value: Object, event: str) -> Object:
        """Keep *value* under a new resourceVersion and tell the watchers."""
        with self.changed:
            self.version += 1
            value.setdefault("metadata", {})["resourceVersion"] = str(self.version)
            if event == "DELETED":
                self.objects.pop(key, None)
            else:
                self.objects[key] = value
            self.history.append((self.version, event, key, json.loads(json.dumps(value))))
            self.changed.notify_all()
            return value


class KubernetesApi:
    """The server. ``with KubernetesApi() as api: api.put("/api/v1/nodes/a", {...}); api.kubeconfig(path)``."""

    def __init__(self, tls: bool = False, apis: tuple[str, ...] = ()) -> None:
        self.store = Store()
        self.apis = set(apis)
        self.rules: list[Rule] = []
        self.requests: list[str] = []
        self.texts: dict[str, str] = {}
        self.tls = tls
        self.connections: set[socket.socket] = set()
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> KubernetesApi:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen; again on the same port after a stop."""
        api = self

        class Handler(_Handler):
            server_api = api

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False  # an idle keep-alive connection must not hold the end of a test

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that went away is part of the tests; anything else is a defect of theirs."""
                if not isinstance(sys.exc_info()[1], OSError):
                    super().handle_error(request, client_address)

        self._server = Server(("127.0.0.1", self._port), Handler)
        if self.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(TLS / "loopback.crt", TLS / "loopback.key")
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections and cut those that stand; the objects stay."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._server = None
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # its client has gone already
                connection.shutdown(socket.SHUT_RDWR)
        for rule in self.rules:
            if rule.wait:
                rule.wait.set()

    def kubeconfig(self, path: Path, token: str = TOKEN, trusted: bool = True) -> str:
        """Write a kubeconfig for this server and return its name. *trusted*: with our certificate as authority."""
        cluster: Object = {"server": self.url}
        if self.tls and trusted:
            cluster["certificate-authority"] = str(TLS / "loopback.crt")
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tests", "cluster": cluster}],
            "users": [{"name": "tests", "user": {"token": token}}],
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "tests"}}],
            "current-context": "tests",
        }
        path.write_text(json.dumps(content))
        return str(path)

    def put(self, path: str, value: Object) -> Object:
        """Set the object at *path*, as somebody else would: a new resourceVersion, watchers are told."""
        key = self._key(path)
        api, namespace, plural, name = key
        full: Object = {
            "apiVersion": api.removeprefix("/apis/").removeprefix("/api/"),
            "kind": KINDS.get(plural, "Kind"),
        }
        full |= json.loads(json.dumps(value))
        metadata = full.setdefault("metadata", {})
        metadata["name"] = name
        if namespace:
            metadata["namespace"] = namespace
        return self.store.put(key, full, "MODIFIED" if key in self.store.objects else "ADDED")

    def put_text(self, path: str, text: str) -> None:
        """What a GET of *path* answers as plain text: a container's log."""
        self.texts[path] = text

    def get(self, path: str) -> Object | None:
        """The object at *path*, without a request."""
        return self.store.objects.get(self._key(path))

    def wait_for(self, wanted: Callable[[], bool], timeout_s: float = 30) -> bool:
        """Whether *wanted* became true; looked at after each change of an object."""
        with self.store.changed:
            return self.store.changed.wait_for(wanted, timeout_s)

    def remove(self, path: str) -> None:
        """Delete the object at *path*, as somebody else would."""
        key = self._key(path)
        self.store.put(key, self.store.objects[key], "DELETED")

    def refuse(self, pattern: str, status: int = 0, times: int = -1) -> Rule:
        """Answer requests whose "METHOD /path" matches *pattern* with *status* (0: cut the connection)."""
        rule = Rule(pattern, status, times)
        self.rules.append(rule)
        return rule

    def hold(self, pattern: str) -> threading.Event:
        """Let matching requests wait until the event that is returned is set."""
        event = threading.Event()
        self.rules.append(Rule(pattern, -1, wait=event))
        return event

    def before(self, pattern: str, action: Callable[[], object], times: int = 1) -> Rule:
        """Do *action* just before a matching request is answered: a change between another's reading and writing."""
        rule = Rule(pattern, -1, times, before=action)
        self.rules.append(rule)
        return rule

    def _key(self, path: str) -> tuple[str, str, str, str]:
        match = COLLECTION.fullmatch(path)
        assert match, path
        api, namespace, plural, name = match.groups()
        return api, namespace or "", plural, name or ""

    def groups(self) -> dict[str, set[str]]:
        """API groups and versions: those of the objects, and those asked for."""
        found: dict[str, set[str]] = {}
        for api in {key[0] for key in self.store.objects} | {f"/apis/{api}" for api in self.apis}:
            if api != "/api/v1":
                group, version = api.removeprefix("/apis/").split("/")
                found.setdefault(group, set()).add(version)
        return found


class _Handler(BaseHTTPRequestHandler):
    server_api: KubernetesApi
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server_api.connections.add(self.connection)

    def finish(self) -> None:
        self.server_api.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: object) -> None:
        """Silence."""

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PATCH = do_DELETE = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        api = self.server_api
        url = urlsplit(self.path)
        path = unquote(url.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        line = f"{self.command} {path}"
        api.requests.append(line)
        for rule in list(api.rules):
            if rule.times != 0 and re.search(rule.pattern, line):
                rule.times -= 1
                rule.hits += 1
                if rule.wait:
                    rule.wait.wait(30)
                if rule.before:
                    rule.before()
                if rule.status == 0:
                    self.close_connection = True
                    return
                if rule.status > 0:
                    self._status(rule.status, f"refused by a rule of the test: {rule.pattern}")
                    return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._status(401, "Unauthorized")
            return
        if path in api.texts:
            self._send_text(api.texts[path])
        elif not self._discovery(path):
            self._objects(path, query, json.loads(raw) if raw else {})

    def _send(self, status: int, value: Object) -> None:
        raw = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _send_text(self, text: str) -> None:
        raw = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _status(self, code: int, message: str) -> None:
        status = "Success" if code < 400 else "Failure"
        reason = REASONS.get(code, "")
        self._send(
            code,
            {
                "kind": "Status",
                "apiVersion": "v1",
                "status": status,
                "message": message,
                "reason": reason,
                "code": code,
            },
        )

    def _discovery(self, path: str) -> bool:
        api = self.server_api
        if path == "/version":
            self._send(200, {"major": "1", "minor": "31", "gitVersion": "v1.31.2"})
        elif path == "/api":
            self._send(200, {"kind": "APIVersions", "versions": ["v1"]})
        elif path == "/apis":
            groups = []
            for name, versions in sorted(api.groups().items()):
                listed = [{"groupVersion": f"{name}/{version}", "version": version} for version in sorted(versions)]
                groups.append({"name": name, "versions": listed, "preferredVersion": listed[0]})
            self._send(200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        elif re.fullmatch(r"/api/v1|/apis/[^/]+/[^/]+", path):
            plurals = {key[2]: bool(key[1]) for key in api.store.objects if key[0] == path}
            resources = [
                {"name": plural, "namespaced": namespaced, "kind": KINDS.get(plural, "Kind"), "verbs": ["get", "list"]}
                for plural, namespaced in sorted(plurals.items())
            ]
            version = path.removeprefix("/apis/").removeprefix("/api/")
            if version == "v1" or version in {f"{g}/{v}" for g, all_of in api.groups().items() for v in all_of}:
                self._send(200, {"kind": "APIResourceList", "groupVersion": version, "resources": resources})
            else:
                self._status(404, "the server could not find the requested resource")
        else:
            return False
        return True

    def _objects(self, path: str, query: dict[str, str], body: Object) -> None:
        match = COLLECTION.fullmatch(path)
        if not match:
            self._status(404, "the server could not find the requested resource")
            return
        key = (match[1], match[2] or "", match[3], match[4] or "")
        store = self.server_api.store
        current = store.objects.get(key)
        if self.command == "POST":
            key = (*key[:3], body["metadata"]["name"])
            if key in store.objects:
                self._status(409, f'{key[2]} "{key[3]}" already exists')
            else:
                self._send(201, store.put(key, body, "ADDED"))
        elif not key[3]:
            self._watch(key, query) if query.get("watch") in ("true", "1", "True") else self._list(key, query)
        elif current is None:
            self._status(404, f'{key[2]} "{key[3]}" not found')
        elif self.command == "GET":
            self._send(200, current)
        elif self.command == "DELETE":
            wanted = (body.get("preconditions") or {}).get("resourceVersion")
            if self._conflicts(key, current, wanted):
                return
            store.put(key, current, "DELETED")
            self._status(200, "deleted")
        else:
            if self._conflicts(key, current, (body.get("metadata") or {}).get("resourceVersion")):
                return
            if self.command == "PATCH":
                kind = self.headers.get("Content-Type")
                if kind != "application/merge-patch+json":
                    self._status(415, f"the body of the request was in an unknown format: {kind}")
                    return
                body = merge_patch(current, body)
            self._send(200, store.put(key, body, "MODIFIED"))

    def _conflicts(self, key: tuple[str, str, str, str], current: Object, wanted: str | None) -> bool:
        if wanted is None or wanted == current["metadata"]["resourceVersion"]:
            return False
        self._status(409, f'Operation cannot be fulfilled on {key[2]} "{key[3]}": the object has been modified')
        return True

    def _list(self, key: tuple[str, str, str, str], query: dict[str, str]) -> None:
        store = self.server_api.store
        if key[0] != "/api/v1" and key[0] not in {
            f"/apis/{g}/{v}" for g, vs in self.server_api.groups().items() for v in vs
        }:
            self._status(404, "the server could not find the requested resource")
            return
        found = [value for each, value in sorted(store.objects.items()) if selected(each, value, key, query)]
        start = int(query.get("continue") or 0)
        limit = int(query.get("limit") or 0) or len(found) or 1
        metadata: Object = {"resourceVersion": str(store.version)}
        if start + limit < len(found):
            metadata |= {"continue": str(start + limit), "remainingItemCount": len(found) - start - limit}
        self._send(
            200,
            {
                "kind": KINDS.get(key[2], "Kind") + "List",
                "apiVersion": key[0].removeprefix("/apis/").removeprefix("/api/"),
                "metadata": metadata,
                "items": found[start : start + limit],
            },
        )

    def _watch(self, key: tuple[str, str, str, str], query: dict[str, str]) -> None:
        """Events after resourceVersion, one JSON object a line, until timeoutSeconds pass or the client goes."""
        store = self.server_api.store
        seen = int(query.get("resourceVersion") or 0)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:
            with store.changed:
                fresh = [each for each in store.history if each[0] > seen]
                if not fresh and not store.changed.wait(float(query.get("timeoutSeconds") or 30)):
                    break
            for version, event, each, value in fresh:
                seen = version
                if selected(each, value, key, query):
                    raw = json.dumps({"type": event, "object": value}).encode() + b"\n"
                    self.wfile.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")
                    self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")


def selected(
    each: tuple[str, str, str, str], value: Object, key: tuple[str, str, str, str], query: dict[str, str]
) -> bool:
    """Whether the object *value* at *each* belongs to a list of the collection *key* under the query's selectors."""
    if (each[0], each[2]) != (key[0], key[2]) or (key[1] and each[1] != key[1]):
        return False
    labels = value["metadata"].get("labels") or {}
    for term in filter(None, query.get("labelSelector", "").split(",")):
        name, equals, wanted = term.replace("==", "=").partition("=")
        if name not in labels or (equals and labels[name] != wanted):
            return False
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        name, _, wanted = term.replace("==", "=").partition("=")
        found: Any = value
        for part in name.split("."):
            found = (found or {}).get(part)
        if found != wanted:
            return False
    return True


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386: null removes a member, an object merges, anything else replaces."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged
