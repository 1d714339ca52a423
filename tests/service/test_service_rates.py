"""Rate limits: a bucket a tenant, in one process and in a real Redis; whatever clocks do."""

from __future__ import annotations

import math
import threading
import uuid
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import redis
from fastapi.testclient import TestClient
from servers import RedisServer
from service_helpers import assert_problem

from service.access import rates
from service.access.rates import Buckets, LocalBuckets, RedisBuckets

LIMIT = 120  # one every half second


class Clock:
    """A monotonic clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        # The module that `rates` knows, not the one that everybody uses.
        monkeypatch.setattr(rates, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture(autouse=True)
def _redis_may_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine an answer may take long; a server that was stopped refuses connections at once."""
    monkeypatch.setattr(rates, "_REDIS_TIMEOUT_SECONDS", 30)


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def tenant() -> str:
    """A tenant that no other test has."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["local", "redis"])
def buckets(request: pytest.FixtureRequest) -> Buckets:
    if request.param == "local":
        return LocalBuckets()
    return RedisBuckets(request.getfixturevalue("redis_server").url)


@pytest.mark.parametrize("limit", [1, 3, 7, 60, 600, 100_000])
def test_a_full_bucket_holds_exactly_the_limit(clock: Clock, limit: int) -> None:
    buckets = LocalBuckets()
    taken = [buckets.take("a", limit) for _ in range(limit)]
    assert all(rate.allowed for rate in taken)
    assert [rate.remaining for rate in taken] == list(range(limit - 1, -1, -1))
    refused = buckets.take("a", limit)
    assert not refused.allowed
    assert (refused.remaining, refused.next_seconds) == (0, math.ceil(60 / limit))


def test_a_bucket_fills_up_evenly_and_no_further_than_full(clock: Clock) -> None:
    buckets = LocalBuckets()
    for _ in range(LIMIT):
        buckets.take("a", LIMIT)
    assert not buckets.take("a", LIMIT).allowed
    clock.now += 0.4
    assert not buckets.take("a", LIMIT).allowed
    clock.now += 0.1
    assert buckets.take("a", LIMIT).allowed
    assert not buckets.take("a", LIMIT).allowed
    clock.now += 3600
    assert [buckets.take("a", LIMIT).allowed for _ in range(LIMIT + 1)] == [True] * LIMIT + [False]


def test_waiting_as_long_as_one_is_told_is_enough(clock: Clock) -> None:
    buckets = LocalBuckets()
    for limit in (1, 7, 50, 59, 61):
        for _ in range(limit):
            buckets.take(str(limit), limit)
        clock.now += buckets.take(str(limit), limit).next_seconds
        assert buckets.take(str(limit), limit).allowed


def test_a_refused_request_takes_nothing(clock: Clock) -> None:
    buckets = LocalBuckets()
    for _ in range(LIMIT * 10):
        buckets.take("a", LIMIT)
    clock.now += 0.5
    assert buckets.take("a", LIMIT).allowed


def test_a_new_limit_holds_at_once(clock: Clock) -> None:
    buckets = LocalBuckets()
    for _ in range(LIMIT):
        buckets.take("a", LIMIT)
    clock.now += 30
    assert buckets.take("a", 10).remaining == 4
    assert buckets.take("a", 1000).remaining in range(390, 400)


def test_one_tenants_bucket_is_not_anothers(buckets: Buckets, tenant: str) -> None:
    assert [buckets.take(tenant, 2).allowed for _ in range(3)] == [True, True, False]
    assert buckets.take(f"{tenant}-other", 2).allowed


def test_requests_at_the_same_time_do_not_get_more_together(buckets: Buckets, tenant: str) -> None:
    allowed: list[bool] = []

    def take() -> None:
        allowed.extend(buckets.take(tenant, 5).allowed for _ in range(4))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # One every twelve seconds comes in: a slow test may see one or two of them.
    assert 5 <= allowed.count(True) <= 7
    assert len(allowed) == 32


def test_processes_share_the_buckets_in_redis(redis_server: RedisServer, tenant: str) -> None:
    first, second = RedisBuckets(redis_server.url), RedisBuckets(redis_server.url)
    taken = [buckets.take(tenant, 2).allowed for buckets in (first, second, first, second)]
    assert taken == [True, True, False, False]


def test_the_clock_of_redis_may_be_set_back(redis_server: RedisServer, tenant: str) -> None:
    """That is not a year's wait, but an empty bucket's. And a key of Redis goes by itself."""
    buckets = RedisBuckets(redis_server.url)
    buckets.take(tenant, 2)
    key = f"onnx-qat:rate:{tenant}"
    with redis.Redis.from_url(redis_server.url) as server:
        assert 0 < server.pttl(key) <= 60_000
        server.set(key, float(server.get(key)) + 3e7)
    assert buckets.take(tenant, 2).next_seconds == 30


def test_each_process_limits_by_itself_while_redis_does_not_answer(clock: Clock, tenant: str) -> None:
    with RedisServer() as server:
        buckets = RedisBuckets(server.url)
        assert buckets.take(tenant, 2).remaining == 1
        server.stop()
        assert [buckets.take(tenant, 2).allowed for _ in range(3)] == [True, True, False]
        # It is back, with nothing in it, and is asked again after a while.
        server.start()
        assert not buckets.take(tenant, 2).allowed
        clock.now += 6
        assert buckets.take(tenant, 2).remaining == 1


def test_answers_say_what_is_left_and_a_refusal_when_to_go_on(start_client) -> None:
    client: TestClient = start_client()
    assert "ratelimit" not in client.get("/v1/jobs").headers
    client.app.state.services.tenants.set_quotas("default", {"requests_per_minute": 3})
    first = client.get("/v1/jobs")
    assert first.headers["ratelimit-policy"] == '"minute";q=3;w=60'
    assert first.headers["ratelimit"] == '"minute";r=2;t=20'
    # Errors count, and say it too.
    assert client.get("/v1/jobs/none").headers["ratelimit"].startswith('"minute";r=1;')
    assert client.get("/v1/tenant").json()["requests_per_minute"] == 3

    refused = client.get("/v1/jobs")
    assert_problem(refused, 429, "rate_limited")
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert refused.headers["ratelimit"] == f'"minute";r=0;t={refused.headers["retry-after"]}'
    assert refused.headers["ratelimit-policy"] == '"minute";q=3;w=60'
    for path in ("/health/live", "/health/ready", "/docs"):
        assert client.get(path).status_code == 200


def test_api_processes_share_their_limits_by_a_setting(start_client, redis_server: RedisServer) -> None:
    client: TestClient = start_client(redis_url=redis_server.url)
    client.app.state.services.tenants.set_quotas("default", {"requests_per_minute": 2})
    other = RedisBuckets(redis_server.url)
    assert other.take("default", 2).allowed
    assert client.get("/v1/jobs").status_code == 200
    assert_problem(client.get("/v1/jobs"), 429, "rate_limited")
    assert not other.take("default", 2).allowed
