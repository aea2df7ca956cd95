"""Files of settings: YAML with a section per concern, and with a `base` that they change."""

from pathlib import Path
from typing import Any, Final

import yaml

from azr_async.errors import ConfigError

BASE: Final = "base"
"""Names, relative to its own folder, the file whose settings a file starts from."""

Tree = dict[str, Any]


def read_tree(path: Path) -> Tree:
    """The settings in a YAML file and in those it is based on, not yet validated; the nearest wins.

    Raises ConfigError with the line of a syntax error, or when files are based on each other.
    """
    tree, seen = _read(path), [path]
    while BASE in tree:
        base = tree.pop(BASE)
        if not isinstance(base, str) or not base.isprintable():
            raise ConfigError(
                f"{seen[-1]}: base: {base!r} is not the name of a file. Give one, such as azr-official.yaml."
            )
        above = seen[-1].parent / base
        if above.resolve() in [file.resolve() for file in seen]:
            raise ConfigError(
                f"{seen[-1]}: base: {base} is based on this file in turn. Leave `base` out of one of them."
            )
        seen.append(above)
        tree = merged(_read(above), tree)
    return tree


def merged(below: Tree, above: Tree) -> Tree:
    """Settings of both trees; those of `above` win."""
    both = {
        key: merged(below[key], above[key])
        for key in below.keys() & above.keys()
        if isinstance(below[key], dict) and isinstance(above[key], dict)
    }
    return {**below, **above, **both}


def _read(path: Path) -> Tree:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. The presets are in configs/.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file. The presets in configs/ show what one looks like.") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply. Write `section:` and under it `setting: value`.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{path}: {where}{what}. It is not YAML; mend that line.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no sections. Write `section:` and under it, indented, `setting: value`.")
    sections = [section for section in tree.values() if isinstance(section, dict)]
    for key in (key for names in (tree, *sections) for key in names if not isinstance(key, str)):
        raise ConfigError(f"{path}: {key!r} is not the name of a section or setting. Names are words; correct it.")
    return tree
