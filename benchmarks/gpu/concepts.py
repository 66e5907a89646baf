"""Network dissection: tallies, label areas and a pass of the thresholds."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.stage import Plan, Stage, Variant, on_backend


@dataclass(frozen=True)
class Concepts:
    """Maps as after a ReLU, thresholds that a two-hundredth is above, and masks in patches."""

    activations: Tensor
    thresholds: Tensor
    masks: Tensor
    labels: Tensor
    categories: Tensor
    low: Tensor
    counts: Tensor

    KINDS = 6

    @classmethod
    def made(cls, plan: Plan, dtype: torch.dtype, device: torch.device) -> Concepts:
        torch.manual_seed(0)
        (n, units, side), (layers, out_side, count) = plan.units, plan.masks
        activations = torch.randn(n, units, side, side, device=device).relu_().to(dtype)
        rows = activations.float().movedim(1, 0).flatten(1)
        thresholds = rows.kthvalue(max(int(0.995 * rows.shape[1]), 1), 1).values
        coarse = torch.randint(count, (n, layers, 6, 6), device=device).double()
        masks = F.interpolate(coarse, (out_side, out_side), mode="nearest").to(torch.int16)
        return cls(
            activations,
            thresholds,
            masks,
            torch.randint(count, (n, 2), device=device),
            torch.arange(count, device=device) % cls.KINDS,
            torch.full((units,), -(2**31) if dtype == torch.float32 else -(2**15), device=device),
            torch.zeros(units, 2**11 + 1, dtype=torch.int64, device=device),
        )

    def tally(self) -> tuple[Tensor, ...]:
        from fastxkd.ops.concepts import concept_tally

        given = (self.activations, self.thresholds, self.masks, self.labels, self.categories)
        return concept_tally(*given, category_count=self.KINDS)

    def areas(self) -> Tensor:
        from fastxkd.ops.concepts import label_areas

        return label_areas(self.masks, self.labels, len(self.categories))

    def count(self) -> Tensor:
        from fastxkd.ops.concepts import unit_counts

        shift = self.activations.element_size() * 8 - 11
        unit_counts(self.activations, self.low, shift, 11, self.counts)
        return self.counts

    def deviation(self, images: int = 4) -> str:
        """Of the first images, as on the CPU: integers, which have no tolerance."""
        import fastxkd

        by_image = {k: getattr(self, k)[:images] for k in ("activations", "masks", "labels")}
        few = replace(self, **by_image)
        exact = Concepts(*(getattr(few, f.name).cpu() for f in fields(few)))
        found = (*few.tally(), few.areas())
        with fastxkd.use_backend("reference"):
            expected = (*exact.tally(), exact.areas())
        same = all(torch.equal(x.cpu(), y) for x, y in zip(found, expected, strict=True))
        return "the same integers" if same else "OTHER integers"


def concept_kernels(stage: Stage) -> None:
    """Tallies, label areas and a pass of the thresholds, beside one reading of what they read."""
    plan = stage.plan
    shape = "x".join(map(str, (*plan.units, *plan.masks)))
    for name in plan.dtypes:
        given = Concepts.made(plan, getattr(torch, name), stage.clock.device)
        a, m = given.activations, given.masks
        of_maps, of_masks = (x.numel() * x.element_size() for x in (a, m))
        for case, call, floor, moved, note in (
            ("tally", given.tally, lambda a=a, m=m: (a.sum(), m.sum()), of_maps + of_masks, True),
            ("label areas", given.areas, lambda m=m: m.sum(), of_masks, True),
            ("unit counts", given.count, lambda a=a: a.sum(), of_maps, False),
        ):
            title = f"concepts, {case} {shape} {name}"
            stage.measure(title, Variant("floor: read", floor), moved)
            for backend in plan.backends:
                of = on_backend(backend, given.deviation) if note else None
                stage.measure(title, Variant(backend, on_backend(backend, call), note=of), moved)
