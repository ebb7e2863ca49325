"""Read a run back: its steps, a call's arguments and result, and every tensor of a step."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import tlcore


def main(argv: Sequence[str] | None = None) -> None:
    """Open the run given on the command line, check it, and print what its first step holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run's directory, as tlcore.capture(...).url gives it")
    args = parser.parse_args(argv)

    run = tlcore.open_run(args.run)
    print(f"{run.id} is {run.state}; steps {run.steps}")
    print(f"{run.verify()} tensors have the hash that was recorded")

    for number, step in run.items():
        print(f"\nstep {number}: {len(step.calls)} calls, {len(step)} tensors")
        for directory in step.calls:
            call = step.call(directory)
            args_shapes = [getattr(value, "shape", value) for value in call.inputs.args]
            print(f"  {call.module} (call {call.index}): inputs {args_shapes}")

    first = run.step(run.steps[0])
    for name, tensor in first.items():
        print(f"{name}: {tensor.dtype} {tuple(tensor.shape)} mean {tensor.float().mean():.4f}")


if __name__ == "__main__":
    main()
