"""Which kernels the gradient of a convolution is computed by, and that each form is exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from gradient_check import Case, check, forward_model, session, with_gradients
from gradient_values import normal

# x, w, attributes of a stride-1 Conv whose output image is large beside its channels.
LARGE_IMAGE: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((2, 2, 6, 5), (2, 2, 3, 3), {"pads": [1, 1, 1, 1]}),
    "no_pads": ((2, 2, 6, 6), (2, 2, 3, 2), {}),
    "asymmetric": ((2, 2, 6, 5), (2, 2, 3, 3), {"pads": [0, 1, 2, 0]}),
    "dilated": ((2, 2, 7, 7), (2, 2, 3, 2), {"dilations": [2, 3], "pads": [2, 1, 2, 2]}),
    "one_row": ((2, 2, 5, 6), (2, 2, 1, 3), {"pads": [0, 1, 0, 1]}),
    "grouped": ((2, 6, 5, 5), (4, 3, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    "depthwise": ((2, 3, 5, 5), (3, 1, 3, 3), {"group": 3, "pads": [1, 0, 1, 0]}),
    "1d": ((2, 2, 12), (2, 2, 3), {"pads": [2, 0]}),
    "1d_grouped": ((2, 4, 12), (4, 2, 3), {"group": 2, "dilations": [2]}),
    "3d": ((1, 2, 4, 4, 3), (2, 2, 2, 3, 2), {"pads": [0, 1, 0] * 2}),
    "3d_grouped": ((1, 4, 4, 4, 3), (2, 2, 2, 3, 2), {"group": 2, "pads": [0, 1, 0, 1, 1, 1]}),
}


def emitted(model: onnx.ModelProto) -> list[str]:
    """The operators that compute the gradient, one entry per node."""
    return [node.op_type for node in model.graph.node if node.name.startswith("gradient/")]


def conv(x: tuple[int, ...], w: tuple[int, ...], attributes: dict[str, Any], **rest: Any) -> Case:
    return Case("Conv", "Conv", [normal(*x), normal(*w)], attributes, **rest)


@pytest.mark.parametrize("shapes", ["static", "batch"])
@pytest.mark.parametrize("form", LARGE_IMAGE)
def test_dx_of_a_large_image_is_a_convolution_of_dy(form: str, shapes: str) -> None:
    operators = emitted(check(conv(*LARGE_IMAGE[form], differentiated=(0,)), shapes))
    assert "Conv" in operators
    assert "ConvGrad" not in operators


@pytest.mark.parametrize("form", LARGE_IMAGE)
def test_dw_beside_it_is_exact(form: str) -> None:
    operators = emitted(check(conv(*LARGE_IMAGE[form]), "batch"))
    assert {"Conv", "ConvGrad"} <= set(operators)


@pytest.mark.parametrize(
    ("x", "w", "attributes"),
    [
        ((2, 4, 3, 3), (2, 4, 3, 3), {"pads": [1] * 4}),  # a small image
        ((2, 2, 6, 6), (3, 2, 3, 3), {"pads": [1] * 4}),  # more filters than channels
        ((2, 2, 7, 7), (2, 2, 3, 3), {"strides": [2, 1]}),
        ((2, 2, 5, 5), (2, 2, 1, 1), {"pads": [0, 0, 1, 0]}),  # dY would be padded by -1
    ],
    ids=["small", "more_filters", "strided", "padded_1x1"],
)
def test_dx_is_left_to_conv_grad(x: tuple[int, ...], w: tuple[int, ...], attributes: dict[str, Any]) -> None:
    operators = emitted(check(conv(x, w, attributes), "static"))
    assert "Conv" not in operators
    assert operators.count("ConvGrad") == 1


@pytest.mark.parametrize("shapes", ["named", "symbolic", "rankless"])
def test_both_are_left_to_conv_grad_where_the_image_is_not_known(shapes: str) -> None:
    case = conv((2, 2, 6, 5), (2, 2, 3, 3), {"pads": [1] * 4, "kernel_shape": [3, 3]})
    operators = emitted(check(case, shapes))
    assert operators.count("ConvGrad") == 1


@pytest.mark.parametrize("shapes", ["static", "batch"])
@pytest.mark.parametrize("sizes", [(5, 4), (16,), (3, 3, 2)], ids=["2d", "1d", "3d"])
def test_1x1_on_a_large_image_is_matrix_products(sizes: tuple[int, ...], shapes: str) -> None:
    ones = [1] * len(sizes)
    operators = emitted(check(conv((3, 2, *sizes), (4, 2, *ones), {}), shapes))
    assert "FusedMatMul" in operators
    assert "Conv" in operators
    assert "ConvGrad" not in operators


@pytest.mark.parametrize(
    ("x", "group", "attributes"),
    [
        ((2, 4, 3, 3), 1, {}),  # products as large as dY
        ((2, 2, 5, 5), 1, {"strides": [2, 2]}),
        ((2, 2, 4, 4), 1, {"pads": [1] * 4}),
        ((2, 2, 5, 5), 2, {}),
    ],
    ids=["small", "strided", "padded", "grouped"],
)
def test_dw_of_1x1_is_left_to_conv_grad(x: tuple[int, ...], group: int, attributes: dict[str, Any]) -> None:
    weight = (2, x[1] // group, 1, 1)
    operators = emitted(check(conv(x, weight, {"group": group, **attributes}), "static"))
    assert "FusedMatMul" not in operators
    assert operators.count("ConvGrad") == 1


def test_both_forms_agree_with_conv_grad_on_a_real_layer() -> None:
    """Finite differences are for small tensors: here ConvGrad itself is the reference."""
    x, w, r = normal(8, 16, 28, 28), normal(16, 16, 3, 3), normal(8, 16, 28, 28)
    case = Case("Conv", "Conv", [x, w], {"pads": [1] * 4})
    found = []
    for shapes, has_conv_grad_for_both in (("static", False), ("symbolic", True)):
        model = with_gradients(forward_model(case, shapes), ["i0", "i1"])
        assert ("Conv" not in emitted(model)) == has_conv_grad_for_both
        found.append(session(model).run(["d_i0", "d_i1"], {"i0": x, "i1": w, "r0": r}))
    for ours, expected in zip(*found, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


DENSE = {
    "3x3": ((3, 16, 4, 5), (2, 16, 3, 3), {"pads": [1, 1, 1, 1]}),
    "no_pads": ((2, 17, 6, 4), (3, 17, 3, 2), {}),
    "asymmetric": ((2, 16, 4, 5), (2, 16, 3, 3), {"pads": [0, 1, 2, 0]}),
    "small_image": ((2, 16, 2, 2), (4, 16, 3, 3), {"pads": [1, 1, 1, 1]}),
}


@pytest.mark.parametrize("shapes", ["static", "batch"])
@pytest.mark.parametrize("form", DENSE)
def test_on_the_cpu_alone_dw_of_a_dense_convolution_is_one_of_dy(form: str, shapes: str) -> None:
    case = conv(*DENSE[form], differentiated=(1,))
    assert "ConvGrad" not in emitted(check(case, shapes, device="cpu"))
    assert "ConvGrad" in emitted(check(case, shapes))


SMALL = {
    "3x3": ((3, 64, 3, 3), (4, 64, 3, 3), {"pads": [1, 1, 1, 1]}),
    "one_filter": ((3, 64, 3, 2), (1, 64, 3, 3), {"pads": [1, 1, 1, 1]}),
    "5x3": ((2, 64, 3, 3), (2, 64, 5, 3), {"pads": [2, 1, 2, 1]}),
    "3x1": ((2, 64, 3, 3), (2, 64, 3, 1), {"pads": [1, 0, 1, 0]}),
    "dilated": ((2, 64, 3, 3), (2, 64, 3, 3), {"pads": [2, 2, 2, 2], "dilations": [2, 2]}),
    "padded_below": ((3, 64, 3, 3), (3, 64, 3, 3), {"pads": [0, 0, 2, 1]}),
    "padded_above": ((3, 64, 3, 3), (3, 64, 3, 3), {"pads": [2, 1, 0, 0]}),
    "narrower": ((2, 64, 3, 4), (2, 64, 3, 3), {"pads": [1, 0, 1, 0]}),
    "wider": ((2, 64, 3, 2), (2, 64, 3, 3), {"pads": [1, 2, 1, 2]}),
}


@pytest.mark.parametrize("shapes", ["static", "batch"])
@pytest.mark.parametrize("form", SMALL)
def test_on_the_cpu_alone_dx_of_small_images_is_a_convolution_of_all_samples(form: str, shapes: str) -> None:
    case = conv(*SMALL[form], differentiated=(0,))
    assert "ConvGrad" not in emitted(check(case, shapes, device="cpu"))
    assert "ConvGrad" in emitted(check(case, shapes))


@pytest.mark.parametrize(
    ("x", "w", "attributes"),
    [
        ((2, 64, 4, 4), (2, 64, 3, 3), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
        ((2, 64, 4, 4), (2, 64, 3, 3), {}),  # fewer rows than the input has
        ((2, 128, 3, 3), (4, 64, 3, 3), {"pads": [1, 1, 1, 1], "group": 2}),
        ((2, 64, 2, 2), (65, 64, 3, 3), {"pads": [1, 1, 1, 1]}),  # more filters than channels
        ((2, 32, 2, 2), (2, 32, 3, 3), {"pads": [1, 1, 1, 1]}),
        ((2, 64, 3), (2, 64, 3), {"pads": [1, 1]}),
    ],
    ids=["strided", "fewer_rows", "grouped", "many_filters", "few_channels", "one_dimension"],
)
def test_other_dx_of_small_images_are_left_to_conv_grad_on_the_cpu(
    x: tuple[int, ...], w: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    operators = emitted(check(conv(x, w, attributes, differentiated=(0,)), "static", device="cpu"))
    assert "ConvGrad" in operators


@pytest.mark.parametrize(
    ("x", "w", "attributes"),
    [
        ((2, 16, 7, 7), (2, 16, 3, 3), {"strides": [2, 2]}),
        ((2, 16, 7, 7), (2, 16, 3, 3), {"dilations": [2, 2]}),
        ((2, 32, 5, 5), (4, 16, 3, 3), {"group": 2}),
        ((2, 4, 5, 5), (4, 4, 3, 3), {}),  # few channels
    ],
    ids=["strided", "dilated", "grouped", "few_channels"],
)
def test_other_dw_are_left_to_conv_grad_on_the_cpu(
    x: tuple[int, ...], w: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    operators = emitted(check(conv(x, w, attributes, differentiated=(1,)), "batch", device="cpu"))
    assert "ConvGrad" in operators
