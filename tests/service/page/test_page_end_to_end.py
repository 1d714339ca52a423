"""The page with the real library behind it: from a float model to an int8 one, by keyboard alone."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from playwright.sync_api import Page, expect
from service_helpers import free_port, wait_until_ready

from examples.models import model_path

OpenPage = Callable[..., Page]
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `onnx-qat serve` listens."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", "from service.cli import app; app()", "serve", "--port", str(port)],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "ONNX_QAT_LOG_LEVEL": "warning",
            "ONNX_QAT_DATA_DIR": str(tmp_path_factory.mktemp("service") / "data"),
        },
    )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_ready(address, process)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def tab_to(page: Page, selector: str) -> None:
    """Press Tab until the element has the focus, which has to be seen."""
    for _ in range(150):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            """selector => {
                const element = document.activeElement;
                if (!element.matches(selector)) return null;
                return getComputedStyle(element).outlineStyle;
            }""",
            selector,
        )
        if focused is not None:
            assert focused != "none", f"the focus on {selector} cannot be seen"
            return
    raise AssertionError(f"the keyboard does not get to {selector}")


def choose(page: Page, selector: str, file: Path) -> None:
    tab_to(page, selector)
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(file)


def test_a_model_is_prepared_looked_at_and_finalized_by_keyboard(
    url: str, open_page: OpenPage, screenshot: Callable[[Page, str], None], tmp_path: Path
) -> None:
    model = model_path("mnist-conv")
    samples = tmp_path / "samples.npz"
    name = onnx.load(model).graph.input[0].name
    values = np.random.default_rng(0).random((16, 1, 28, 28), dtype=np.float32)
    np.savez(samples, **{name: values})

    page = open_page(url)
    expect(page.get_by_label("Weight bits")).to_be_visible()
    choose(page, "#file-model", model)
    choose(page, "#file-calibration", samples)
    tab_to(page, "[id='recipe.weight_bits']")
    page.keyboard.type("4")
    tab_to(page, "#submit")
    page.keyboard.press("Enter")

    expect(page.get_by_role("heading", name=f"Prepare {model.name}")).to_be_focused()
    expect(page.locator(".job-status .badge")).to_have_text("succeeded")
    job = page.url.rpartition("/")[2]
    manifest = httpx.get(f"{url}/v1/jobs/{job}/files/manifest.json", timeout=60).json()
    assert manifest["recipe"]["weight_bits"] == 4
    assert manifest["calibration"] is not None
    rows = page.locator(".data-table tbody tr")
    expect(rows).to_have_count(len(manifest["quantizers"]) + len(manifest["skipped"]))
    for quantizer in manifest["quantizers"]:
        expect(rows.filter(has_text=quantizer["tensor"]).first).to_be_visible()
    tiles = page.locator(".tiles")
    expect(tiles).to_contain_text(f"{len(manifest['quantizers'])}")

    # The bundle, whole.
    tab_to(page, ".actions a")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    archive = zipfile.ZipFile(io.BytesIO(download.value.path().read_bytes()))
    assert archive.testzip() is None
    assert "manifest.json" in archive.namelist()

    # The table.
    tab_to(page, ".data-table thead button")
    page.keyboard.press("Space")
    heading = page.locator(".data-table thead th").first
    expect(heading).to_have_attribute("aria-sort", "ascending")
    screenshot(page, "prepared")

    # The int8 model: of the checkpoint in the bundle, verified on the samples.
    checkpoint = tmp_path / "checkpoint"
    checkpoint.write_bytes(archive.read("checkpoint"))
    choose(page, "#finalize-checkpoint", checkpoint)
    choose(page, "#finalize-verify", samples)
    tab_to(page, ".finalize button[type=submit]")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name=f"Int8 model of {model.name}")).to_be_focused()
    expect(page.locator(".tiles")).to_contain_text("Same top-1")
    screenshot(page, "finalized")
    tab_to(page, ".actions a")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    int8 = onnx.load(download.value.path())
    assert onnx.TensorProto.INT8 in {tensor.data_type for tensor in int8.graph.initializer}

    # Both jobs are in the list, under the model's name.
    expect(page.locator("#job-list a")).to_have_count(2)
    expect(page.locator("#job-list a[aria-current]")).to_contain_text("finalize")
    page.locator("#job-list a").nth(1).press("Enter")
    expect(page.get_by_role("heading", name=f"Prepare {model.name}")).to_be_focused()


def test_a_text_file_is_not_taken_for_a_model(
    url: str, open_page: OpenPage, screenshot: Callable[[Page, str], None], tmp_path: Path
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("this is not a model")
    page = open_page(url)
    page.set_input_files("#file-model", text)
    page.get_by_role("button", name="Prepare").click()
    alert = page.get_by_role("alert").filter(has_text="model_not_onnx")
    expect(alert).to_be_visible()
    expect(alert).to_contain_text("Choose the .onnx file")
    expect(alert.get_by_role("button", name="Choose other files")).to_be_visible()
    expect(page.locator(".job-status .badge")).to_have_text("failed")
    screenshot(page, "failed")
