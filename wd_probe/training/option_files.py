"""Options in files: one's own in YAML or TOML, a run's ``config.json``, timm's ``args.yaml``."""

import json
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import InputError, shown_line
from ..runs.reading import JSON_BYTES, damaged, read_text
from .option import options_in
from .options import TrainOptions
from .timm_args import as_options, beyond_options, is_timms

_BYTES, _DEPTH = 16 << 10, 3
#: Of a run that is over: another lies elsewhere, and on what there is.
_PLACES = ("output", "device")


def parsed(path: Path) -> dict[str, Any]:
    """The keys and values of a TOML, YAML or JSON file, by its name's ending.

    Raises:
        InputError: it is none of them, cannot be read, or holds something else.
    """
    kind = path.suffix.lower()
    if kind not in (".toml", ".yaml", ".yml", ".json"):
        raise InputError(f"{path} must end in .toml, .yaml, .yml or .json")
    try:
        text = read_text(path, JSON_BYTES if kind == ".json" else _BYTES)
        if kind == ".toml":
            found = tomllib.loads(text)
        else:
            once = partial(_once, path)
            found = (
                json.loads(text, object_pairs_hook=once) if kind == ".json" else _yaml(text, once)
            )
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise InputError(f"{path} must hold keys and values, such as: method: lpwd")
    return found


def _once(path: Path, pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """What has every key once."""
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InputError(f"{path} gives {shown_line(name)} twice")
        found[name] = value
    return found


def _yaml(text: str, once: Callable[[list[tuple[Any, Any]]], object]) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            once([(k.value, v) for k, v in node.value if isinstance(k, yaml.ScalarNode)])
            return super().construct_mapping(node, deep)

    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):  # as far as it is sound, and no further
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _DEPTH:
                raise ValueError("it uses an alias (*name) or lists within lists within lists")
        return Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


@dataclass(frozen=True, slots=True)
class OptionFile:
    """What a file asks for.

    Attributes:
        values: by the name of an option.
        strict: whether every key has to be an option.
        rest: by name what matters of the keys that are no options, whatever the command.
    """

    values: Mapping[str, Any]
    strict: bool = False
    rest: tuple[str, ...] = ()

    def missed(self, known: Collection[str]) -> list[str]:
        """What it asks for that a command cannot do which takes these options."""
        usual = {field.name: field.default for field in fields(TrainOptions)}
        own = [
            name
            for name, value in self.values.items()
            if name in options_in(TrainOptions) and name not in known
            if value not in (None, "", {}, usual[name])
        ]
        return [] if self.strict else [*own, *self.rest]


def read_options(path: Path) -> OptionFile:
    """The options in a file, whoever wrote it.

    Raises:
        InputError: it cannot be read.
    """
    found = parsed(path)
    if is_timms(found):
        return OptionFile(as_options(found), rest=beyond_options(found))
    if isinstance(found.get("versions"), dict) and "command" in found:
        measured = found.get("every") != 0  # of `train`, which another command may not take over
        left = _PLACES if measured else (*_PLACES, "every")
        return OptionFile({k: v for k, v in found.items() if k not in left})
    pairs = [(name.replace("-", "_"), value) for name, value in found.items()]
    return OptionFile(_once(path, pairs), strict=True)
