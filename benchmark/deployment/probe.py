"""Load time and peak memory of an ONNX file, in a process that does nothing else.

Run as a script: ``python probe.py MODEL FEED`` with the inputs as ``.npz``. It imports nothing of this
project, so that what it measures is the runtime's.
"""

from __future__ import annotations

import json
import resource
import sys
import time


def peak_mib() -> float:
    """The largest resident size so far."""
    try:
        with open("/proc/self/status", encoding="utf-8") as file:  # noqa: PTH123 - nothing else is imported
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        # Of the process that started this one, too, where it was larger.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(model: str, feed: str) -> None:
    """Load, run once, and say in JSON what it took beyond the interpreter and the runtime's library."""
    import numpy as np
    import onnxruntime

    inputs = dict(np.load(feed))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    before, start = peak_mib(), time.perf_counter()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    loaded = time.perf_counter() - start
    session.run(None, inputs)
    sys.stdout.write(json.dumps({"load_seconds": loaded, "peak_mib": peak_mib() - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
