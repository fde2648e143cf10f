"""A text file, or the text files of a folder in order of their names; see data/local_text.py for what is text.

Files are joined by a blank line and are documents. The text is cut into train, valid and test in order, 90, 5 and 5 % of its
bytes by default, with no regard to documents.

    file:book.txt      file:articles/,valid=0.01,test=0.01      file:train.txt,valid=dev.txt,test=test.txt
"""

import os
import pathlib

from common.errors import UserError
from common.files import absolute
from data import flat, local_text
from data.corpus import Corpus, Reader, share
from data.flat import SEPARATOR


class File(Reader):
    """Text.

    Args:
      valid, test: a share of the text's bytes, or a file or folder of their own.
    """

    def __init__(self, valid: str | None = None, test: str | None = None):
        self._held_out = {"valid": valid, "test": test}

    def read(self, path: str, cache: pathlib.Path, download: bool) -> Corpus:
        held_out = {split: value for split, value in self._held_out.items() if value is not None}
        shares = {split: share(value) for split, value in held_out.items()}
        paths = {"train": path} | {split: value for split, value in held_out.items() if shares[split] is None}
        found = {}
        for split, where in paths.items():
            root, kept = pathlib.Path(absolute(where)), os.path.realpath(absolute(cache))
            # What is kept between runs may lie in the folder of the text, or in folders of its own beside it.
            found[split] = local_text.find(
                root, local_text.kept_in(cache) if kept == os.path.realpath(root) else {kept}
            )
        flat.check_apart({split: one.files for split, one in found.items()})
        cut = None
        if held_out:
            # What has files of its own is not cut off.
            cut = tuple(0 if split in paths else shares.get(split) or 0.05 for split in ("valid", "test"))
        key = ["corpora", "file", {split: flat.listing(one.files) for split, one in found.items()}, cut]

        def fill(made: pathlib.Path) -> dict:
            told = []
            for split, one in found.items():
                texts, said = local_text.sift(one)
                told.append(said)
                texts = [(file, size) for file, size in texts if size]
                if not texts:
                    raise UserError(f"{one.path} is an empty text; give one with at least a few thousand bytes")
                total = sum(size for _, size in texts) + (len(texts) - 1) * len(SEPARATOR)
                flat.check_room(made, total)
                writer = flat.Cut(made, total, cut) if split == "train" else flat.Writer(made, split)
                for number, (file, _) in enumerate(texts):
                    if number:
                        writer.write(SEPARATOR)
                        writer.end()
                    for block in local_text.read_blocks(file):
                        writer.write(block)
                writer.end()
                writer.close()
            return {"fingerprint": flat.fingerprint(flat.mapped(made)), "told": "\n".join(filter(None, told))}

        folder, facts = flat.kept(cache, key, fill)
        local_text.say_once(facts["told"])
        return Corpus(
            "", flat.mapped(folder), facts["fingerprint"], files={split: one.files for split, one in found.items()}
        )
