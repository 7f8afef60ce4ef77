"""How far steps are launched ahead of those that have run: the rules of a leader, the same in both worlds.

The leader of an executor grants numbered runs of `steps_per_grant` steps and keeps up to `depth` grants outstanding;
a grant, once given, is run. A span that is to end therefore ends with the last step granted. With `plan_ahead` the
window of grants goes on across plans: where the open plan needs no more grants, and the window has room, its last step is
certain, and the core is told so (`StepsCommitted`) before that step has run. The next plan's grants then queue behind it.
"""

from __future__ import annotations

from typing import NamedTuple


class Launch(NamedTuple):
    """How the driver of one executor launches its steps."""

    steps_per_grant: int = 1
    depth: int = 1  # grants outstanding, over all plans
    plan_ahead: bool = False  # ask for the next plan before the last step of this one has run

    def may_commit(self, has_chunks: bool, num_out: int) -> bool:
        """Whether a plan that needs no more grants may be committed, with `num_out` grants outstanding in all.

        What a plan with chunks yields - first tokens, KV to hand over - is real only at its end.
        """
        return may_commit(self.plan_ahead, self.depth, has_chunks, num_out)


def may_commit(plan_ahead: bool, depth: int, has_chunks: bool, num_out: int) -> bool:
    """`Launch.may_commit`, for a driver that keeps the numbers."""
    return plan_ahead and not has_chunks and num_out < depth


def granted_through(done: int, first_step: int, last_step: int, steps_per_grant: int, depth: int) -> int:
    """The last step granted when steps first_step … done of a span have been reported (done >= first_step - 1).

    `depth`: outstanding grants that this span may have; those of committed plans before it are taken off.
    """
    finished = (done - first_step + 1) // steps_per_grant
    return min(last_step, first_step - 1 + (finished + depth) * steps_per_grant)


def grants_out(done: int, first_step: int, granted: int, steps_per_grant: int) -> int:
    """Grants outstanding of steps first_step … granted when those up to `done` have been reported."""
    if done >= granted:
        return 0
    given = -(-(granted - first_step + 1) // steps_per_grant)
    return given - (done - first_step + 1) // steps_per_grant
