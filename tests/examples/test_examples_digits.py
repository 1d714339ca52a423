"""examples/digits.py: a fixed, balanced split that mnist-conv is right on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

from examples.digits import INPUT_NAME, Digits, write_digits


def test_the_split_is_balanced_and_disjoint(digits: Digits) -> None:
    assert np.bincount(digits.train.labels).tolist() == [400] * 10
    assert np.bincount(digits.test.labels).tolist() == [100] * 10
    train = {image.tobytes() for image in digits.train.images}
    assert not any(image.tobytes() in train for image in digits.test.images)


def test_arrays_have_the_shapes_and_types_that_the_model_takes(digits: Digits) -> None:
    assert digits.train.images.shape == (4000, 1, 28, 28)
    assert digits.train.images.dtype == np.float32
    assert digits.train.labels.dtype == np.int64
    assert (digits.train.images.min(), digits.train.images.max()) == (0, 1)


def test_float_top1_on_the_test_digits(digits: Digits, real_model: Callable[[str], Path]) -> None:
    session = onnxruntime.InferenceSession(real_model("mnist-conv"), providers=["CPUExecutionProvider"])
    outputs = [session.run(None, {INPUT_NAME: image[None]})[0].argmax() for image in digits.test.images]
    assert np.mean(np.array(outputs) == digits.test.labels) > 0.99


def test_npz_files_hold_the_inputs_by_name_and_are_the_same_every_time(tmp_path: Path) -> None:
    digits = write_digits(tmp_path / "one")
    write_digits(tmp_path / "two")
    for name, samples in {"train": 4000, "test": 1000, "calibration": 64}.items():
        one = (tmp_path / "one" / f"{name}.npz").read_bytes()
        assert one == (tmp_path / "two" / f"{name}.npz").read_bytes()
        with np.load(tmp_path / "one" / f"{name}.npz") as arrays:
            assert set(arrays.files) == {INPUT_NAME, "labels"}
            assert len(arrays[INPUT_NAME]) == len(arrays["labels"]) == samples
    np.testing.assert_array_equal(digits.calibration.images, digits.train.images[:64])
    assert len(set(digits.calibration.labels.tolist())) == 10
