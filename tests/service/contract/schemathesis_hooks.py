"""What the service refuses for a reason that no JSON schema can express, and what it takes beside JSON."""

from __future__ import annotations

from typing import Final

import schemathesis
from schemathesis.core.failures import Failure
from schemathesis.core.transport import Response

BEYOND_SCHEMAS: Final = {
    "external_data_outside": "a part's file name that leads elsewhere",
    "file_name_invalid": "two parts with the same file name",
    "idempotency_key_reused": "the same key came with something else before",
    "recipe_invalid": "fields of the recipe that contradict each other",
    "recipe_unsupported": "fields of the recipe that do not go together in this version",
    "request_too_large": "an announced length beyond the operator's limit",
    "webhook_url_refused": "an address that webhooks may not go to",
}

schemathesis.serializer.alias("application/offset+octet-stream", "application/octet-stream")


@schemathesis.hook
def filter_failure(
    context: schemathesis.HookContext, failure: Failure, case: schemathesis.Case, response: Response
) -> bool:
    """Drop the complaint that a request was refused which conforms to the schemas, if that is why."""
    if failure.title != "Schema-valid request rejected" or not response.content:
        return True
    return response.json()["code"] not in BEYOND_SCHEMAS
