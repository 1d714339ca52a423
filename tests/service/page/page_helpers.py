"""A manifest of any size, and a job that has it."""

from __future__ import annotations

import json
from typing import Any

from service_helpers import Server, submit, wait_for

from rewriter import Manifest, Recipe


def manifest_with(quantizers: int, skipped: int = 0, warnings: tuple[str, ...] = ()) -> Manifest:
    """A manifest of weights `layer_0.weight`, `layer_1.weight`, ..., each with a scale of its own."""
    digest: dict[str, Any] = {"sha256": "0" * 64, "bytes": 1}
    return Manifest.model_validate(
        {
            "recipe": Recipe().model_dump(),
            "source": {**digest, "external_data": ()},
            "calibration": None,
            "versions": {},
            "normalization": {
                "source_opset": 17,
                "opset": 18,
                "changed": (),
                "dynamic_batch": (),
                "warnings": (),
            },
            "quantizers": tuple(_quantizer(index) for index in range(quantizers)),
            "quantized_nodes": tuple(f"layer_{index}" for index in range(quantizers)),
            "folded": (),
            "batch_norms": {"found": 0, "training_mode": 0, "trained": (), "note": "There are none."},
            "skipped": tuple(
                {"node": f"gather_{index}", "op": "Gather", "reason": "<b>no</b> float data"}
                for index in range(skipped)
            ),
            "frozen": (),
            "training": {
                "loss": "loss",
                "loss_kind": "cross_entropy",
                "output": "y",
                "attached_to": "y",
                "target": None,
                "inputs": ("x", "labels"),
                "eval_outputs": ("y",),
                "optimizer": "adamw",
                "trainable": (),
                "state": (),
                "step_counter": {"state": "quantization_step", "counts": "executions"},
                "scales": "exp",
            },
            "warnings": warnings,
            "files": (),
        }
    )


def _quantizer(index: int) -> dict[str, Any]:
    name = f"layer_{index}.weight"
    return {
        "name": name,
        "tensor": name,
        "kind": "weight" if index % 2 else "activation",
        "bits": 4 if index % 3 else 8,
        "symmetric": True,
        "qmin": -127,
        "qmax": 127,
        "dtype": "int8",
        "axis": None,
        "ranges": "learned",
        "quant_delay": 0,
        "scale": f"{name}_scale",
        "scale_parameter": None,
        "zero_point": f"{name}_zero_point",
        "zero_point_parameter": None,
        "range_states": (),
        "initial_scale": ((index * 7919 % 10007 + 1) / 10000,),
        "initial_zero_point": (0,),
        "initialized": "values",
        "existing": False,
        "nodes": (f"layer_{index}",),
        "tensors": (),
    }


def job_with(server: Server, manifest: Manifest) -> str:
    """The id of a job of the fake worker that has made this manifest."""
    with server.client() as client:
        files = {"manifest.json": json.dumps(manifest.model_dump(mode="json"))}
        job = submit(client, {"do": "succeed", "files": files})
        assert wait_for(client, job)["state"] == "succeeded"
    return job
