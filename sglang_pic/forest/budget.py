"""Two budgets in bytes, KV pages and linear states, and how much of them is pinned."""

from __future__ import annotations

import dataclasses

from sglang_pic.errors import PicRefused

# All pins together, so that unpinned segments and requests always find room.
ALL_PINS = 0.5
# Of the pool, where the operator names no budget.
KV_SHARE = 0.9
# The same where prefixes go first, since they come back from the host.
TIER_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of KV pages and of linear states."""

    kv: int
    state: int

    def __add__(self, other: Need) -> Need:
        return Need(self.kv + other.kv, self.state + other.state)


@dataclasses.dataclass(frozen=True)
class Budgets:
    """What may be held, and the share of it that one tenant may pin."""

    limit: Need
    pin_share: float

    def check_pin(self, need: Need, of_tenant: Need, of_all: Need) -> None:
        """Refuse a pin over a quota.

        Args:
            need: of the segment to pin.
            of_tenant, of_all: pinned already, by this tenant and by all.

        Raises:
            PicRefused: 507.
        """
        everyone = max(self.pin_share, ALL_PINS)
        for name in ("kv", "state"):
            limit, asked = getattr(self.limit, name), getattr(need, name)
            for whose, share, held in (
                ("this tenant", self.pin_share, of_tenant),
                ("all tenants together", everyone, of_all),
            ):
                room = int(limit * share) - getattr(held, name)
                if asked > room:
                    raise PicRefused(
                        507,
                        f"needs {asked} bytes of {name}, {whose} may pin {max(0, room)} more",
                        "id",
                    )
