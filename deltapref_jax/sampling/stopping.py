"""Stop strings, which the host searches between chunks; tokens sampled after one are cut off.

End tokens and the largest length are tested on the device, inside the decoding loop.
"""

from collections.abc import Callable, Sequence


def before_stop(text: str, stops: Sequence[str]) -> str | None:
    """Returns `text` before the earliest stop string, or None if it holds no stop string."""
    starts = [index for index in (text.find(stop) for stop in stops) if index >= 0]
    return text[: min(starts)] if starts else None


def stopped_length(
    ids: Sequence[int], checked: int, stops: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> int | None:
    """Returns the length of the shortest prefix of `ids` whose text holds a stop string, or None.

    Args:
      ids: tokens of one trace so far.
      checked: number of leading tokens that are known to hold no stop string.
      stops: the stop strings.
      decode: maps ids to text.
    """
    if before_stop(decode(ids), stops) is None:
        return None
    # Prefix by prefix, because a stop string may span tokens, and a token hold more than its end.
    lengths = range(checked + 1, len(ids))
    return next((n for n in lengths if before_stop(decode(ids[:n]), stops) is not None), len(ids))
