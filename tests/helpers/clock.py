"""Comparing times, the one kind of check that a busy machine may fail: a test marked `clock` is tried again for it alone."""


class OffTimeError(AssertionError):
    """A time, or a share of one, is not within its bounds."""


def assert_within(low: float, measured: float, high: float) -> float:
    """That low <= measured < high, and what was measured: seconds, or a share of them."""
    if not low <= measured < high:
        raise OffTimeError(f"{measured:.3f} is not between {low} and {high}")
    return measured
