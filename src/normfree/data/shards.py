"""How many examples are in files, without reading the images."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import PurePosixPath

from normfree.common.checks import invalid
from normfree.common.files import check_file
from normfree.common.text import first_line

LONGEST_NUMBER = 32
"""Characters of a .cls file that are read: it holds one number."""


def check_files(files: Sequence[str]) -> None:
    """Raise unless each path is a regular file; addresses (``://``) are left alone.

    Raises:
        ValueError: naming the one that is not.
    """
    for file in files:
        if "://" not in file:
            check_file(file, "source", "give .parquet or .tar files")


def count_rows(files: Sequence[str]) -> list[int]:
    """Rows of each parquet file, from its footer.

    Raises:
        ValueError: naming the file that is not parquet.
    """
    from pyarrow import ArrowException, parquet

    counts = []
    for file in files:
        try:
            counts.append(parquet.read_metadata(file).num_rows)
        except (ArrowException, OSError) as error:
            raise invalid("source", file, f"is no whole parquet file ({first_line(error)})", "write it anew") from error
    return counts


def scan_shards(files: Sequence[str]) -> tuple[int, int | None]:
    """Examples of WebDataset shards, and classes (one above the largest number in a .cls file), from the headers.

    Raises:
        ValueError: naming the shard that is damaged, or if there is no example at all.
    """
    examples, largest = 0, -1
    for file in files:
        keys = set()
        try:
            with tarfile.open(file) as shard:
                for member in shard:
                    path = PurePosixPath(member.name)
                    if not member.isfile() or path.name.startswith("."):
                        continue
                    stem, _, kind = path.name.partition(".")
                    keys.add(str(path.parent / stem))
                    if kind.lower() == "cls" and (content := shard.extractfile(member)):
                        largest = max(largest, int(content.read(LONGEST_NUMBER)))
        except (tarfile.TarError, OSError, ValueError) as error:
            raise invalid("source", file, f"is no whole shard ({first_line(error)})", "write it anew") from error
        examples += len(keys)
    if not examples:
        raise invalid("source", next(iter(files)), "the shards hold no example", "pass shards with images in them")
    return examples, largest + 1 if largest >= 0 else None
