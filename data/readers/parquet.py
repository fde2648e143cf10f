"""Parquet files with a column of texts: a file, a folder or a pattern.

parquet:fineweb-edu/sample/10BT      parquet:wiki/*.parquet,field=content,valid=0.001
"""

import pathlib
from collections.abc import Iterator

from common.errors import UserError, near
from data.records import FileRecords

ROWS = 256  # are read at once


class Parquet(FileRecords):
    """Documents of a column of strings; options as `data.records.Records` has them. A null is a row without text."""

    endings = (".parquet",)

    def texts(self, source: pathlib.Path) -> Iterator[str | None]:
        # Slow to import, and only needed here.
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(source) as file:
                if self.field not in file.schema_arrow.names:
                    raise UserError(
                        f"{source}: there is no column {self.field!r} ({near(self.field, file.schema_arrow.names)}); give it as "
                        "field=NAME"
                    )
                if file.schema_arrow.names.count(self.field) > 1:
                    raise UserError(f"{source}: there are several columns {self.field!r}; name them differently")
                kind = file.schema_arrow.field(self.field).type
                held = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
                if held not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
                    raise UserError(
                        f"{source}: the column {self.field!r} holds no text but {kind}; give another as field=NAME"
                    )
                for batch in file.iter_batches(ROWS, columns=[self.field]):
                    yield from batch.column(0).to_pylist()
        except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{source} is no intact parquet file ({error})") from error
