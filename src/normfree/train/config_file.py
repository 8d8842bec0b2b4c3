"""Settings of a run from a file: the ``config.json`` of another run, or YAML that somebody wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normfree.common.checks import required, suggestion
from normfree.common.files import read_bytes, read_json, refused, structured
from normfree.common.text import LONGEST, first_line, shortened
from normfree.train.config import TrainConfig, flatten, to_dict
from normfree.train.records import version

YAML_BYTES = 2**20
"""Bytes of YAML that are read at most."""


def read_config(path: str | Path, base: TrainConfig | None = None) -> tuple[TrainConfig, list[str]]:
    """Read a run's settings from a file.

    ``.json`` is the ``config.json`` of a run, or an object of settings; ``.yaml`` and ``.yml`` are settings. Those of
    data, augmentation and optimizer are nested or dotted: ``data: {source: pets}`` or ``data.source: pets``.

    Args:
        path: of the file.
        base: has what the file does not say; the defaults of the fields otherwise, and the file's own name.

    Returns:
        The settings, and the names of those that a run's config.json lacks, because an older version wrote it.

    Raises:
        ValueError: naming the file, and a setting that is unknown, with the nearest known ones, or has a wrong value.
        ImportError: for YAML, if PyYAML is not installed.
    """
    path = Path(path)
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise refused("config", path, "is neither .json nor .yaml", "give a run's config.json, or YAML")
    document = read_json(path, "config") if path.suffix == ".json" else _read_yaml(path)
    described = isinstance(document.get("config"), Mapping) and isinstance(document.get("derived"), Mapping)
    values = _settings(document["config"] if described else document)
    if base is None and "model" not in values:
        remedy = f"name a recipe to begin with: normfree train cifar --config {path}"
        raise refused("config", path, "says no model", remedy)
    if base is None:
        base = TrainConfig(name=re.sub(r"\W+", "_", path.stem), model="nf_resnet50")
    defaults = flatten(to_dict(base))
    for name in values:
        if name not in defaults:
            raise refused("config", path, *_unknown(name, defaults, document if described else None))
    try:
        config = structured(TrainConfig, _nested({**defaults, **values}))
    except ValueError as error:
        said = re.sub(r"^TrainConfig[.:] ?", "", first_line(error, LONGEST))
        raise ValueError(shortened(f"config={str(path)!r}: {said}")) from error
    return config, [name for name in defaults if described and name not in values]


def _settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a document by their dotted names, with the underscores of Python; empty sections are left out."""
    leaves = flatten({str(name): value for name, value in document.items()})
    return {name.replace("-", "_"): value for name, value in leaves.items()}


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping whose leaves have these dotted names."""
    document: dict[str, Any] = {}
    for name, value in leaves.items():
        *sections, last = name.split(".")
        place = document
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return document


def _unknown(name: str, known: Mapping[str, Any], written: Mapping[str, Any] | None) -> tuple[str, str]:
    """Rule and remedy of a setting that is unknown; ``written`` is the run's whole file, which says by what version."""
    if inside := [one for one in known if one.startswith(f"{name}.")]:
        return f"{name} is a section", f"give settings in it, such as {inside[0]}"
    rule = f"{shortened(name, 80)} is no setting"
    versions = (written or {}).get("versions")
    theirs, ours = versions.get("normfree") if isinstance(versions, Mapping) else None, version("normfree")
    if theirs not in (None, ours):
        rule += f" of normfree {ours}, and normfree {theirs} wrote the file"
    last = name.rpartition(".")[2]
    same = [one for one in known if one.rpartition(".")[2] == last]
    return rule, f"did you mean {', '.join(same)}?" if same else suggestion(name, known)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file of YAML.

    Raises:
        ValueError: it is none, has a key twice, or refers from one place to another, which may grow without bound.
    """
    yaml: Any = required("yaml", "a YAML config")

    class Loader(yaml.SafeLoader):
        """Takes 1e-4 for a number and None for nothing, as the command line does; knows no aliases."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it has an alias (*name)")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            mapping = super().construct_mapping(node, deep=deep)
            if len(mapping) < len(node.value):
                keys = [key.value for key, _ in node.value]
                raise yaml.YAMLError(f"it has {next(key for key in keys if keys.count(key) > 1)} twice")
            return mapping

    number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("None$"), ["N"])
    content = read_bytes(path, "config", most=YAML_BYTES)
    try:
        document = yaml.load(content, Loader)
    except Exception as error:  # PyYAML's own kind, and what its constructors make of a tag's wrong value
        rule = f"is no sound YAML file ({' '.join(str(error).split()) or type(error).__name__})"
        raise refused("config", path, shortened(rule, 240), "mend it") from error
    if not isinstance(document, dict):
        raise refused("config", path, f"holds {type(document).__name__}, no settings", "write name: value")
    return document
