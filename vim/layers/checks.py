"""Options of a model that its constructor refuses."""

from collections.abc import Sequence


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless an option is one of the values it can have."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")


def check_counts(*, least: int = 1, **options: int) -> None:
    """Raise ValueError unless each option is a whole number, and at least `least`."""
    for name, value in options.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be at least {least} and whole, got {value!r}")


def check_stages(*, least: int = 1, **options: Sequence[int]) -> None:
    """Raise ValueError unless each option has a whole number, at least `least`, for each stage, and all as many."""
    for name, numbers in options.items():
        whole = isinstance(numbers, Sequence) and all(isinstance(number, int) and number >= least for number in numbers)
        if not numbers or not whole:
            raise ValueError(f"{name} must be at least {least} and whole in each stage, got {numbers!r}")
    if len({len(numbers) for numbers in options.values()}) > 1:
        raise ValueError(f"{', '.join(options)} must have a number for each stage, got {tuple(options.values())}")
