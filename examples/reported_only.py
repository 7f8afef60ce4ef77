"""Two routers that see nothing but executors' reports, to show what old reports do: `disagg leaderboard --policy
examples/reported_only.py:ReportedLeast --policy examples/reported_only.py:ReportedTwo --policy least_requests …`.

The catalogue's policies also know what they have sent themselves (`active_requests`, `wire_requests`), which is never old.
"""

from disagg.policies import ScoringPolicy, SelectingPolicy


def reported(executors):
    return executors.queued_requests + executors.running_requests


class ReportedLeast(ScoringPolicy):
    """Fewest requests as reported."""

    def score(self, request, executors):
        return reported(executors)


class ReportedTwo(SelectingPolicy):
    """Two drawn, the one with fewer requests as reported (Mitzenmacher's power of two choices)."""

    def select(self, request, pool):
        rows = list(pool.healthy_rows)
        return min(self.rng.sample(rows, min(2, len(rows))), key=reported)
