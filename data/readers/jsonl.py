"""Lines of JSON, one object with a text in each: .jsonl or .ndjson, also packed (.gz, .zst); a file, a folder or a pattern.

jsonl:c4/,field=text      jsonl:train.jsonl.gz,valid=dev.jsonl,test=test.jsonl      jsonl:pile/*.jsonl.zst,valid=0.001
"""

import gzip
import io
import json
import pathlib
import zlib
from collections.abc import Iterator

from common.errors import UserError, near
from data.records import FileRecords

PLAIN = (".jsonl", ".ndjson", ".json")


class Jsonl(FileRecords):
    """Documents of lines of JSON; options as `data.records.Records` has them."""

    endings = tuple(ending + packed for ending in PLAIN for packed in ("", ".gz", ".zst"))

    def texts(self, source: pathlib.Path) -> Iterator[str | None]:
        try:
            with _open(source) as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield self._text(source, number, line)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{source} cannot be read ({error}): it is cut or spoilt; fetch it again") from error

    def _text(self, source: pathlib.Path, number: int, line: bytes) -> str | None:
        place = f"{source}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: it is no JSON ({error}); each line must be one object") from None
        if not isinstance(record, dict):
            raise UserError(f"{place}: it is no JSON object but {str(record)[:40]!r}; each line must be one object")
        if self.field not in record:
            raise UserError(f"{place}: there is no {self.field!r} ({near(self.field, record)}); give it as field=NAME")
        text = record[self.field]
        if text is not None and not isinstance(text, str):
            raise UserError(f"{place}: {self.field!r} is no text but {str(text)[:40]!r}; give another as field=NAME")
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{place}: {self.field!r} is no valid text ({error})") from None
        return text


def _open(path: pathlib.Path):
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        import pyarrow  # slow to import, and only needed here

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 2**20)
    return open(path, "rb", buffering=2**20)
