"""When sampling unpacks the 4-bit weights for its own use; the planner asks too, so torch is not imported here."""


def copies_pay(room: float, copies: float, full_cache: float) -> bool:
    """Whether sampling takes `copies` bytes of unpacked weights (--rollout-weights auto), of `room` for them and the
    cache: products are faster with them at every batch size that was measured (H200, 1 to 384 rows), but a cache that
    holds few responses is slower than any weights. A quarter of what all slots at full length need (`full_cache`) is
    enough, since few responses grow to their limit.
    """
    return room - copies >= full_cache / 4
