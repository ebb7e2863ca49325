"""`tlcore show`: a captured tensor's statistics and values, or the structure of a call."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from math import isfinite
from operator import itemgetter
from typing import Any

from ..errors import ReadError
from ..layout.directions import DIRECTIONS
from ..layout.names import shown_module
from ..reader import Call, MissingError, Run, Step, open_run
from ..reader.operator import operator_in
from ..record import Json
from ..statistics.channels import COLUMNS
from .storage_options import add_storage_options, storage_options
from .tables import print_table, printable, size

HELP = "Show a captured tensor (what it is, its statistics, its values), a call, or a structure."


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", metavar="PATH", help="a run's directory; a path or URL")
    parser.add_argument(
        "name",
        metavar="NAME",
        help="a tensor such as step_0/layers.0/outputs_cpu (.pt may follow, the device may be left out), a"
        " call such as step_0/layers.0, or a structure such as step_0/layers.0/outputs.json; without"
        " step_<S>/ it is looked for in the run's first step, or it is one with statistics for each channel",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, without the tensor's values")
    add_storage_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the tensor or the call. Raises ReadError when there is no such thing in the run."""
    opened = open_run(args.path, storage_options(args))
    if opened.has_channels(args.name):
        _show_channels(opened, args.name, args.json)
        return 0
    step, rest = _step_and_rest(opened, args.name.rstrip("/"))
    if not rest:
        advice = f"`tlcore ls {opened.url} --step {step.number}` lists its calls and tensors"
        raise ReadError(f"{args.name!r} is a whole step; {advice}")
    name = f"step_{step.number}/{rest}"
    if rest in step.calls:
        _show_call(step.call(rest), step, args.json, opened.injection)
    elif rest.endswith(".json"):
        _show_structure(_structure(opened, name), name, args.json)
    else:
        _show_tensor(step, name, args.json, opened.injection)
    return 0


def _structure(opened: Run, name: str) -> Json:
    found = opened.json(name)
    if not isinstance(found, dict) or "type" not in found:
        raise ReadError(f"{opened.url}/{name}: not the structure of a call, such as .../inputs.json")
    return found


def _step_and_rest(opened: Run, name: str) -> tuple[Step, str]:
    """The step that a name lies in, and the name within it."""
    first, _, rest = name.partition("/")
    number = first.removeprefix("step_")
    if number != first and number.isdecimal():
        return opened.step(int(number)), rest
    numbers = sorted([*opened.steps, *opened.incomplete_steps])
    if not numbers:
        raise MissingError(f"{opened.url}: the run has no steps")
    return opened.step(numbers[0]), name


def _show_tensor(step: Step, given: str, as_json: bool, injection: str | None) -> None:
    # Imported here, since torch comes with it: a structure is shown without.
    from ..statistics.stored import summarize

    try:
        name = step.find(given)
    except MissingError:
        unstored = step.unstored(given.removesuffix(".pt"))
        if unstored is None or "stats" not in unstored:
            raise
        _show_statistics(unstored, as_json, injection)
        return
    tensor = step.tensor(name)
    record = step.record(name) if step.has_record(name) else None
    description: Json = {
        "name": name,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "device": record["device"] if record else None,
        "bytes": tensor.numel() * tensor.element_size(),
        **asdict(summarize(tensor)),
    }
    # Not of these values but of the bytes: step.json has it.
    del description["hash"]
    if record is None:
        description["note"] = "the step was not committed"
    else:
        description |= {
            key: record[key]
            for key in ("bytes", "converted_from", "row_scale", "hash", "rank", "part", "alias_of")
            if key in record
        }
    _print_description(description, as_json, injection)
    if not as_json:
        # torch leaves out the middle of a large tensor.
        print(tensor)


def _show_channels(opened: Run, name: str, as_json: bool) -> None:
    """The statistics for each channel, or in a table what they are over all channels."""
    found = opened.channels(name)
    if as_json:
        rows = zip(COLUMNS, found.table.tolist(), strict=True)
        # Where nothing was finite, smallest and largest are no numbers.
        columns = {key: [each if isfinite(each) else None for each in row] for key, row in rows}
        print(json.dumps({"name": name, "channels": found.channels, **columns}, indent=1))
        return
    print(f"{printable(name)}: {found.channels} channels, over all steps")
    each = {key: getattr(found, key) for key in ("count", "mean", "std", "min", "max", "zeros", "nonfinite")}
    rows_of = ((key, *(_shown(value) for value in _extremes(row))) for key, row in each.items())
    print_table(["of each channel", "least", "most", "at channel"], rows_of)


def _extremes(values: Any) -> tuple[Any, Any, Any]:
    known = [(float(value), at) for at, value in enumerate(values) if isfinite(value)]
    return (min(known)[0], *max(known, key=itemgetter(0))) if known else (None, None, None)


def _show_statistics(unstored: Json, as_json: bool, injection: str | None) -> None:
    """What was kept in place of a tensor's values."""
    about = {key: value for key, value in unstored.items() if key not in ("stats", "skipped")}
    note = f"not stored ({unstored['skipped']}), only its statistics were kept"
    _print_description({**about, **unstored["stats"], "note": note}, as_json, injection)


def _print_description(description: Json, as_json: bool, injection: str | None) -> None:
    if injection is not None:
        description = {**description, "run": injection}
    if as_json:
        print(json.dumps(description, indent=1))
        return
    shown = {**description, "shape": tuple(description["shape"])}
    if "bytes" in shown:
        shown["bytes"] = size(shown["bytes"])
    print_table(["property", "value"], ((key, _shown(value)) for key, value in shown.items()))


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _show_call(call: Call, step: Step, as_json: bool, injection: str | None) -> None:
    structures = _structures(call)
    if not structures:
        raise ReadError(f"{call.directory}: step {step.number} holds no structure of this call")
    if as_json:
        about = {"step": step.number, "call": call.directory, "module": call.module, "index": call.index}
        marked = {} if injection is None else {"run": injection}
        print(json.dumps(about | marked | structures, indent=1))
        return
    print(printable(f"{shown_module(call.module)}, call {call.index} of step {step.number}"))
    if injection is not None:
        print(printable(f"the run was {injection}"))
    for direction, node in structures.items():
        for line in _tree(direction, node, 0):
            print(printable(line))
        if "operator" in node:
            operator = operator_in(node, direction, call.directory)
            print(printable(f"  {operator.function} at {operator.file}:{operator.line}"))
            print(printable(f"  of {', '.join(map(_operand, operator.operands()))}"))


def _show_structure(structure: Json, name: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(structure, indent=1))
        return
    for line in _tree(name.rpartition("/")[2].removesuffix(".json"), structure, 0):
        print(printable(line))


def _structures(call: Call) -> dict[str, Json]:
    found: dict[str, Json] = {}
    amid = *call.taps_shown, *call.operators_shown
    for direction in (*DIRECTIONS[:1], *amid, *DIRECTIONS[1:], *call.gradients_shown):
        try:
            found[direction] = call.structure(direction)
        except MissingError:
            continue
    return found


def _tree(label: str, node: Json, depth: int) -> Iterator[str]:
    """The lines of a structure, two spaces further in for each level."""
    indent = "  " * depth
    kind = node.get("type")
    if kind == "tensor":
        place = node.get("file") or f"skipped: {node.get('skipped')}"
        yield f"{indent}{label}: {node.get('dtype')} {node.get('shape')} {node.get('device')}  {place}"
        if isinstance(node.get("stats"), dict):
            yield f"{indent}  {', '.join(f'{key} {value}' for key, value in node['stats'].items())}"
    elif "items" in node:
        name = f" {node['class']}" if "class" in node else ""
        yield f"{indent}{label}: {kind}{name}"
        for key, item in _items(node):
            yield from _tree(str(key), item, depth + 1)
        for key, item in _items(node.get("kwargs", {})):
            yield from _tree(f"{key}=", item, depth + 1)
    else:
        yield f"{indent}{label}: {kind} {node.get('value', node.get('class', ''))}".rstrip()


def _operand(operand: Json) -> str:
    kind, what = next(iter(operand.items()))
    note = " (changed since)" if operand.get("changed_since") else ""
    return (str(what) if kind in ("from", "value") else f"{kind} {what}") + note


def _items(node: Json) -> Iterable[tuple[Any, Json]]:
    items = node.get("items", ())
    return items.items() if isinstance(items, dict) else enumerate(items)
