"""Reading conversations in ShareGPT's form: `[{"id": …, "conversations": [{"from": "human", "value": …}, …]}, …]`.

They hold text and no times. No tokenizer is at hand, so a text counts a token for each 4 characters, which is near what
English takes; parts of equal text are equal parts of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from .errors import ConfigError
from .samples import MAX_FILE_BYTES
from .segments import Segment, segment_id

CHARACTERS_PER_TOKEN: Final = 4
_AT_ONCE: Final = 64  # conversations that take turns, so that a conversation's turns are not sent back to back
_ASKS: Final = frozenset({"human", "user"})
_ANSWERS: Final = frozenset({"gpt", "assistant", "chatgpt", "bing", "bard"})


class _Message(msgspec.Struct, frozen=True):
    sender: str = msgspec.field(name="from")
    value: str


class _Conversation(msgspec.Struct, frozen=True):
    conversations: list[_Message]
    id: str | int | None = None


class Turn(NamedTuple):
    """One question: its prompt is all that was said before it in `session`, and itself."""

    session: str
    segments: tuple[Segment, ...]
    num_output_tokens: int


def read_turns(path: Path) -> Iterator[tuple[int, Turn]]:
    """Turns with the number (from 1) of the conversation they are from. Raises ConfigError naming the file and the cause."""
    status = path.stat()
    conversations = _read(path, status.st_mtime_ns, status.st_size)
    for first in range(0, len(conversations), _AT_ONCE):
        streams = [
            (number, _turns(conversation, number))
            for number, conversation in enumerate(conversations[first : first + _AT_ONCE], first + 1)
        ]
        while streams:
            left = []
            for number, turns in streams:
                turn = next(turns, None)
                if turn is not None:
                    yield number, turn
                    left.append((number, turns))
            streams = left


def _turns(conversation: _Conversation, number: int) -> Iterator[Turn]:
    """A question that is not answered, or answered with nothing, is not a request."""
    session = f"{number}" if conversation.id is None else str(conversation.id)
    segments: list[Segment] = []
    messages = conversation.conversations
    for place in count():
        if place >= len(messages):
            return
        message = messages[place]
        segments.append(Segment(segment_id(message.value), _num_tokens(message.value)))
        if message.sender in _ASKS and place + 1 < len(messages):
            answer = messages[place + 1]
            if answer.sender in _ANSWERS and answer.value:
                yield Turn(session, tuple(part for part in segments if part.num_tokens), _num_tokens(answer.value))


def _num_tokens(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)


@lru_cache(maxsize=2)  # a workload is gone through several times: checked, counted, sent
def _read(path: Path, mtime_ns: int, size: int) -> list[_Conversation]:
    if size > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: {size} bytes; allowed: at most {MAX_FILE_BYTES}")
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[_Conversation])
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from None
