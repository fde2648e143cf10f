"""A data set of Hugging Face: a folder that `save_to_disk` wrote, or one of the Hub that is in its cache. Needs `datasets`.

Its own splits train, validation (or valid, dev) and test are taken; one that is not there is cut off train. With
--config.task.download=True what is not in the cache is downloaded, which can be gigabytes.

    hf:my_folder      hf:Salesforce/wikitext,config=wikitext-103-raw-v1      hf:roneneldan/TinyStories,test=0.01
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from common.errors import UserError, near
from common.files import absolute
from data.records import Records, Sources

ALIASES = {"train": ("train",), "valid": ("validation", "valid", "dev"), "test": ("test",)}
ROWS = 256  # are read at once


class HuggingFace(Records):
    """Documents of a data set; options as `data.records.Records` has them.

    Args:
      field: the column that holds the text.
      config: of a data set of the Hub that has several.
      revision: of a data set of the Hub: a branch, a tag or a commit.
      valid, test: a share of the documents of train, or the name of a split.
    """

    paths = ()

    def __init__(
        self,
        field: str = "text",
        config: str | None = None,
        revision: str | None = None,
        valid: str | None = None,
        test: str | None = None,
    ):
        super().__init__(field, valid, test)
        self.config, self.revision = config, revision

    def where(self, path: str) -> str:
        return absolute(path) if pathlib.Path(absolute(path)).is_dir() else path

    def sources(self, path: str, cache: pathlib.Path, download: bool) -> Sources:
        try:
            import datasets
        except ImportError:
            raise UserError(
                "corpus='hf:...' needs the package `datasets`: pip install -r requirements-hf.txt"
            ) from None
        splits = self._load(datasets, path, download)
        taken = {}
        for split, names in ALIASES.items():
            asked = self.held_out.get(split)
            if asked is None:
                found = next((name for name in names if name in splits), None)
            elif _is_number(asked):
                found = None
            elif asked in splits:
                found = asked
            else:
                raise UserError(f"{path}: there is no split {asked!r}; {near(asked, splits)}")
            if found is not None:
                taken[split] = splits[found]
        if "train" not in taken:
            raise UserError(f"{path}: there is no split 'train', only {', '.join(map(repr, splits))}")
        for name, one in taken.items():
            kind = one.features.get(self.field)
            if kind is None:
                raise UserError(
                    f"{path}: there is no column {self.field!r} ({near(self.field, one.features)}); give it as field=NAME"
                )
            if getattr(kind, "dtype", None) not in ("string", "large_string"):
                raise UserError(
                    f"{path}: the column {self.field!r} of {name} holds no text but {kind}; give another as field=NAME"
                )
        key = {split: [one._fingerprint, len(one)] for split, one in taken.items()}
        return Sources({split: [one] for split, one in taken.items()}, key, max(1, taken["train"].data.nbytes))

    def _load(self, datasets, path: str, download: bool) -> dict[str, Any]:
        folder = pathlib.Path(absolute(path))
        try:
            if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
                found = datasets.load_from_disk(str(folder))
            else:
                local = datasets.DownloadConfig(local_files_only=not download)
                found = datasets.load_dataset(path, self.config, revision=self.revision, download_config=local)
        except Exception as error:  # `datasets` reports what it misses through dozens of types
            first = (str(error).strip().splitlines() or [""])[0]
            hint = (
                ""
                if download or folder.is_dir()
                else "; --config.task.download=True downloads what is not in its cache"
            )
            raise UserError(f"corpus='hf:{path}' cannot be read ({type(error).__name__}: {first}){hint}") from error
        return dict(found) if isinstance(found, dict) else {"train": found}

    def texts(self, source: Any) -> Iterator[str | None]:
        for batch in source.select_columns([self.field]).with_format("arrow").iter(batch_size=ROWS):
            yield from batch.column(0).to_pylist()


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
