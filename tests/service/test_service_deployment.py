"""The files that deploy the service: what they say is so, and no container has more than it needs."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from typing import Any

import compose
import dockerfile
import pytest
from compose import REPOSITORY, SECRETS
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from service.settings import Settings

SERVICES = compose.services(SECRETS)
SCALED = {name: service for name, service in SERVICES.items() if "scale" in service.get("profiles", [])}
ONCE = {name for name, service in SERVICES.items() if service["restart"] == "no"}
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

each_service = pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES.keys())


def test_compose_file_keeps_to_the_specification() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_a_profile_one_container_starts_and_needs_no_variable() -> None:
    assert SERVICES.keys() - SCALED.keys() == {"onnx-qat"}
    # Compose asks for these also where the service that has them is not started.
    assert not re.search(r"\$\{\w+:?\?", re.sub(r"#.*", "", compose.TEXT))


def test_merged_parts_have_no_key_in_common() -> None:
    """Not every reader of YAML lets the same one win."""
    document = compose.load(SECRETS)
    merges = re.findall(r"<<: \[(.*)\]", compose.TEXT)
    assert len(merges) == compose.TEXT.count("<<: [")
    for merge in merges:
        parts = [set(document[f"x-{name.strip('* ')}"]) for name in merge.split(",")]
        assert sum(map(len, parts)) == len(set().union(*parts)), merge


@each_service
def test_every_setting_in_the_environment_is_one_and_has_a_value_that_is_valid(
    service: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = dockerfile.ENVIRONMENT | service.get("environment", {})
    names = {name.removeprefix("ONNX_QAT_").lower() for name in environment if name.startswith("ONNX_QAT_")}
    assert names <= set(Settings.model_fields)
    for name in [name for name in os.environ if name.startswith("ONNX_QAT_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Settings().model_fields_set == names


def test_what_a_user_sets_reaches_the_containers_and_nothing_else_does() -> None:
    values = {name: f"value of {name}" for name in compose.PASSED}
    assert "ONNX_QAT_METRICS_TOKEN" in values
    for name in ("onnx-qat", "api", "worker"):
        assert values.items() <= compose.services(values)[name]["environment"].items()
        assert not values.keys() & SERVICES[name]["environment"].keys()


def test_every_variable_of_the_compose_file_is_explained() -> None:
    example = (REPOSITORY / ".env.example").read_text()
    assert {name for name in compose.VARIABLES if name.startswith("QAT_")} == set(
        re.findall(r"^#?(QAT_\w+)=", example, re.MULTILINE)
    )
    settings = {name for name in compose.VARIABLES if name.startswith("ONNX_QAT_")}
    assert settings == set(re.findall(r"ONNX_QAT_\w+", example))
    assert {name.removeprefix("ONNX_QAT_").lower() for name in settings} <= set(Settings.model_fields)


@each_service
def test_containers_have_no_privileges_and_are_bounded(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"] <= 1024
    assert service["mem_limit"]
    user = service.get("user") or ("build" in service and dockerfile.USER)
    assert int(user.split(":")[0]) > 0
    assert "/tmp" in service["tmpfs"]


@pytest.mark.parametrize("service", SCALED.values(), ids=SCALED.keys())
def test_containers_beside_each_other_share_the_processors(service: dict[str, Any]) -> None:
    assert float(service["cpus"]) > 0


@each_service
def test_others_wait_for_what_a_container_provides(service: dict[str, Any]) -> None:
    """For its health, by a check of its own or the image's; or, where it runs once, for its end."""
    for name, dependency in service.get("depends_on", {}).items():
        once = dependency["condition"] == "service_completed_successfully"
        assert once or dependency["condition"] == "service_healthy"
        assert once == (name in ONCE), name


@each_service
def test_what_keeps_running_has_a_health_check(service: dict[str, Any]) -> None:
    if service["restart"] == "no":
        assert service["healthcheck"] == {"disable": True}
    else:
        assert "build" in service or compose.check_command(service)


@each_service
def test_images_have_versions(service: dict[str, Any]) -> None:
    assert re.search(r":(cpu|scale|[\d.]+[\w.-]*)$", service["image"]), service["image"]


def test_nothing_but_the_proxy_is_reached_from_outside_and_by_default_from_this_machine_only() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"onnx-qat": ["127.0.0.1:8000:8000"], "proxy": ["127.0.0.1:8000:8080"]}
    networks = compose.load(SECRETS)["networks"]
    assert [name for name, network in networks.items() if not (network or {}).get("internal")] == ["front"]
    on_front = {name for name, service in SCALED.items() if "front" in service.get("networks", [])}
    assert on_front == {"proxy", "api"}
    # The proxy does not reach the database and the queue.
    assert not {name for name in ("postgres", "redis") if "files" in SERVICES[name]["networks"]}
    assert "back" not in SERVICES["proxy"]["networks"]


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize(("value", "what"), [("", "is not set"), ("p@ss/word", "letters and digits")])
def test_the_scaled_form_does_not_start_without_secrets(name: str, value: str, what: str) -> None:
    service = compose.services({**SECRETS, name: value})["secrets"]
    done = subprocess.run(
        service["command"], env=service["environment"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert name in done.stderr
    assert what in done.stderr


def test_every_server_waits_for_the_check_of_secrets() -> None:
    assert {name for name, service in SERVICES.items() if "secrets" in service.get("depends_on", {})} == {
        "postgres",
        "redis",
        "store",
    }
    service = SERVICES["secrets"]
    done = subprocess.run(service["command"], env=service["environment"], check=False)
    assert done.returncode == 0


def test_the_image_tells_its_version() -> None:
    assert f"ARG VERSION={PROJECT['version']}\n" in dockerfile.TEXT


def test_what_the_image_is_built_from_is_not_ignored() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    copied = {
        name
        for names in re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile.TEXT, re.MULTILINE)
        for name in names.split()
    }
    assert copied == {line.removeprefix("!") for line in ignored if line.startswith("!")}


def test_the_image_is_built_with_one_version_of_everything_that_it_needs() -> None:
    """All that the project needs, and that in turn needs, as far as it is installed here."""
    constraints = dict(
        line.split("==")
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    missing, seen = set(), set()
    waiting = [
        Requirement(line)
        for line in [
            *PROJECT["dependencies"],
            *(
                line
                for extra in ("cpu", "cuda", "cuda-libraries", "otel", "scale")
                for line in PROJECT["optional-dependencies"][extra]
            ),
        ]
    ]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name not in constraints:
            missing.add(name)
        elif not requirement.specifier.contains(constraints[name], prereleases=True):
            missing.add(str(requirement))
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                lines = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:  # of the other kind of onnxruntime
                continue
            needed = [Requirement(line) for line in lines]
            waiting += [
                need for need in needed if need.marker is None or need.marker.evaluate({"extra": extra})
            ]
    assert missing == set(), "bring constraints.txt up to date as it says"


def _table() -> dict[str, str]:
    """The README's settings, and the cell with each one's default."""
    readme = (REPOSITORY / "README.md").read_text()
    rows = re.findall(r"^\| `ONNX_QAT_(\w+)` \| ([^|]*) \|", readme, re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a setting is there twice"
    return {name.lower(): default for name, default in rows}


def test_the_readme_has_every_setting_and_no_other() -> None:
    assert set(_table()) == set(Settings.model_fields)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_the_readme_has_the_default_of_a_setting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    default = Settings.model_fields[name].default
    cell = _table()[name]
    if re.fullmatch("`[^`]*`", cell):
        monkeypatch.setenv(f"ONNX_QAT_{name.upper()}", cell.strip("`"))
        assert getattr(Settings(), name) == default
    else:
        assert default in (None, frozenset()), f"the README does not tell the default, {default}"
