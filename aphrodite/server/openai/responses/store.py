"""Answers kept for `previous_response_id`, for a while and within bounds."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from aphrodite.server.openai.responses.items import Item, decode_item, encode_item

Owner = bytes | None
"""Whose a response is: the digest of the API key that it was asked for with; None: of nobody in particular."""

_PLACE_BYTES = 8  # what a conversation spends to mention an item
_OVERHEAD_BYTES = 1024  # about what a response's place in the tables takes


@dataclass(frozen=True, slots=True, eq=False)
class StoredItem:
    """An item in JSON; conversations that go on from each other share theirs."""

    id: str
    data: bytes

    @classmethod
    def of(cls, item: Item) -> StoredItem:
        return cls(item.id, encode_item(item))

    @property
    def size(self) -> int:
        return len(self.data) + len(self.id)

    def decode(self) -> Item:
        item: Item = decode_item(self.data)
        return item


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One answer and the conversation that it ends.

    Attributes:
        body: the response as its client got it, in JSON.
        input_items: the conversation that was answered, oldest first.
        output_items: the answer.
        events: those of an answer in the background, which may be told again.
    """

    id: str
    owner: Owner
    body: bytes
    input_items: tuple[StoredItem, ...]
    output_items: tuple[StoredItem, ...]
    events: tuple[bytes, ...] = ()

    @property
    def items(self) -> tuple[StoredItem, ...]:
        """The conversation so far."""
        return self.input_items + self.output_items

    @property
    def size(self) -> int:
        """Bytes besides those of its items."""
        mentioned = len(self.input_items) + len(self.output_items)
        told = sum(map(len, self.events))
        return len(self.body) + told + (mentioned + len(self.events)) * _PLACE_BYTES + _OVERHEAD_BYTES


class ResponseStore:
    """The latest responses in memory; whichever was used longest ago makes room.

    Items that several conversations share are counted once. One API key never sees what another one stored.

    Args:
        max_responses: most responses; 0 keeps none.
        max_bytes: most bytes of all of them.
    """

    def __init__(self, *, max_responses: int, max_bytes: int) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._uses: Counter[StoredItem] = Counter()  # how many responses hold an item
        self._items: dict[tuple[Owner, str], StoredItem] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._responses)

    @property
    def num_bytes(self) -> int:
        """What is held, by the same count as `max_bytes`."""
        return self._bytes

    @property
    def enabled(self) -> bool:
        return self._max_responses > 0 and self._max_bytes > 0

    def put(self, response: StoredResponse) -> None:
        """Keep a response, instead of what there was of it before; the oldest ones go.

        One that is larger than everything may be is not kept, and no other one goes for it.
        """
        if response.id in self._responses:
            self._drop(response.id)
        if response.size + sum(item.size for item in set(response.items)) > self._max_bytes:
            return
        self._responses[response.id] = response
        self._bytes += response.size
        for item in response.items:
            if not self._uses[item]:
                self._bytes += item.size
            self._uses[item] += 1
            self._items[response.owner, item.id] = item
        while len(self) > self._max_responses or self._bytes > self._max_bytes:
            self._drop(next(iter(self._responses)))

    def get(self, owner: Owner, response_id: str) -> StoredResponse | None:
        """A response of `owner`'s."""
        response = self._responses.get(response_id)
        if response is None or response.owner != owner:
            return None
        self._responses.move_to_end(response_id)
        return response

    def find_item(self, owner: Owner, item_id: str) -> StoredItem | None:
        """An item of one of `owner`'s conversations."""
        return self._items.get((owner, item_id))

    def delete(self, owner: Owner, response_id: str) -> bool:
        """Forget a response of `owner`'s; whether there was one. Conversations that went on from it keep its items."""
        if self.get(owner, response_id) is None:
            return False
        self._drop(response_id)
        return True

    def check(self) -> None:
        """Raise RuntimeError if the counts disagree with what is held."""
        held = {item for response in self._responses.values() for item in response.items}
        size = sum(response.size for response in self._responses.values()) + sum(item.size for item in held)
        if size != self._bytes or held != self._uses.keys() or not held >= set(self._items.values()):
            raise RuntimeError("the store of responses has lost count of its items")

    def _drop(self, response_id: str) -> None:
        response = self._responses.pop(response_id)
        self._bytes -= response.size
        for item in response.items:
            self._uses[item] -= 1
            if not self._uses[item]:
                del self._uses[item]
                self._bytes -= item.size
                if self._items.get((response.owner, item.id)) is item:
                    del self._items[response.owner, item.id]


def stored(items: Sequence[Item]) -> tuple[StoredItem, ...]:
    """Items as they are kept."""
    return tuple(map(StoredItem.of, items))
