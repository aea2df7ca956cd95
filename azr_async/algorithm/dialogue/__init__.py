"""What models are asked and how their answers are taken apart, one file per prompt language."""

from collections.abc import Sequence
from typing import Literal

from azr_async.algorithm.dialogue.azr import AzrDialogue
from azr_async.algorithm.dialogue.compact import CompactDialogue

DialogueName = Literal["compact", "azr-chat", "azr-base"]


def make_dialogue(name: DialogueName, *, allowed_imports: Sequence[str] = ()) -> CompactDialogue | AzrDialogue:
    """The `ports.Dialogue` of that name.

    Args:
        name: `compact` for the starter, `azr-chat` and `azr-base` for models that know language.
        allowed_imports: modules that the sandbox lets programs import; the azr prompts name them to proposers.
    """
    match name:
        case "compact":
            return CompactDialogue()
        case "azr-chat":
            return AzrDialogue(style="chat", allowed_imports=tuple(allowed_imports))
        case "azr-base":
            return AzrDialogue(style="base", allowed_imports=tuple(allowed_imports))
