"""No times: what the device computes, against float64 on the CPU."""

from __future__ import annotations

import torch

from benchmarks.gpu.stage import Stage, brief


def numbers(stage: Stage) -> None:
    """Errors of every divergence and loss on the device against float64 on the CPU."""
    import fastxkd
    from tests import test_gpu

    device = stage.clock.device
    for backend in stage.plan.backends:
        for name in stage.plan.divergences:
            for dtype in stage.plan.dtypes:
                what = f"{backend}, {name}, {dtype}"
                if not stage.in_time(what):
                    continue
                given = test_gpu.logits(41, 1271, getattr(torch, dtype), ignored=0.2)
                try:
                    with fastxkd.use_backend(backend):
                        e = test_gpu.compare(*given, test_gpu.DIVERGENCES[name], device)
                except Exception as error:
                    stage.check_device(error)
                    stage.put("check", what=what, passed=False, text=brief(error))
                    continue
                text = (
                    f"loss off by {e.loss:.1e} (limit {e.loss_limit:.1e}),"
                    f" gradient by {e.grad:.1e} (limit {e.grad_limit:.1e})"
                )
                stage.put("check", what=what, passed=e.within(), text=text)
        for name in test_gpu.CAM_METHODS:
            for dtype in stage.plan.dtypes:
                what = f"{backend}, cam {name}, {dtype}"
                if not stage.in_time(what):
                    continue
                try:
                    with fastxkd.use_backend(backend):
                        off, limit = test_gpu.cam_error(
                            (2, 40, 7, 7), getattr(torch, dtype), name, device
                        )
                except Exception as error:
                    stage.check_device(error)
                    stage.put("check", what=what, passed=False, text=brief(error))
                    continue
                text = f"map off by {off:.1e} (limit {limit:.1e})"
                stage.put("check", what=what, passed=off <= limit, text=text)
        for dtype in stage.plan.dtypes:
            what = f"{backend}, concepts, {dtype}"
            if not stage.in_time(what):
                continue
            try:
                with fastxkd.use_backend(backend):
                    wrong = test_gpu.concepts_that_differ(getattr(torch, dtype), device)
            except Exception as error:
                stage.check_device(error)
                stage.put("check", what=what, passed=False, text=brief(error))
                continue
            text = f"other integers: {', '.join(wrong)}" if wrong else "the same integers"
            stage.put("check", what=what, passed=not wrong, text=text)
    for name in test_gpu.LOSSES:
        if not stage.in_time(name):
            continue
        try:
            loss, grad = test_gpu.device_error(name, device)
        except Exception as error:
            stage.check_device(error)
            stage.put("check", what=name, passed=False, text=brief(error))
            continue
        text = f"loss off by {loss:.1e}, gradient by {grad:.1e} of itself"
        stage.put("check", what=name, passed=loss <= 1e-5 and grad <= 1e-4, text=text)
