"""Every rival that calibrates: its whole search at one width, over min-max on the same items."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmark.performance.measurement import Line, Setup, compare, row

RIVALS = (
    "smoothquant",
    "outlier_suppression",
    "outlier_suppression_plus",
    "repq_vit",
    "rotation",
    "noisy_quant",
    "adalog",
    "adaround",
    "brecq",
)
_LEARNING = {"adaround": {"iterations": 10}, "brecq": {"iterations": 10}}
"""So few steps that a row takes seconds; what one step takes is the difference to none."""


def _rival(name: str) -> Callable[[Setup], Sequence[Line]]:
    def measure(setup: Setup) -> Sequence[Line]:
        from baselines.method import METHODS
        from quanttune.quantization import Scheme

        made = METHODS.get(name)(**_LEARNING.get(name, {}))
        profile = next(
            (
                profile
                for profile in ("full", "matmul")
                if made.skip(setup.session.sites, Scheme.parse("W6A6", profile)) is None
            ),
            None,
        )
        if profile is None:
            from benchmark.performance.measurement import NotMeasurableError

            raise NotMeasurableError(f"{name} is not defined for {setup.model}")
        base = METHODS.get("minmax")()

        def run(method: object) -> Callable[[], object]:
            return lambda: method.quantize(setup.context("W6A6", profile))  # type: ignore[attr-defined]

        note = f"profile {profile}"
        note += f"; {made.iterations} iterations a layer in place of 150" if name in _LEARNING else ""  # type: ignore[attr-defined]
        works = {"min-max": run(base), name: run(made)}
        return compare(min(setup.repeats, 2), works, notes={name: note}, warm=False)

    return measure


for _name in RIVALS:
    row(f"rival_{_name}", f"Calibration by {_name} on 128 items at W6A6, over min-max")(_rival(_name))
