"""Generated bodies against the real server: 400 here, 10,000 by `fuzz_server.py`; and its OpenAPI schema."""

from __future__ import annotations

from collections.abc import Iterator

import fuzz_server
import hypothesis
import pytest
import schemathesis
import server

pytestmark = pytest.mark.slow

NUMBER = 400
PATHS = (
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/completions",
    "/v1/models",
    "/v1/chat/completions/control",
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server.running(tmp_path_factory.mktemp("fuzz") / "log.txt", *fuzz_server.FLAGS) as url:
        yield url


def test_every_body_has_the_reply_that_a_simple_reading_of_it_demands(url: str) -> None:
    outcomes = fuzz_server.run(NUMBER, 0, url)
    assert sum(outcomes.values()) == NUMBER
    # Each kind of check has been made.
    assert min(outcomes[kind] for kind in ("refused", "refused behind", "silent", "done", "streamed, same text")) > 0


@pytest.mark.parametrize("path", PATHS)
def test_no_body_that_the_servers_own_schema_allows_is_a_500(url: str, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json").include(path=path)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert operations, "the schema must have the path"
    for operation in operations:

        @hypothesis.seed(0)
        @hypothesis.settings(
            max_examples=40, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
        )
        @hypothesis.given(case=operation.as_strategy())
        def send(case: schemathesis.Case) -> None:
            case.call_and_validate(base_url=url, checks=[schemathesis.checks.not_a_server_error], timeout=60)

        send()
