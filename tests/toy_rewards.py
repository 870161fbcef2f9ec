"""Rewards for tests, as a user would write them."""


def digit_share(completions, **columns):
    """Share of digits: a random model gets some, and learns more within a few updates."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]
