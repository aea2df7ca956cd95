"""Write `inside/filters.py` anew from the rules."""

from pathlib import Path
from typing import Final

from azr_async.adapters.sandbox.filters.assembler import ARCHITECTURES, assemble
from azr_async.adapters.sandbox.filters.rules import FILTERS

TARGET: Final = Path(__file__).parents[1] / "inside" / "filters.py"
_HEXADECIMAL_PER_LINE: Final = 96


def main() -> None:
    """Make the filters and say how long they are."""
    TARGET.write_text(generated(), encoding="ascii")
    for name, rules in FILTERS.items():
        lengths = {architecture: len(assemble(rules, architecture)) // 8 for architecture in ARCHITECTURES}
        print(name, "instructions:", lengths)


def generated() -> str:
    """The text of `inside/filters.py`."""
    lines = [
        '"""The seccomp filters, made by `python -m azr_async.adapters.sandbox.filters` from filters/rules.py."""',
        "",
        "from typing import Final",
        "",
        "FILTERS: Final[dict[str, dict[str, bytes]]] = {",
    ]
    for architecture in ARCHITECTURES:
        lines.append(f'    "{architecture}": {{')
        for name, rules in FILTERS.items():
            text = assemble(rules, architecture).hex()
            lines.append(f'        "{name}": bytes.fromhex(')
            lines += [
                f'            "{text[start : start + _HEXADECIMAL_PER_LINE]}"'
                for start in range(0, len(text), _HEXADECIMAL_PER_LINE)
            ]
            lines.append("        ),")
        lines.append("    },")
    return "\n".join([*lines, "}", ""])


if __name__ == "__main__":
    main()
