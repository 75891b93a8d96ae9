"""Names of drafters: a literal table of lazy targets; third parties join by the entry points `outpace.drafters`.

A folder that holds a trained drafter is a name, too.
"""

from __future__ import annotations

import importlib
import inspect
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from outpace.drafters.base import Drafter
from outpace.drafters.checkpoint import CONFIG, read_config
from outpace.errors import ConfigError, suggestion

DRAFTERS: Final[dict[str, str]] = {
    "prompt_lookup": "outpace.drafters.prompt_lookup:PromptLookup",
    "suffix": "outpace.drafters.suffix:Suffix",
    "draft_model": "outpace.drafters.draft_model:DraftModel",
    "layer_skip": "outpace.drafters.layer_skip:LayerSkip",
    "lookahead": "outpace.drafters.lookahead:Lookahead",
    "ptp": "outpace.drafters.ptp:Ptp",
    "medusa": "outpace.drafters.medusa:Medusa",
    "mtp": "outpace.drafters.mtp:MTP",
    "mtp_heads": "outpace.drafters.mtp:MTPHeads",
    "eagle": "outpace.drafters.eagle:Eagle",
    "eagle2": "outpace.drafters.eagle:Eagle2",
    "eagle3": "outpace.drafters.eagle:Eagle3",
}

ENTRY_POINTS: Final = "outpace.drafters"


def drafter_names() -> dict[str, str]:
    """Every known name and where it lives, third parties' included.

    Raises:
        ConfigError: if two packages claim one name.
    """
    names = dict(DRAFTERS)
    for point in metadata.entry_points(group=ENTRY_POINTS):
        if point.name in names and names[point.name] != point.value:
            raise ConfigError(f"drafter {point.name!r} is claimed by {names[point.name]} and by {point.value}")
        names[point.name] = point.value
    return names


def make_drafter(spec: str | Drafter | None) -> Drafter | None:
    """A drafter from what a user wrote.

    "none" (plain decoding), "suffix", "suffix:draft_len=12,max_depth=16", the folder of a trained one
    ("runs/eagle3:draft_len=4"), or several joined by "+" to merge their drafts into one tree: "prompt_lookup+suffix".

    Raises:
        ConfigError: on an unknown name or option, with the closest known one.
        CheckpointError: if a folder holds no readable drafter.
    """
    if spec is None or isinstance(spec, Drafter):
        return spec
    if spec == "none":
        return None
    parts = [_make_one(part.strip()) for part in spec.split("+")]
    if len(parts) == 1:
        return parts[0]
    from outpace.drafters.merged import Merged

    return Merged(parts)


def _make_one(spec: str) -> Drafter:
    name, _, rest = spec.partition(":")
    if (Path(name).expanduser() / CONFIG).is_file():
        return _load_one(Path(name).expanduser(), rest)
    cls = find_drafter(name)
    options = _options(name, cls, rest)
    try:
        drafter = cls(**options)
    except TypeError as error:
        raise ConfigError(f"drafter {name!r} cannot be made: {error}; options: {_signature(cls)}") from error
    from outpace.drafters.learning import LearnedDrafter

    if isinstance(drafter, LearnedDrafter):
        drafter.choose(options)
    return drafter


def find_drafter(name: str) -> type[Drafter]:
    """The class of a name.

    Raises:
        ConfigError: if there is none, with the closest known name.
    """
    known = drafter_names()
    if name not in known:
        hint = "; a trained drafter is named by its folder, which must hold a config.json" if "/" in name else ""
        raise ConfigError(f"unknown drafter {name!r}; {suggestion(name, [*known, 'none'])}{hint}")
    module, _, attribute = known[name].partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    if not (isinstance(cls, type) and issubclass(cls, Drafter)):
        raise ConfigError(f"drafter {name!r} ({known[name]}) is not a subclass of outpace.drafters.Drafter")
    return cls


def _load_one(folder: Path, text: str) -> Drafter:
    from outpace.drafters.learning import LearnedDrafter

    name = read_config(folder)["drafter"]
    cls = find_drafter(name)
    if not issubclass(cls, LearnedDrafter):
        raise ConfigError(f"{str(folder)!r} holds drafter {name!r}, which has no weights to load; name it instead")
    items = [item for item in text.split(",") if item and item.partition("=")[0] != "force"]
    options = _options(name, cls, ",".join(items))
    return cls.from_pretrained(folder, force="force=true" in text.split(","), **options)


def _options(name: str, cls: type, text: str) -> dict[str, Any]:
    """Text like "a=1,b=x" as keyword arguments of a constructor, converted by its defaults."""
    parameters = inspect.signature(cls).parameters
    options: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if key not in parameters:
            raise ConfigError(f"drafter {name!r} has no option {key!r}; {suggestion(key, parameters)}")
        if not equals:
            raise ConfigError(f"option {key!r} of drafter {name!r} needs a value: {name}:{key}=...")
        options[key] = _convert(name, key, value, parameters[key].default)
    return options


def _convert(name: str, key: str, value: str, default: Any) -> Any:
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False, "1": True, "0": False}[value.lower()]
        if isinstance(default, int | float):
            return type(default)(value)
        if isinstance(default, tuple):
            return tuple(int(part) if part.isdigit() else part for part in value.split("/"))
    except (KeyError, ValueError) as error:
        raise ConfigError(f"option {key}={value!r} of drafter {name!r}: expected something like {default!r}") from error
    return value


def _signature(cls: type) -> str:
    return ", ".join(str(parameter) for parameter in inspect.signature(cls).parameters.values())
