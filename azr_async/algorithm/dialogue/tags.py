"""Takes `<think>..</think><answer>..</answer>` and the fenced blocks inside of it apart, and writes them.

One rule of well-formedness, whoever asks: the whole text is one thought, then one answer, and nothing else; the answer
holds fenced blocks, each closed by a line of at least as many backticks as opened it. A line of three backticks inside
a block is therefore written with a longer fence, and tags inside a block are just text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from azr_async.messages import Malformed

ANSWER_END: Final = "</answer>"

# The first `</think><answer>` ends the thought, the last `</answer>` the answer: what is between may quote any tag.
_THOUGHT: Final = re.compile(r"\s*<think>")
_TURN: Final = re.compile(r"</think>\s*<answer>")
_OPENING: Final = re.compile(r" {0,3}(`{3,})[ \t]*(\w*)[ \t]*")
_CLOSING: Final = re.compile(r" {0,3}(`{3,})[ \t]*")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block."""

    label: str
    """Lower case; empty when the fence names nothing."""
    text: str


def read_blocks(response: str) -> list[Block] | Malformed:
    """The blocks of a response's answer, in their order."""
    begun = _THOUGHT.match(response)
    turned = _TURN.search(response, begun.end()) if begun else None
    end = response.rfind(ANSWER_END, turned.end()) if turned else -1
    if turned is None or end < 0 or response[end + len(ANSWER_END) :].strip():
        return Malformed(reason="not of the form <think>..</think><answer>..</answer>")
    blocks, label, fence, body = [], "", 0, list[str]()
    for line in response[turned.end() : end].split("\n"):
        if not fence:
            opening = _OPENING.fullmatch(line)
            if opening:
                fence, label, body = len(opening[1]), opening[2].lower(), []
            continue
        closing = _CLOSING.fullmatch(line)
        if closing and len(closing[1]) >= fence:
            blocks.append(Block(label, "\n".join(body)))
            fence = 0
        else:
            body.append(line)
    return Malformed(reason=f"a {label or 'nameless'} block that never ends") if fence else blocks


def texts_labelled(blocks: Sequence[Block], label: str) -> list[str]:
    """The texts of the blocks with this label, whichever other blocks stand between them."""
    return [block.text for block in blocks if block.label == label]


def only_text(blocks: Sequence[Block], label: str) -> str | Malformed:
    """The text of the one block with this label."""
    texts = texts_labelled(blocks, label)
    if len(texts) != 1:
        return Malformed(reason=f"{len(texts)} {label} blocks instead of one")
    return texts[0] if texts[0].strip() else Malformed(reason=f"an empty {label} block")


def fenced(label: str, text: str) -> str:
    """`text` as a block, with a fence that nothing inside of it can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{label}\n{text}\n{fence}"


def response(thought: str, blocks: Sequence[Block]) -> str:
    """A well-formed response; `thought` must not quote the tags."""
    body = "\n".join(fenced(block.label, block.text) for block in blocks)
    return f"<think>{thought}</think>\n<answer>\n{body}\n{ANSWER_END}"
