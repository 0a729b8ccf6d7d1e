"""What tests of replacement policies share: policies small enough to fill, and a cache that checks their answers."""

import pytest

from wicore_backend.hmt.policy import POLICIES, Access, Policy
from wicore_backend.hmt.policy.a2cr import A2CR, A2CRSettings
from wicore_backend.hmt.policy.reuse_forest import ForestSettings

SMALL = A2CRSettings(min_ghosts=500, forest=ForestSettings(samples=1_000))
every_policy = pytest.mark.parametrize("name", POLICIES)


def build(name: str, capacity: int) -> Policy:
    """The policy, with the small memory that a small test can fill."""
    return A2CR(capacity, SMALL) if name == "a2cr" else POLICIES[name](capacity)


class Books:
    """A cache of single blocks in front of a policy that checks each of its answers."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.evictable: set[int] = set()
        self.in_use: set[int] = set()

    def ask(self, key: int) -> bool:
        hit = key in self.evictable
        self.policy.observe(Access(keys=[key]))
        if hit:
            self.policy.use(key)
        self.policy.add(key)
        self.evictable.add(key)
        while len(self.policy) > self.policy.capacity:
            self.evict()
        return hit

    def evict(self) -> None:
        victim = self.policy.evict()
        assert victim in self.evictable
        self.evictable.remove(victim)
        self.check()

    def check(self) -> None:
        assert len(self.policy) == len(self.evictable)
