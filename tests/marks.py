"""A mark on most cases of a test, so that every run has a few of them."""

import pytest


def mostly(mark, cases, *others):
    """Returns the cases, all of them marked but those at the places `others`."""
    return [
        case
        if place in others
        else pytest.param(*(case if isinstance(case, tuple) else [case]), marks=mark)
        for place, case in enumerate(cases)
    ]
