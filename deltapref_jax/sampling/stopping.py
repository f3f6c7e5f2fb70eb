"""Stop strings: found on the host between chunks; what was sampled past one is cut.

End tokens and the length budget are tested on the device, inside the decoding loop.
"""

from collections.abc import Callable, Sequence


def before_stop(text: str, stops: Sequence[str]) -> str | None:
    """`text` up to where the first of `stops` begins; None where there is none."""
    found = [index for index in (text.find(stop) for stop in stops) if index >= 0]
    return text[: min(found)] if found else None


def stopped_length(
    ids: Sequence[int], checked: int, stops: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> int | None:
    """Length of the shortest prefix of `ids` whose text holds a stop string; None where there is none.

    Args:
      ids: tokens of one trace so far.
      checked: leading tokens already known to hold none.
      stops: the strings.
      decode: ids to text.
    """
    if before_stop(decode(ids), stops) is None:
        return None
    lengths = range(checked + 1, len(ids))
    return next((n for n in lengths if before_stop(decode(ids[:n]), stops) is not None), len(ids))
