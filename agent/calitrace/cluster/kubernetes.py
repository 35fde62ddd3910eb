"""The Kubernetes API by path, through the official client: its kubeconfig, credentials, TLS and proxies; plain JSON.

Objects stay what the API sends, so that an unknown field or version is kept and not lost in a class.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calitrace.errors import EnvironmentUnfit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kubernetes.client import ApiClient

TIMEOUT_S = 5.0
PAGE = 500
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_HINTS = {
    401: "the credentials are wrong or have expired: log in again, or name another file with --kubeconfig",
    403: "this account lacks the permission; ask `kubectl auth can-i` with the same kubeconfig",
    404: "look at `kubectl api-resources`: is Calico's API installed, and does the object exist?",
    409: "somebody else changed it at the same moment: try again",
    410: "the list changed too much while it was read: try again",
    429: "the API server is overloaded: try again later",
}


class ApiRefused(EnvironmentUnfit):
    """The API answered with an error, or not at all.

    *status*: HTTP status; 0 when no answer came: no connection, time-out, TLS.
    """

    def __init__(self, status: int, cause: str, hint: str = "") -> None:
        super().__init__(cause, hint)
        self.status = status


class Cluster:
    """One API server and the account to use with it.

    *kubeconfig*: path, or "" for $KUBECONFIG, then ~/.kube/config, then the service account of the pod that we are in.
    *context*: of that file, or "" for its current one. *timeout_s*: for connecting, and again for each answer.
    Paths are those of the API: ``/api/v1/nodes``, ``/apis/apps/v1/namespaces/kube-system/daemonsets/calico-node``.
    Keyword arguments are query parameters: ``labelSelector="k8s-app=calico-node"``.
    *kubeconfig* and *context* stay readable, as another process needs them: absolute, $KUBECONFIG resolved.
    Every method raises ApiRefused; making one raises EnvironmentUnfit without package or configuration.
    """

    def __init__(self, kubeconfig: str = "", context: str = "", timeout_s: float = TIMEOUT_S) -> None:
        files = (kubeconfig or os.environ.get("KUBECONFIG", "")).split(os.pathsep)
        self.kubeconfig = os.pathsep.join(str(_expanded(each).absolute()) for each in files if each)
        self.context = context
        self._timeout_s = timeout_s
        self._client = _client(self.kubeconfig, context)
        self.server: str = self._client.configuration.host

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._client.rest_client.close()

    def version(self) -> str:
        """The API server's release: ``v1.31.2``."""
        return str(self.get("/version").get("gitVersion", "unknown"))

    def get(self, path: str, **query: str) -> dict[str, Any]:
        """One object."""
        return self._request("GET", path, query)

    def find(self, path: str, **query: str) -> dict[str, Any] | None:
        """One object, or None when there is none of that name (or no such API)."""
        try:
            return self.get(path, **query)
        except ApiRefused as refused:
            if refused.status != 404:
                raise
            return None

    def iter_list(self, path: str, **query: str) -> Iterator[dict[str, Any]]:
        """All objects of a collection, read page by page."""
        query = {"limit": str(PAGE), **query}
        while True:
            answer = self.get(path, **query)
            yield from answer.get("items") or ()
            following = (answer.get("metadata") or {}).get("continue")
            if not following:
                return
            query["continue"] = following

    def text(self, path: str, **query: str) -> str:
        """What is no JSON: a container's log, at ``…/pods/NAME/log``."""
        return self._answer("GET", path, query, accept="text/plain, */*").decode(errors="replace")

    def api_versions(self) -> set[str]:
        """All groups with all their versions that the server has: ``crd.projectcalico.org/v1``."""
        groups = self.get("/apis").get("groups") or ()
        return {version["groupVersion"] for group in groups for version in group.get("versions") or ()}

    def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Add an object to the collection *path*; ApiRefused with status 409 when it exists."""
        return self._request("POST", path, {}, body, "application/json")

    def merge(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """JSON merge patch (RFC 7386). With metadata.resourceVersion in *body*: status 409 when it is another."""
        return self._request("PATCH", path, {}, body, "application/merge-patch+json")

    def delete(self, path: str, resource_version: str) -> dict[str, Any]:
        """Remove an object; ApiRefused with status 409 unless it is still of *resource_version*."""
        body = {"preconditions": {"resourceVersion": resource_version}}
        return self._request("DELETE", path, {}, body, "application/json")

    def _request(
        self, method: str, path: str, query: dict[str, str], body: dict[str, Any] | str | None = None, content: str = ""
    ) -> dict[str, Any]:
        raw = self._answer(method, path, query, body, content)
        try:
            answer = json.loads(raw)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ApiRefused(0, f"{self.server} does not answer {path} as a Kubernetes API does", "check the address")
        return answer

    def _answer(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        body: dict[str, Any] | str | None = None,
        content: str = "",
        accept: str = "application/json",
    ) -> bytes:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        headers = {"Accept": accept} | ({"Content-Type": content} if content else {})
        try:
            verb, url, headers, *_ = self._client.param_serialize(
                method, path, query_params=list(query.items()), header_params=headers, auth_settings=["BearerToken"]
            )
            response = self._client.rest_client.request(
                verb, url, headers=headers, body=body, _request_timeout=(self._timeout_s, self._timeout_s)
            )
            raw: bytes = response.read()
        except (HTTPError, ApiException, OSError) as failed:
            raise _unreachable(self.server, failed) from failed
        if not 200 <= response.status <= 299:
            raise _refusal(method, path, response.status, raw)
        return raw


def home_config() -> Path:
    """Where kubectl looks for its configuration, if nothing else is said."""
    return _expanded("~/.kube/config")


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # a user who has no home: of a container, with any number
        return Path(path)


def _client(kubeconfig: str, context: str) -> ApiClient:
    """The official client, configured."""
    try:
        from kubernetes import client, config
        from kubernetes.config.config_exception import ConfigException
        from yaml import YAMLError
    except ImportError as missing:
        raise EnvironmentUnfit(
            f"the Python package kubernetes is missing or broken ({missing})", "pip install 'calitrace[kubernetes]'"
        ) from missing
    configuration = client.Configuration()
    try:
        if not kubeconfig and not home_config().exists() and SERVICE_ACCOUNT.exists():
            config.load_incluster_config(client_configuration=configuration)
        else:
            config.load_kube_config(
                kubeconfig or None, context or None, client_configuration=configuration, persist_config=False
            )
    except (ConfigException, YAMLError, OSError, ValueError, TypeError, AttributeError, KeyError) as wrong:
        raise EnvironmentUnfit(
            f"no usable Kubernetes configuration: {_one_line(wrong)}",
            "name a kubeconfig with --kubeconfig or $KUBECONFIG; under sudo, root's ~/.kube/config is looked at",
        ) from wrong
    configuration.retries = False
    return client.ApiClient(configuration)


def _refusal(method: str, path: str, status: int, raw: bytes) -> ApiRefused:
    """The error of an answer; the API says why in the message of a Status object."""
    try:
        said = json.loads(raw)["message"]
    except (ValueError, KeyError, TypeError):
        said = "no reason given"
    hint = _HINTS.get(status, "look at the API server's own log" if status >= 500 else "")
    return ApiRefused(status, f"Kubernetes refused {method} {path} with {status}: {_one_line(said)}", hint)


def _unreachable(server: str, failed: Exception) -> ApiRefused:
    """The error of a request that got no answer."""
    from urllib3.exceptions import NewConnectionError, TimeoutError

    text = _one_line(failed)
    if "SSLError" in text or "CERTIFICATE" in text.upper():
        return ApiRefused(
            0, f"TLS with {server} failed: {text}", "the kubeconfig's certificate-authority does not fit this server"
        )
    if isinstance(failed, TimeoutError) and not isinstance(failed, NewConnectionError):
        return ApiRefused(0, f"{server} did not answer in time", "is it the right server, and is it healthy?")
    return ApiRefused(0, f"cannot reach {server}: {text}", "is the API server up, and reachable from this node?")


def _one_line(wrong: object) -> str:
    """The message without line breaks and the full stop at the end."""
    return " ".join(str(wrong).split()).removesuffix(".")
