"""`export`: a run's rows into a directory, in a format of another tool."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..._version import __version__
from ...errors import BackendError, ReadError, TlcoreError
from ...locations import is_url
from ...reader import Run
from ...reader.dataset.dataset import RowDataset
from .values import Column, columns_of, terms_of

Progress = Callable[[int, int], None]
# Its name keeps it from being taken for data.
ABOUT = "_export.json"


@dataclass(frozen=True)
class Job:
    """What a writer is given: the items, the columns of each, the directory, and whom to tell."""

    run: Run
    data: RowDataset
    columns: Sequence[Column]
    target: Path
    loss: str
    on_item: Progress

    def done(self, items: int) -> None:
        """Tell how many items are written."""
        self.on_item(items, len(self.data))


class Exported(NamedTuple):
    """How many items were written, and which requests were left out, with the reason."""

    items: int
    left_out: Mapping[str, str]


class Format(NamedTuple):
    """What an item is, whether it may be a context's or needs token ids, and the module that writes it."""

    per: str
    context: bool
    token_ids: bool
    module: str


FORMATS = {
    "requests": Format("request", False, True, "requests"),
    "hf": Format("request", True, True, "hub"),
    "arrow": Format("request", True, True, "arrow"),
    "parquet": Format("token", False, False, "parquet"),
    "npy": Format("token", False, False, "npy"),
}


def export(
    run: Run,
    target: str | os.PathLike[str],
    format: str,
    tensors: Sequence[str],
    rows: str | Mapping[str, Any] = "all",
    context: int | None = None,
    loss: str = "response",
    on_item: Progress = lambda done, total: None,
) -> Exported:
    """Write the rows of ``tensors`` (names without a step, or sums ``a + b``) into a new directory.

    Of ``requests``, ``hf`` and ``arrow`` an item is a whole request, or with ``context`` (``hf``, ``arrow``)
    so many positions that follow one another; requests with gaps are left out. Of ``parquet`` and ``npy`` it
    is a token. ``loss`` is which positions a draft model is to be trained on (``requests``): ``"response"``
    or ``"all"``. Raises ReadError or BackendError; the directory is there only if everything was written.
    """
    from importlib import import_module

    if format not in FORMATS:
        raise ReadError(f"there is no format {format!r}; there are {', '.join(FORMATS)}")
    how = FORMATS[format]
    if context is not None and not how.context:
        raise ReadError(f"the format {format} has no pieces of a context's length; hf and arrow have")
    if len(set(tensors)) != len(tensors):
        raise ReadError(f"a tensor is named twice: {', '.join(tensors)}")
    per: Any = "token" if context is not None else how.per
    data = run.dataset(terms_of(tensors), rows, context, per)
    if how.token_ids and not data.has_token_ids:
        raise ReadError(f"{run.url}: not all token ids are known, which the format {format} needs")
    columns = columns_of(data, tensors, format == "requests")
    module = import_module(f".{how.module}", __package__)
    with _made(target) as directory:
        module.write(Job(run, data, columns, directory, loss, on_item))
        _write_about(directory, run, data, columns, {"format": format, "rows": rows, "context": context})
    return Exported(len(data), dict(data.left_out))


@contextmanager
def _made(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory that gets its name when everything is written. Raises TlcoreError."""
    text = os.fspath(target)
    if is_url(text):
        raise ReadError(f"{text}: exports are written into a local directory; copy it from there")
    path = Path(text).expanduser().absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ReadError(f"{text}: is there already; export into a new directory")
    made: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent))
        yield made
        made.rename(path)
    except OSError as error:
        raise BackendError(f"{text}: cannot be written ({error.strerror or error})") from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _write_about(
    directory: Path, run: Run, data: RowDataset, columns: Sequence[Column], how: Mapping[str, Any]
) -> None:
    """What stands in no other file: where it comes from, and what each column was."""
    listed = [
        {"name": each.name, "dtype": each.dtype, "written": each.written_dtype, "shape": list(each.shape)}
        for each in columns
    ]
    if how["format"] == "requests":
        listed = [{key: value for key, value in each.items() if key != "written"} for each in listed]
    about = {"tlcore": __version__, "run": run.id, **how, "items": len(data), "tensors": listed}
    about["left_out"] = dict(data.left_out)
    (directory / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def pyarrow() -> Any:
    """The package. Raises BackendError where it is not there."""
    try:
        import pyarrow
    except ImportError:
        raise BackendError("this format needs pyarrow: pip install 'tlcore[arrow]'") from None
    return pyarrow


__all__ = ["FORMATS", "Exported", "Job", "TlcoreError", "export", "pyarrow"]
