"""What there is to know about every setting, taken from the sections of `config.py`: for `--help` and for errors."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from azr_async.config import Config

EXAMPLES: Final = (
    ("the starter model on the CPU: minutes, no GPU, no download", "python run.py"),
    ("the same, synchronous, shorter, another seed", "python run.py --max-lag 0 --steps 40 --seed 3"),
    (
        "asynchronous Absolute Zero of a 7B model on eight GPUs",
        "python run.py --config configs/azr-async-7b.yaml --model /models/my-7b",
    ),
    ("look before you start: settings and placement", "python run.py --inference-gpus 4 --train-gpus 4 --dry-run"),
    ("any setting by its name", "python run.py --learner.objective cispo --solve.attempts 16"),
)

PLAIN: Final = (
    ("--config FILE", "settings from a YAML file; configs/ holds presets"),
    ("--output DIR", "the run directory; default runs/<time>-<name>/"),
    ("--resume DIR", "continue from a checkpoint folder, or from the newest one of a run directory"),
    ("--dry-run", "print the resolved configuration and the placement, start nothing"),
    ("--help, -h", "this text"),
)


def setting_names() -> Sequence[str]:
    """Every setting as `section.field`."""
    return [f"{section}.{field}" for section, fields in _schema().items() for field in fields["properties"]]


def expected(name: str) -> str:
    """In words, what values the setting takes, and its default: `a whole number, 1 or more (default 120)`."""
    section, field = name.split(".")
    schema = _schema()[section]["properties"][field]
    return f"{_kind(schema)} (default {_shown(schema.get('default'))})"


def print_help(console: Console, short_names: Mapping[str, str]) -> None:
    """Examples first, then the short options, then every setting by section."""
    console.print("[bold]python run.py[/] trains a model by asynchronous Absolute Zero self-play.\n")
    console.print("[bold]Examples[/]")
    for what, example in EXAMPLES:
        console.print(f"  [dim]# {what}[/]\n  [cyan]{example}[/]", soft_wrap=True, highlight=False)
    console.print()
    _print_rows(console, "Options", PLAIN)
    rows = [
        (f"{short} {_metavar(name)}", f"{_summary(name)} = --{name.replace('_', '-')}")
        for short, name in short_names.items()
    ]
    _print_rows(console, "Short names of settings that are typed often", rows)
    for section, schema in _schema().items():
        rows = [
            (
                f"--{section}.{field} {_metavar(f'{section}.{field}')}".replace("_", "-"),
                _described(f"{section}.{field}"),
            )
            for field in schema["properties"]
        ]
        _print_rows(console, f"{section}: {schema['description']}", rows)
    console.print(
        "Precedence: command line > --config file > defaults. Exit status: 0 done, 1 failed, 2 wrong usage, 130 Ctrl-C."
    )


def _print_rows(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for option, text in rows:
        table.add_row(f"  [cyan]{escape(option)}[/]", escape(text))
    console.print(f"[bold]{escape(title)}[/]")
    console.print(table)
    console.print()


def _described(name: str) -> str:
    section, field = name.split(".")
    schema = _schema()[section]["properties"][field]
    return f"{_summary(name)} [{_kind(schema)}; default {_shown(schema.get('default'))}]"


def _summary(name: str) -> str:
    section, field = name.split(".")
    return str(_schema()[section]["properties"][field].get("description", "")).replace("\n", " ")


def _metavar(name: str) -> str:
    section, field = name.split(".")
    schema = _schema()[section]["properties"][field]
    if "enum" in schema:
        return "|".join(map(str, schema["enum"]))
    if "anyOf" in schema and "const" in schema["anyOf"][-1]:
        return f"N|{schema['anyOf'][-1]['const']}"
    return {"integer": "N", "number": "X", "boolean": "true|false", "array": "A,B,.."}.get(
        schema.get("type", ""), "TEXT"
    )


def _kind(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(str(option.get("const", "")) or _kind(option) for option in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if "const" in schema:
        return f"{schema['const']}, the only choice so far"
    match schema.get("type"):
        case "integer":
            return f"a whole number{_range(schema, step=1)}"
        case "number":
            return f"a number{_range(schema, step=0)}"
        case "boolean":
            return "true or false"
        case "array":
            items = schema.get("items") or schema["prefixItems"][0]
            return f"a list of values, each {_kind(items)}"
        case "null":
            return "null"
    return "a path" if schema.get("format") == "path" else "text" + _pattern(schema)


def _range(schema: Mapping[str, Any], *, step: int) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if step and "exclusiveMinimum" in schema:
        low = schema["exclusiveMinimum"] + step
    bounds = [
        f"{_shown(low)} or more" if low is not None and high is None else "",
        f"from {_shown(low)} to {_shown(high)}" if low is not None and high is not None else "",
        f"above {_shown(schema['exclusiveMinimum'])}" if not step and "exclusiveMinimum" in schema else "",
        f"at most {_shown(high)}" if high is not None and low is None else "",
        f"below {_shown(schema['exclusiveMaximum'])}" if "exclusiveMaximum" in schema else "",
    ]
    return "".join(f", {bound}" for bound in bounds if bound)


def _pattern(schema: Mapping[str, Any]) -> str:
    return " of letters, digits, dots and dashes" if "pattern" in schema else ""


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_shown, value))
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


@cache
def _schema() -> Mapping[str, Mapping[str, Any]]:
    schema = Config.model_json_schema()
    sections = {name: reference["$ref"].split("/")[-1] for name, reference in schema["properties"].items()}
    return {name: schema["$defs"][definition] for name, definition in sections.items()}
