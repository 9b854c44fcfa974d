"""When sampling unpacks the 4-bit weights for its own use.

    if copies_pay(room=20e9, copies=5.6e9, full_cache=40e9): ...        # bytes

Imports nothing, not even torch, because the planner asks too; it can be copied out alone.
"""


def copies_pay(room: float, copies: float, full_cache: float) -> bool:
    """Whether sampling should hold unpacked copies of 4-bit weights (--rollout-weights auto). All in bytes.

    room: for the copies and the KV cache together; copies: of the unpacked weights; full_cache: of a cache in which
    every slot reaches its limit. Products were faster with copies at every batch size measured (H200, 1 to 384 rows),
    but a cache that holds few responses costs more than any weights save.
    """
    # A quarter is enough, since few responses grow to their limit.
    return room - copies >= full_cache / 4
