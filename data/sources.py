"""Raw rows out of files, the hub or the generator, each with the place it came from for error messages."""

import csv
import glob
import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.answers import strip_layout
from data.errors import DataError, did_you_mean
from data.spec import GeneratorSpec, Location


@dataclass(frozen=True)
class Row:
    """One row as the source has it. `place` is "file:line" or "file row 7"; `source` a short name."""

    values: dict[str, Any]
    place: str
    source: str


OnBad = Callable[[DataError], None]


def stop(error: DataError) -> None:
    raise error


def read_rows(spec: Location, *, streaming: bool = False, on_bad: OnBad = stop) -> Iterator[Row]:
    """All rows of the source, lazily. `streaming`: do not download a hub data set as a whole.

    on_bad: called for each row that cannot be read; if it returns, the row is left out.
    Raises DataError for a missing or unreadable file and for a hub data set that cannot be loaded.
    """
    if spec.path is not None:
        for path in find_files(spec.path):
            yield from _READERS[path.suffix](path, on_bad)
    elif spec.hub is not None:
        yield from _read_hub(spec, spec.hub, streaming)
    else:
        assert spec.generator is not None  # Location: exactly one of the three
        yield from _read_generator(spec.generator)


def count_rows(spec: Location) -> int | None:
    """The number of rows of the source, as cheaply as its format allows; None for a hub data set."""
    if spec.generator is not None:
        return spec.generator.count
    if spec.path is None:
        return None
    return sum(_COUNTERS[file.suffix](file) for file in find_files(spec.path))


def find_files(path: str | list[str]) -> list[Path]:
    """The files that the paths and globs stand for, globs sorted.

    Raises DataError for a path without a file (naming the nearest in that folder) and an unknown extension.
    """
    found: list[Path] = []
    for name in [path] if isinstance(path, str) else path:
        plain = Path(name).expanduser()
        matches = [plain] if plain.is_file() else sorted(map(Path, glob.glob(str(plain), recursive=True)))
        files = [match for match in matches if match.is_file()]
        if not files:
            raise _no_such_file(plain)
        found += files
    for file in found:
        if file.suffix not in _READERS:
            raise DataError("path", f"{file} has no known extension", f"Known are {', '.join(_READERS)}.")
    if not found:
        raise DataError("path", "an empty list", "Name at least one file.")
    return found


def _no_such_file(path: Path) -> DataError:
    if path.is_dir():
        return DataError("path", f"{path} is a folder", f"Name its files, for example {path / '*.jsonl'}.")
    if glob.has_magic(str(path)):
        return DataError("path", f"no file matches {path}", "Check the pattern; it is relative to where you run.")
    if not path.parent.is_dir():
        return DataError("path", f"there is no folder {path.parent}", "Paths are relative to where you run.")
    hint = did_you_mean(path.name, (file.name for file in path.parent.iterdir() if file.is_file()))
    return DataError("path", f"there is no file {path}", hint or "Paths are relative to where you run.")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The numbered lines that are not empty, of a plain or a gzipped file."""
    # Binary lines: str.splitlines and universal newlines would also cut at U+2028 or a bare \r in a string.
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        try:
            yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
        except (gzip.BadGzipFile, EOFError) as error:
            raise DataError(str(path), f"not a gzipped file ({error})", "Fetch it anew.") from error


def _read_jsonl(path: Path, on_bad: OnBad = stop) -> Iterator[Row]:
    for number, line in _lines(path):
        place = f"{path}:{number}"
        try:
            value = json.loads(line)
        except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
            on_bad(DataError(place, f"not a JSON object ({error})", "Mend or remove this line."))
            continue
        yield from _row(value, place, path.name.partition(".jsonl")[0], on_bad)


def _read_json(path: Path, on_bad: OnBad = stop) -> Iterator[Row]:
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        hint = "One object a line? Then name it .jsonl." if "Extra data" in str(error) else "Mend the file."
        raise DataError(str(path), f"not valid JSON ({error})", hint) from error
    if isinstance(data, dict) and data and all(isinstance(value, dict) for value in data.values()):
        data = [{key: value} for key, value in data.items()]
    if not isinstance(data, list):
        raise DataError(str(path), "its top level is not a list of objects", "Wrap the rows in one list.")
    for number, value in enumerate(data, start=1):
        yield from _row(value, f"{path} row {number}", path.stem, on_bad)


def _row(value: object, place: str, source: str, on_bad: OnBad) -> Iterator[Row]:
    if isinstance(value, dict):
        yield Row(unwrap_keyed(value), place, source)
    else:
        on_bad(DataError(place, f"a row must be a JSON object, not {type(value).__name__}", "Mend this row."))


def unwrap_keyed(row: dict[str, Any]) -> dict[str, Any]:
    r"""`{"Problem_7": {...}}`, as Odyssey-Math has it, as a flat row with the key in a column `key`.

    Its strings lose the page layout at their end (`\end{problem} \noindent`). Other rows stay as they are.
    """
    inner = next(iter(row.values())) if len(row) == 1 else None
    if not isinstance(inner, dict):
        return row
    cleaned = {name: strip_layout(v) if isinstance(v, str) else v for name, v in inner.items()}
    return {"key": next(iter(row)), **cleaned}


def _read_csv(path: Path, on_bad: OnBad = stop) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for number, values in enumerate(reader, start=1):
                place = f"{path} row {number}"
                if None in values or None in values.values():
                    fix = "Quote cells that hold commas or line breaks."
                    on_bad(DataError(place, f"not {len(reader.fieldnames or ())} cells like the header", fix))
                    continue
                yield Row(dict(values), place, path.stem)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}:{reader.line_num}", f"not CSV in UTF-8 ({error})", "Mend the file.") from error


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(str(path), f"not a Parquet file ({error})", "Write it anew.") from error


def _read_parquet(path: Path, on_bad: OnBad = stop) -> Iterator[Row]:
    number = 0
    with _open_parquet(path) as file:
        for batch in file.iter_batches(batch_size=1000):
            for values in batch.to_pylist():
                number += 1
                yield Row(values, f"{path} row {number}", path.stem)


def _count_jsonl(path: Path) -> int:
    return sum(1 for _ in _lines(path))


def _count_parquet(path: Path) -> int:
    with _open_parquet(path) as file:
        return int(file.metadata.num_rows)


_READERS: dict[str, Callable[[Path, OnBad], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".gz": _read_jsonl,  # HumanEval comes as .jsonl.gz
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
_COUNTERS: dict[str, Callable[[Path], int]] = {
    ".jsonl": _count_jsonl,
    ".gz": _count_jsonl,
    ".json": lambda path: sum(1 for _ in _read_json(path)),
    ".csv": lambda path: sum(1 for _ in _read_csv(path)),  # a quoted cell may hold line breaks
    ".parquet": _count_parquet,
}


def _read_hub(spec: Location, hub: str, streaming: bool) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(hub, spec.config, split=spec.split, revision=spec.revision, streaming=streaming)
    except Exception as error:  # dozens of kinds: network, access, config, split, format
        raise DataError(
            "hub",
            f"cannot load {hub!r}, config {spec.config!r}, split {spec.split!r} ({error})",
            "Check id, config, split and network; without network, download it and give its files as `path`.",
        ) from error
    for number, values in enumerate(rows, start=1):
        yield Row(dict(values), f"{hub} row {number}", hub)


def _read_generator(spec: GeneratorSpec) -> Iterator[Row]:
    from data.synthetic import generate

    for values in generate(spec):
        yield Row(values, f"problem {values['index']}", f"synthetic/{values['family']}")
