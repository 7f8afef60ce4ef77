"""How far a span has been launched: the rule by which a leader grants steps, the same in both worlds.

The leader of an executor grants numbered runs of `steps_per_grant` steps and keeps up to `depth` grants outstanding;
a grant, once given, is run. A span that is to end therefore ends with the last step granted.
"""

from __future__ import annotations


def granted_through(done: int, first_step: int, last_step: int, steps_per_grant: int, depth: int) -> int:
    """The last step granted when steps first_step … done of a span have been reported (done >= first_step - 1)."""
    finished = (done - first_step + 1) // steps_per_grant
    return min(last_step, first_step - 1 + (finished + depth) * steps_per_grant)
