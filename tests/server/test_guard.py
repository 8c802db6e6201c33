"""Who is let in: keys, hosts, addresses; what every response carries; what the log says and does not say."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator

import httpx2
import pytest

from redrafter.cli.serve import read_keys
from redrafter.errors import InvalidRequest
from redrafter.server import guard
from redrafter.server.guard import Keys
from redrafter.server.logs import JsonFormatter
from redrafter.server.settings import ServeSettings
from tests.server.client import chat, error_of
from tests.server.serving import Running, running

KEYS = ("first-key-1234", "second-key-5678")


@pytest.fixture(scope="module")
def closed() -> Iterator[Running]:
    with running(api_keys=KEYS) as run:
        yield run


ROUTES = [
    ("GET", "/"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("GET", "/v1/redrafter/info"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/health?deep=1"),
    ("GET", "/nothing"),
    ("GET", "//health"),
    ("GET", "/health/"),
]


def test_the_list_of_routes_is_whole(closed: Running) -> None:
    starlette = closed.server.config.app._app
    open_ones = {route.path for route in starlette.routes} - {path for _, path in ROUTES}
    assert open_ones == {"/health", "/ready", "/v1/models/{model:path}"}


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "header", [{}, {"Authorization": "Bearer wrong-key"}, {"Authorization": "Bearer"}, {"X-Api-Key": ""}]
)
def test_every_route_wants_a_key(closed: Running, method: str, path: str, header: dict[str, str]) -> None:
    response = httpx2.request(method, closed.url + path, headers=header)
    assert response.status_code == 401
    assert error_of(response)["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"]


@pytest.mark.parametrize("key", KEYS)
def test_any_of_the_keys_opens_by_any_of_the_headers(closed: Running, key: str) -> None:
    basic = base64.b64encode(f"me:{key}".encode()).decode()
    for header in ({"Authorization": f"Bearer {key}"}, {"X-Api-Key": key}, {"Authorization": f"Basic {basic}"}):
        assert httpx2.get(closed.url + "/v1/models", headers=header).status_code == 200
    assert chat(closed.url).status_code == 401


def test_health_and_readiness_need_no_key(closed: Running) -> None:
    assert [httpx2.get(closed.url + path).status_code for path in ("/health", "/ready")] == [200, 200]


def test_keys_are_compared_as_digests_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    keys = Keys(KEYS)
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or a == b)
    salts = {keys.salt_of({b"authorization": b"Bearer " + key.encode()}) for key in KEYS}
    assert len(salts) == 2 and None not in salts
    assert keys.salt_of({}) is None
    assert compared == [(32, 32)] * 6


def test_requests_of_different_keys_share_nothing_in_the_cache(closed: Running) -> None:
    def reused(key: str) -> int:
        body = {"prompt": "the same beginning of a prompt", "max_tokens": 2, "temperature": 0}
        headers = {"Authorization": f"Bearer {key}"}
        response = httpx2.post(closed.url + "/v1/completions", json=body, headers=headers, timeout=60)
        return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [reused(KEYS[0]), reused(KEYS[1])] == [0, 0]
    assert reused(KEYS[1]) > 0


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.:8000", "", "[::1", "localhost:1:2"]
)
def test_another_host_is_refused_on_loopback(server_url: str, host: str) -> None:
    response = httpx2.get(server_url + "/v1/models", headers={"Host": host})
    assert response.status_code == 403 and error_of(response)["code"] == "host"


@pytest.mark.parametrize("host", ["127.0.0.1", "LOCALHOST:99", "[::1]:8000"])
def test_the_own_hosts_are_served(server_url: str, host: str) -> None:
    assert httpx2.get(server_url + "/v1/models", headers={"Host": host}).status_code == 200


def test_other_addresses_need_a_key_or_a_word() -> None:
    with pytest.raises(InvalidRequest, match="--api-key-file"):
        ServeSettings(model_name="m", host="0.0.0.0")
    with pytest.raises(InvalidRequest, match="reachable"):
        ServeSettings(model_name="m", host="example.org")
    assert ServeSettings(model_name="m", host="0.0.0.0", api_keys=KEYS).hosts is None
    assert ServeSettings(model_name="m", host="::", open_to_all=True).hosts is None
    assert "[::1]" in (ServeSettings(model_name="m", host="::1").hosts or ())
    assert "my.name" in (ServeSettings(model_name="m", allowed_hosts=("my.name",)).hosts or ())


def test_keys_come_from_a_file_and_from_the_environment(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# mine\nfirst-key-1234\n\n  second-key-5678  \n")
    monkeypatch.setenv("REDRAFTER_API_KEYS", "third-key-9999,fourth-key-0000")
    assert set(read_keys(file)) == {*KEYS, "third-key-9999", "fourth-key-0000"}
    monkeypatch.delenv("REDRAFTER_API_KEYS")
    assert read_keys(None) == ()
    for text in ("# nothing\n", "short\n", "with space in it\n", "ümlaut-key-1234\n"):
        file.write_text(text)
        with pytest.raises(InvalidRequest) as refused:
            read_keys(file)
        assert text.strip() not in str(refused.value)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_keys(tmp_path / "absent")


def test_every_response_names_its_request(server_url: str) -> None:
    assert httpx2.get(server_url + "/health", headers={"X-Request-Id": "my-id.1"}).headers["x-request-id"] == "my-id.1"
    for odd in ("a b", "x" * 65, "\u00e9"):
        given = httpx2.get(server_url + "/nothing", headers={"X-Request-Id": odd.encode()}).headers["x-request-id"]
        assert len(given) == 32
    responses = [chat(server_url, headers={}), chat(server_url, n=0), httpx2.get(server_url + "/")]
    assert all(len(r.headers["x-request-id"]) == 32 for r in responses)
    assert all(r.headers["x-content-type-options"] == "nosniff" for r in responses)


def test_the_log_tells_the_request_and_not_its_text(server_url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "redrafter.server"):
        body = chat(server_url, messages=[{"role": "user", "content": "secret words"}], odd_field_of_mine=1).json()
        assert chat(server_url, odd_field_of_mine=2).status_code == 200
        httpx2.get(server_url + "/v1/models/%0a%1b%5b31m")
    lines = [JsonFormatter().format(record) for record in caplog.records]
    text = "\n".join(lines)
    assert "secret" not in text and body["choices"][0]["message"]["content"] not in text
    assert all(line.isprintable() for line in lines)
    told = [json.loads(line) for line in lines]
    requests = [line for line in told if line["message"] == "request" and line["path"] == "/v1/chat/completions"]
    assert requests[0]["answer_tokens"] == 8 and requests[0]["finish_reasons"] == ["length"]
    assert requests[0]["status"] == 200 and requests[0]["seconds"] > 0
    assert [line["field"] for line in told if "field" in line] == ["odd_field_of_mine"]
